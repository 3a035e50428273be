"""Every op in plain PyTorch: the specification, the fallback on any device, and what tests and benchmarks compare with.

These functions are differentiable in all their tensors and work under every ``torch.func`` transform.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fm_fast import _philox
from fm_fast._philox import Kind, Stream
from fm_fast.time_samplers import Stratified, TimeSampler, Uniform

REDUCTIONS = ("mean", "sum", "none")
Draw = Callable[..., Tensor]


def noise(key: Tensor, shape: tuple[int, ...], kind: Kind, stream: int, index: int = 0) -> Tensor:
    """Numbers of the noise contract: float32 [B, ...] (int64 for words)."""
    return _philox.draw(key, shape, kind, stream, index)


def accumulation_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 where any tensor is float64, else float32: the dtype of times, coefficients, sums and losses."""
    wide = any(x is not None and x.dtype == torch.float64 for x in tensors)
    return torch.float64 if wide else torch.float32


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """values [B] shaped to broadcast over the samples of ``like`` [B, ...]."""
    return values.reshape(values.shape[0], *[1] * (like.dim() - 1))


def draw_time(
    key: Tensor, batch: int, sampler: TimeSampler, t_range: tuple[float, float], dtype: torch.dtype, draw: Draw = noise
) -> Tensor:
    """Times [B] spread over the range by the sampler; ``draw`` is the source of the numbers."""
    raw = _raw_time(key, batch, sampler, draw).to(torch.float64)
    return (t_range[0] + (t_range[1] - t_range[0]) * raw).to(dtype)


def _raw_time(key: Tensor, batch: int, sampler: TimeSampler, draw: Draw) -> Tensor:
    if isinstance(sampler, Stratified):
        # one word of the step shifts the lattice of all samples: id 0's word, whatever ids this call holds
        offset = draw(torch.cat([key[:2], torch.zeros_like(key[:1])]), (1, 1), Kind.word, Stream.t)[0, 0]
        return _philox.uniform((offset + _philox.sample_ids(key, batch) * _philox.GOLDEN) & _philox.MASK)
    if isinstance(sampler, Uniform):
        return draw(key, (batch, 1), Kind.uniform, Stream.t)[:, 0]
    z = draw(key, (batch, 1), Kind.normal, Stream.t)[:, 0].to(torch.float64)
    return torch.sigmoid(sampler.mean + sampler.std * z)


def prepare_data(x1: Tensor, key: Tensor, flip: float, levels: int, dequantise: bool, dtype: torch.dtype, draw: Draw = noise) -> Tensor:
    """x1 flipped with probability ``flip`` a sample; uint8 mapped to 2 (x1 + u) / levels - 1."""
    if flip > 0.0:
        flipped = draw(key, (x1.shape[0], 1), Kind.uniform, Stream.flip)[:, 0] < flip
        x1 = torch.where(per_sample(flipped, x1), x1.flip(-1), x1)
    if x1.dtype != torch.uint8:
        return x1.to(dtype)
    u = draw(key, tuple(x1.shape), Kind.uniform, Stream.dequantise).to(dtype) if dequantise else 0.5
    return (x1.to(dtype) + u) * (2.0 / levels) - 1.0


def plain_inputs(
    x1: Tensor, x0: Tensor | None, key: Tensor, flip: float, levels: int, dequantise: bool, dtype: torch.dtype, draw: Draw = noise
) -> tuple[Tensor, Tensor]:
    """(x1, x0) as full tensors: the data map applied, the noise drawn where it was not given."""
    data = prepare_data(x1, key, flip, levels, dequantise, dtype, draw)
    return data, (draw(key, tuple(x1.shape), Kind.normal, Stream.x0) if x0 is None else x0).to(dtype)


def path_sample(x1: Tensor, x0: Tensor, coefficients: Tensor, dtype: torch.dtype) -> Tensor:
    """x_t = a x1 + s x0 (equations 11 and 22) for coefficients [B, 6], rounded once to ``dtype``."""
    a, s = (per_sample(coefficients[:, i], x1) for i in (0, 1))
    wide = coefficients.dtype
    return (a * x1.to(wide) + s * x0.to(wide)).to(dtype)


def target(x1: Tensor, x0: Tensor, coefficients: Tensor) -> Tensor:
    """c1 x1 + c0 x0; for the OT velocity x1 - (1 - sigma_min) x0 (equation 23), with no division."""
    c1, c0 = (per_sample(coefficients[:, i], x1) for i in (2, 3))
    wide = coefficients.dtype
    return c1 * x1.to(wide) + c0 * x0.to(wide)


def path_loss(o: Tensor, x1: Tensor, x0: Tensor, coefficients: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    """w ||k o - (c1 x1 + c0 x0)||^2, reduced: "mean" over all elements, "sum", or "none" (mean of each sample, [B])."""
    coefficients = coefficients.to(accumulation_dtype(o, coefficients))
    k, w = (per_sample(coefficients[:, i], o) for i in (4, 5))
    error = w * (k * o.to(coefficients.dtype) - target(x1, x0, coefficients)).square()
    if weight is not None:
        error = error * (per_sample(weight, o) if weight.dim() == 1 else weight).to(error.dtype)
    if reduction == "none":
        return error.flatten(1).mean(1) if o.dim() > 1 else error
    return error.mean() if reduction == "mean" else error.sum()
