"""Inputs of group_norm_silu, the op on them, and what torch makes of them in float64: what the tests of every backend compare."""

from dataclasses import dataclass

import oracle
import torch
import torch.nn.functional as F

from fm_fast import _ops

SEED, STEP, LAYER = 0x123456789ABCDEF, 4, 3
NAMES = ("x", "second", "embedding", "weight", "bias", "scale", "shift")


@dataclass(frozen=True)
class Case:
    """Sizes and options; ``layouts`` are the memory formats of x, of second and of the result's gradient."""

    batch: int
    channels: int
    second: int = 0
    groups: int = 1
    size: tuple = ()
    dtype: torch.dtype = torch.float32
    parameter_dtype: torch.dtype | None = None
    modulated: bool = True
    activation: bool = True
    dropout: float = 0.0
    ids: int | tuple = 0
    layouts: str = "ccc"  # c: contiguous, l: channels_last
    mean: float = 0.0

    @property
    def total(self):
        return self.channels + self.second

    @property
    def shape(self):
        return (self.batch, self.total, *self.size)


def randn(shape, dtype, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def in_layout(x, layout):
    return x.to(memory_format=torch.channels_last) if layout == "l" else x


def inputs(case):
    """(x, second, embedding, weight, bias, scale, shift), None where the case has none, and the gradient of the result."""
    parameters = case.parameter_dtype or (torch.float64 if case.dtype == torch.float64 else torch.float32)
    x = in_layout((randn((case.batch, case.channels, *case.size), torch.float32, 1) + case.mean).to(case.dtype), case.layouts[0])
    second = None
    if case.second:
        second = in_layout((randn((case.batch, case.second, *case.size), torch.float32, 2) + case.mean).to(case.dtype), case.layouts[1])
    # Halves of one tensor, as a linear layer gives them.
    scale, shift = (0.5 * randn((case.batch, 2 * case.total), parameters, 3)).chunk(2, dim=1) if case.modulated else (None, None)
    embedding = 0.5 * randn((case.batch, case.total), parameters, 4) if case.modulated else None
    weight, bias = (randn((case.total,), parameters, seed) for seed in (5, 6))
    return (x, second, embedding, weight, bias, scale, shift), in_layout(randn(case.shape, case.dtype, 7), case.layouts[2])


def key(case):
    ids = case.ids if isinstance(case.ids, tuple) else (case.ids,)
    return torch.tensor([SEED, STEP, *ids])


def mask(case):
    """The dropout factors of the case, by the independent generator."""
    first = case.ids if isinstance(case.ids, tuple) else range(case.ids, case.ids + case.batch)
    positions = max(1, int(torch.Size(case.size).numel()))
    uniform = oracle.uniform((case.batch, case.total, positions), SEED, STEP, "dropout", list(first), LAYER)
    return torch.from_numpy(uniform >= case.dropout).reshape(case.shape) / (1.0 - case.dropout)


def formula(case, x, second, embedding, weight, bias, scale, shift):
    """torch's own functions in the dtype of the tensors."""

    def spread(values):
        return values.reshape(*values.shape, *[1] * len(case.size))

    h = x if second is None else torch.cat([x, second], 1)
    h = h if embedding is None else h + spread(embedding)
    h = F.group_norm(h, case.groups, weight, bias)
    h = h if scale is None else h * (1 + spread(scale)) + spread(shift)
    h = F.silu(h) if case.activation else h
    return h * mask(case).to(h.dtype) if case.dropout else h


def with_gradients(function, tensors, grad_y):
    """The result and the gradient of every tensor, by name."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    y = function(*leaves)
    y.backward(grad_y)
    return {"y": y.detach()} | {name: t.grad for name, t in zip(NAMES, leaves, strict=True) if t is not None}


def expected(case, tensors, grad_y):
    """Result and gradients in float64."""
    wide = [None if t is None else t.double() for t in tensors]
    return with_gradients(lambda *t: formula(case, *t), wide, grad_y.double())


# Relative to the largest number of a tensor: one rounding of 16-bit results, a few of float32 and float64 sums.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def uncancelled(case, tensors, grad_y):
    """The size that the gradients of x, second and embedding would have without the two means that the norm takes off them.

    What is left may be nothing at all, as for a group of one channel, but the roundings are those of what there was.
    """
    x, second, embedding, weight, _, scale, _ = tensors
    joined = (x if second is None else torch.cat([x, second], 1)).double()
    joined = joined if embedding is None else joined + embedding.double().reshape(*embedding.shape, *[1] * len(case.size))
    rstd = (joined.reshape(case.batch, case.groups, -1).var(2, correction=0) + 1e-5).rsqrt()
    gain = weight.abs().max() * (1.0 if scale is None else 1.0 + scale.abs().max())
    size = float(rstd.max() * gain * grad_y.abs().max())
    return {"x": size, "second": size, "embedding": size * max(1, torch.Size(case.size).numel())}


def assert_close(got, exact, sizes):
    """Each number within the tolerance of its dtype, relative to the largest of its tensor, or of what it is a difference of."""
    arithmetic = 1e-14 if got["y"].dtype == torch.float64 else 5e-7
    for name, value in exact.items():
        assert got[name].shape == value.shape
        if value.numel() == 0:
            continue
        tolerance = max(TOLERANCE[got[name].dtype], 4 * arithmetic)
        bound = tolerance * float(value.abs().max()) + arithmetic * sizes.get(name, 0.0)
        error = float((got[name].double() - value).abs().max())
        assert error <= bound, f"{name}: {error} > {bound}"


def settings(case):
    return _ops.NormSettings(case.groups, 1e-5, case.activation, case.dropout, LAYER)


def ours(case, backend):
    def run(*tensors):
        return _ops.group_norm_silu(tensors, key(case) if case.dropout else None, settings(case), backend)

    return run


def check(case, backend):
    tensors, grad_y = inputs(case)
    got = with_gradients(ours(case, backend), tensors, grad_y)
    assert_close(got, expected(case, tensors, grad_y), uncancelled(case, tensors, grad_y))
    return got


def replaced(case, **changes):
    return Case(**{**case.__dict__, **changes})
