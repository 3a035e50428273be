"""Every op in plain PyTorch: the specification, the fallback on any device, and what tests and benchmarks compare with.

These functions are differentiable in all their tensors and work under every ``torch.func`` transform.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fm_fast import _philox
from fm_fast._philox import Kind, Stream
from fm_fast.time_samplers import Stratified, TimeSampler, Uniform

NORM_EPSILON = 1e-6  # as in torch.nn.utils.clip_grad_norm_
REDUCTIONS = ("mean", "sum", "none")
SAFETY, SHORTEST, LONGEST = 0.9, 0.2, 10.0  # factors of a step's length
AT_THE_END, ON_THE_WAY, GIVEN_UP = range(3)
Draw = Callable[..., Tensor]


def noise(key: Tensor, shape: tuple[int, ...], kind: Kind, stream: int, index: int = 0) -> Tensor:
    """Numbers of the noise contract: float32 [B, ...] (int64 for words)."""
    return _philox.draw(key, shape, kind, stream, index)


def accumulation_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 where any tensor is float64, else float32: the dtype of times, coefficients, sums and losses."""
    for x in tensors:
        if x is not None and x.dtype == torch.float64:
            return torch.float64
    return torch.float32


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
    # Not torch.sigmoid, whose last bit depends on where in the tensor a number stands.
    return 1.0 / (1.0 + torch.exp(-(sampler.mean + sampler.std * z)))


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


def group_norm_silu(
    x: Tensor,
    second: Tensor | None,
    embedding: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: int,
    eps: float,
    activation: bool,
    mask: Tensor | None = None,
) -> Tensor:
    """mask silu(GroupNorm([x, second] + embedding) (1 + scale) + shift), rounded once to x's dtype.

    x and second are [B, C', ...], whose channels follow each other; embedding, scale and shift [B, C]; weight and bias [C];
    ``mask`` is what :func:`dropout_mask` gives. Without ``activation`` silu is the identity.
    """
    wide = accumulation_dtype(x)
    joined = (x if second is None else torch.cat([x, second], dim=1)).to(wide)
    h = joined if embedding is None else joined + per_channel(embedding, joined)
    h = group_norm(h, groups, eps) * per_channel(weight, h) + per_channel(bias, h)
    h = h if scale is None else h * (1.0 + per_channel(scale, h))
    h = h if shift is None else h + per_channel(shift, h)
    h = torch.nn.functional.silu(h) if activation else h
    return (h if mask is None else h * mask.reshape(h.shape)).to(x.dtype)


def group_norm(h: Tensor, groups: int, eps: float) -> Tensor:
    """(h - mean) / sqrt(variance + eps) over the channels of each group and all positions of h [B, C, ...], in the layout of h.

    Not torch.group_norm, whose channels_last kernel for CPUs takes the variance as a difference of two large numbers.
    """
    grouped = h.reshape(h.shape[0], groups, math.prod(h.shape[1:]) // groups)
    mean = grouped.mean(2)
    variance = (grouped - mean[:, :, None]).square().mean(2)
    width = h.shape[1] // groups
    mean, rstd = (per_channel(x.repeat_interleave(width, dim=1), h) for x in (mean, torch.rsqrt(variance + eps)))
    return (h - mean) * rstd


def per_channel(values: Tensor, like: Tensor) -> Tensor:
    """values [B, C] or [C] in the dtype of ``like`` [B, C, ...] and shaped to broadcast over its positions."""
    return values.to(like.dtype).reshape(*values.shape, *[1] * (like.dim() - 2))


def dropout_mask(key: Tensor, shape: tuple[int, int, int], probability: float, index: int, draw: Draw = noise) -> Tensor:
    """float32 [B, C, P] of layer ``index``: 0 where a uniform of stream ``dropout`` is below ``probability``, else 1 / (1 - it)."""
    kept = draw(key, shape, Kind.uniform, Stream.dropout, index) >= probability
    return kept.to(torch.float32) * (1.0 / (1.0 - probability))


def linear_step(x: Tensor, outputs: Sequence[Tensor], coefficients: Sequence[float], guidance: float = 1.0) -> Tensor:
    """coefficients[0] x + sum_j coefficients[1 + j] m(outputs[j]): every update of a fixed-step solver, in x's dtype.

    m is the identity for outputs of x's shape; outputs [2B, ...] hold a conditional and an unconditional half, mixed by :func:`guided`.
    """
    result = x if coefficients[0] == 1.0 else coefficients[0] * x
    for output, coefficient in zip(outputs, coefficients[1:], strict=True):
        result = torch.add(result, mixed(output.to(x.dtype), x, guidance), alpha=coefficient)
    return result


def step_error(
    y: Tensor, end: Tensor, outputs: Sequence[Tensor], coefficients: Sequence[float | Tensor], rtol: float, atol: float
) -> Tensor:
    """Mean squares of the samples' (e / (atol + rtol max(|y|, |end|))), float64 [B], for e = sum_j coefficients[j] outputs[j].

    How large the error of a step from y to end is beside what is tolerated (Hairer, Nørsett and Wanner, equations II.4.10 and II.4.11).
    """
    wide = accumulation_dtype(y, end)
    error = sum(output.to(wide) * coefficient for output, coefficient in zip(outputs, coefficients, strict=True))
    size = torch.maximum(y.abs(), end.abs()).to(wide)
    squares = (error / (atol + rtol * size)).square().to(torch.float64)
    return squares.unsqueeze(-1).flatten(1).mean(1)


class StepControl(NamedTuple):
    """How the steps of all samples go on, see :func:`step_control`."""

    numbers: Tensor  # float64 [3, B]: t, the length of the next step before it is cut at a stop, and after
    counts: Tensor  # int64 [3, B]: the number of the next stop, evaluations so far, and AT_THE_END, ON_THE_WAY or GIVEN_UP
    totals: Tensor  # int64 [3]: how many are on the way, were given up now, were accepted now
    accepted: Tensor  # bool [B]: whether the step that was tried counts
    times: Tensor  # float64 [S, B], of the next step's evaluations
    factors: Tensor  # float64 [2, B]: the next step's length, and that over the length before


def step_control(numbers: Tensor, counts: Tensor, means: Tensor, stops: Tensor, nodes: Tensor, order: int, evaluations: int) -> StepControl:
    """Accept or refuse the step that each sample has tried, and plan its next one.

    means [P, B]: what :func:`step_error` told of each part of the state; with P = 0 no step was tried. stops [T >= 2]: where the solve
    begins, and the times at which steps have to end. nodes [S]: of the method. order: of the method, in whose root of the error the
    length grows (Hairer, Nørsett and Wanner, equation II.4.13). evaluations: that the step took. Meant to be called without gradients.
    """
    (t, length, tried), (stop, spent, status) = numbers, counts
    running, accepted = status == ON_THE_WAY, torch.zeros_like(status, dtype=torch.bool)
    if len(means):
        square, cut = means.amax(0), length.abs() >= (stops[stop] - t).abs()
        accepted = running & (square <= 1.0)
        arrived = accepted & cut
        longer = tried * _growth(square, order)
        # A step that was cut at a stop does not shorten the one that follows.
        length = torch.where(~running | (arrived & (length.abs() > longer.abs())), length, longer)
        t = torch.where(accepted, torch.where(cut, stops[stop], t + tried), t)
        ended, spent = arrived & (stop == len(stops) - 1), spent + evaluations * running
        status, stop = status.masked_fill(ended, AT_THE_END), stop + (arrived & ~ended)
    lost = (status == ON_THE_WAY) & (t + length == t)
    status = status.masked_fill(lost, GIVEN_UP)
    running, left = status == ON_THE_WAY, stops[stop] - t
    following = torch.where(running, torch.where(length.abs() >= left.abs(), left, length), 0.0)
    low, high = torch.minimum(stops[0], stops[-1]), torch.maximum(stops[0], stops[-1])
    return StepControl(
        torch.stack([t, length, following]),
        torch.stack([stop, spent, status]),
        torch.stack([running.sum(), lost.sum(), accepted.sum()]),
        accepted,
        (t + nodes.unsqueeze(1) * following).clamp(low, high),
        torch.stack([following, torch.where(tried == 0.0, 0.0, following / tried)]),
    )


def _growth(square: Tensor, order: int) -> Tensor:
    """How much longer the next step is, for the mean square of an error; one below 1 is not followed by a shorter step."""
    factor = (SAFETY * square.nan_to_num(torch.inf).pow(-0.5 / order)).clamp(SHORTEST, LONGEST)
    return torch.where(square < 1.0, factor.clamp(min=1.0), factor)


def mixed(output: Tensor, x: Tensor, guidance: float) -> Tensor:
    """An output of x's shape itself, or the guided mix of one [2B, ...]; ValueError for any other shape, which must not be broadcast."""
    if output.shape == x.shape:
        return output
    if output.dim() == 0 or output.shape != (2 * x.shape[0], *x.shape[1:]):
        raise ValueError(f"model must return the shape of its input each time, {tuple(x.shape)} once or twice, got {tuple(output.shape)}")
    return guided(output, guidance)


def guided(output: Tensor, scale: float | Tensor) -> Tensor:
    """u + scale (c - u) for the halves (c, u) of a doubled batch [2B, ...]; scale is a number, or [B]."""
    batch = output.shape[0] // 2
    conditional, unconditional = output[:batch], output[batch:]  # chunk asks an exported program's batch for its size
    factor = per_sample(scale.to(output.device, output.dtype), conditional) if isinstance(scale, Tensor) else scale
    return unconditional + factor * (conditional - unconditional)


def probes(key: Tensor, shape: tuple[int, ...], codes: Tensor, rows: Tensor, index: int, first: int, share: int, count: int) -> Tensor:
    """Sign vectors first .. first + count - 1, float32 [count, B, ...]: signs of stream ``probe``, index + q // share for probe q.

    codes int64 [D], one an element in logical order, and rows int64, one a probe, multiply them by (-1)^popcount(code & row):
    rows of a Hadamard matrix. Without codes the signs are all there is.
    """
    drawn = {q // share: noise(key, shape, Kind.sign, Stream.probe, index + q // share) for q in range(first, first + count)}
    signs = torch.stack([drawn[q // share] for q in range(first, first + count)])
    if codes.numel() == 0:
        return signs
    hadamard = 1.0 - 2.0 * _parity(codes[None, :] & rows[first : first + count, None]).to(signs.dtype)
    return signs * hadamard.reshape(count, 1, *shape[1:])


def _parity(word: Tensor) -> Tensor:
    """1 where the number of set bits of an int64 >= 0 is odd."""
    for shift in (32, 16, 8, 4, 2, 1):
        word = word ^ (word >> shift)
    return word & 1


def probe_products(z: Tensor, products: Tensor) -> Tensor:
    """sum_i z_i (J^T z)_i for each probe and sample, float64 [K, B]; z and products are [K, B, ...]."""
    terms = z.to(products.dtype).to(torch.float64) * products.to(torch.float64)
    return terms.flatten(2).sum(2) if terms.dim() > 2 else terms


def group_means(dots: Tensor, groups: int) -> Tensor:
    """Means [groups, B] of consecutive probes; dots is [K, B]."""
    return dots.reshape(groups, dots.shape[0] // groups, dots.shape[1]).mean(1)


def group_statistics(dots: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Mean over probes [B] and the variance of that mean [B], from ``groups`` independent groups of consecutive probes; dots [K, B]."""
    means = group_means(dots, groups)
    mean = means.mean(0)
    if groups < 2:
        return mean, torch.zeros_like(mean)
    return mean, (means - mean).square().sum(0) / ((groups - 1) * groups)


def attention(joint: Tensor) -> Tensor:
    """Self-attention of pixels, [B, pixels, heads, features] from a joint projection [B, pixels, 3, heads, features].

    softmax(q k^T / sqrt(features)) v for each head, with the queries q, keys k and values v side by side in ``joint``.
    """
    query, key, value = joint.permute(2, 0, 3, 1, 4).unbind(0)
    weights = torch.softmax(query @ key.transpose(-1, -2) / math.sqrt(joint.shape[4]), dim=-1)
    return (weights @ value).transpose(1, 2)


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None = None, transposed: bool = False) -> Tensor:
    """A convolution of size 3 that keeps height and width.

    y[b, o, h, w] = bias[o] + sum_{c, i, j} W[o, c, i, j] x[b, c, h + i - 1, w + j - 1] with x zero outside of the image; transposed, with
    W[c, o, 2 - i, 2 - j] instead, as in the gradient of x.
    """
    convolve = torch.nn.functional.conv_transpose2d if transposed else torch.nn.functional.conv2d
    return convolve(x, weight, bias, padding=1)


def conv_weight_grad(grad_y: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the weight and the bias of a convolution of size 2 r + 1 that keeps height and width.

    dW[o, c, i, j] = sum_{b, h, w} dy[b, o, h, w] x[b, c, h + i - r, w + j - r] with x zero outside of the image, db[o] = sum dy.
    """
    padding = (weight.shape[2] // 2,) * 2
    wanted = (False, True, True)
    _, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        grad_y, x, weight, [weight.shape[0]], (1, 1), padding, (1, 1), False, (0, 0), 1, wanted
    )
    return grad_weight, grad_bias


def square_sum(gradients: Sequence[Tensor]) -> Tensor:
    """The sum of all squares, float64 []: not finite if any gradient is not finite."""
    sums = [g.to(torch.float64).square().sum() for g in gradients]
    return torch.stack(sums).sum() if sums else torch.zeros((), dtype=torch.float64)


def adamw(p: Tensor, g: Tensor, m: Tensor, v: Tensor, settings: Tensor, total: Tensor, updates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(p, m, v) after AdamW's update number updates + 1 (Loshchilov & Hutter 2019, "Decoupled weight decay regularization", algorithm 2).

    settings [6]: learning rate, beta1, beta2, epsilon, weight decay, largest norm. The gradient is scaled so that the norm of
    all gradients, whose squares sum to ``total``, is at most the largest norm.
    """
    rate, beta1, beta2, epsilon, weight_decay, largest_norm = settings.unbind()
    n = updates + 1
    g = g.to(m.dtype) * (largest_norm / (total.sqrt() + NORM_EPSILON)).clamp(max=1.0)
    m = torch.lerp(m, g.to(m.dtype), (1.0 - beta1).to(m.dtype))
    v = beta2 * v + (1.0 - beta2) * g * g
    denominator = v.sqrt() / (1.0 - beta2**n).sqrt() + epsilon
    return (1.0 - rate * weight_decay) * p - rate / (1.0 - beta1**n) * m / denominator, m, v


def average_decays(decays: Tensor, updates: Tensor) -> Tensor:
    """min(limit, ((a + n) / (b + n))^exponent) after n = ``updates`` updates, [K] for rows (limit, a, b, exponent) of decays [K, 4]."""
    limit, a, b, exponent = decays.unbind(1)
    return torch.minimum(limit, ((a + updates) / (b + updates)) ** exponent)


def averaged(averages: Tensor, p: Tensor, decays: Tensor, updates: Tensor) -> Tensor:
    """decay average + (1 - decay) p for each of averages [K, ...]."""
    rates = per_sample(1.0 - average_decays(decays, updates), averages).to(averages.dtype)
    return averages + rates * (p - averages)
