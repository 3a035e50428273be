"""fm_fast::group_norm_silu on CUDA: y = mask silu(GroupNorm([x, second] + embedding) (1 + scale) + shift).

One program a few groups of a sample: statistics, then the result, of inputs held in registers or read again from the cache.
"""

# Device functions are written in Triton's own language.
# pyright: reportGeneralTypeIssues=false, reportInvalidTypeForm=false

import triton
import triton.language as tl
from torch import Tensor

from fm_fast.kernels import _launch
from fm_fast.kernels._norm import (
    DROPOUT_STREAM,
    HELD_TILE,
    affine,
    batch_channel,
    dropout_factor,
    full,
    group_sum,
    inside_tile,
    load_inputs,
    norm_plan,
    options_of,
    place_in,
    sigmoid,
    sizes_of,
    start_norm,
    table,
)
from fm_fast.kernels._tile import sample_and_chunk, write


@triton.jit
def _moments_of_tile(value, exists, positions, MASKED_POSITIONS: tl.constexpr):
    """Mean and sum of squared deviations of each channel of one tile that has all positions."""
    mean = tl.sum(value, axis=1) * (1.0 / tl.full((), positions, value.dtype))
    d = value - mean[:, None]
    if MASKED_POSITIONS:
        d = tl.where(exists, d, 0.0)
    return mean, tl.sum(d * d, axis=1)


@triton.jit
def _moments_of_walk(origin, total, square, positions, POSITIONS: tl.constexpr):
    """The same from what the lanes of a tile met on their walk: the first value of each, and the sums of the others' distances to it.

    A lane's mean is no further from its origin than its own spread over few values allows, so that little cancels. Lanes are then combined
    by their means (Chan, Golub & LeVeque 1983).
    """
    count = ((positions + (POSITIONS - 1) - tl.arange(0, POSITIONS)) // POSITIONS)[None, :].to(origin.dtype)
    distance = total * (1.0 / count)
    lane_mean = origin + distance
    mean = tl.sum(count * lane_mean, axis=1) * (1.0 / tl.full((), positions, origin.dtype))
    d = lane_mean - mean[:, None]
    return mean, tl.sum(square - total * distance + count * d * d, axis=1)


@triton.jit(do_not_specialize=["batch", "purpose"])
def group_norm_silu_kernel(
    y,  # (pointer, strides) [B, C, P]; the same for the others
    mean_ptr,  # [B, groups]
    rstd_ptr,
    x,  # [B, C1, P]
    second,  # [B, C - C1, P]
    embedding,  # [B, C]
    weight,  # [C]
    bias,  # [C]
    scale,  # [B, C]
    shift,  # [B, C]
    key_ptr,
    batch,
    channels,
    first,
    positions,
    groups,
    purpose,
    eps: tl.float64,
    probability: tl.float32,
    factor: tl.float32,
    ACTIVATION: tl.constexpr,
    DROPOUT: tl.constexpr,
    EXPLICIT_IDS: tl.constexpr,
    COMPUTE: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
    HELD: tl.constexpr,
    MASKED_CHANNELS: tl.constexpr,
    MASKED_POSITIONS: tl.constexpr,
    WIDE: tl.constexpr,
):
    sample, program = sample_and_chunk(batch)
    if sample >= batch:
        return
    sample = sample.to(tl.int64)
    MASKED: tl.constexpr = MASKED_CHANNELS or MASKED_POSITIONS
    lane = tl.arange(0, CHANNELS)
    channel = program * (GROUPS * WIDTH) + lane
    inside = (lane < GROUPS * WIDTH) & (channel < channels)
    position = tl.arange(0, POSITIONS)
    if WIDE:
        channel, position = channel.to(tl.int64), position.to(tl.int64)
    exists = inside_tile(inside, position, positions, MASKED_POSITIONS)
    value = load_inputs(x, second, sample, channel, position, first, exists, MASKED, COMPUTE)
    if HELD:
        mean, spread = _moments_of_tile(value, exists, positions, MASKED_POSITIONS)
    else:
        origin, total, square = value, tl.zeros((CHANNELS, POSITIONS), COMPUTE), tl.zeros((CHANNELS, POSITIONS), COMPUTE)
        start = POSITIONS
        while start < positions:
            exists = inside_tile(inside, start + position, positions, MASKED_POSITIONS)
            d = load_inputs(x, second, sample, channel, start + position, first, exists, MASKED, COMPUTE) - origin
            if MASKED_POSITIONS:
                d = tl.where(exists, d, 0.0)
            total += d
            square += d * d
            start += POSITIONS
        mean, spread = _moments_of_walk(origin, total, square, positions, POSITIONS)
    added = batch_channel(embedding, sample, channel, inside, MASKED_CHANNELS, COMPUTE)
    mean = tl.where(inside, mean + added, 0.0)
    group_mean = group_sum(mean, WIDTH, GROUPS) * (1.0 / WIDTH)
    distance = tl.where(inside, mean - group_mean, 0.0)
    size = tl.full((), positions, COMPUTE)
    variance = group_sum(spread + distance * distance * size, WIDTH, GROUPS) * (1.0 / (size * WIDTH))
    rstd = tl.rsqrt(variance + tl.full((), eps, COMPUTE))
    heads = inside & (lane % WIDTH == 0)
    tl.store(mean_ptr + sample * groups + channel // WIDTH, group_mean, mask=heads)
    tl.store(rstd_ptr + sample * groups + channel // WIDTH, rstd, mask=heads)
    gain, offset = affine(weight, bias, scale, shift, sample, channel, inside, MASKED_CHANNELS, COMPUTE)
    gain, center = (gain * rstd)[:, None], (group_mean - added)[:, None]
    start = 0
    while start < positions:
        if not HELD:
            exists = inside_tile(inside, start + position, positions, MASKED_POSITIONS)
            value = load_inputs(x, second, sample, channel, start + position, first, exists, MASKED, COMPUTE)
        z = (value - center) * gain + offset[:, None]
        if ACTIVATION:
            z *= sigmoid(z)
        if DROPOUT:
            z *= dropout_factor(key_ptr, sample, channel, start, positions, purpose, probability, factor, POSITIONS, EXPLICIT_IDS)
        write(place_in(y, sample, channel, start + position), z, exists, MASKED)
        start += POSITIONS


def launch(
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
    x: Tensor,
    second: Tensor,
    embedding: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor,
    shift: Tensor,
    key: Tensor,
    groups: int,
    eps: float,
    activation: bool,
    dropout: float,
    index: int,
) -> None:
    """Run ``fm_fast::group_norm_silu``."""
    sizes = sizes_of(x, second, groups)
    if y.numel() == 0:
        return
    addressed = [full(name, tensor) for name, tensor in (("x", x), ("second", second), ("y", y))]
    plan = norm_plan(x, [strides for _, strides in addressed], sizes[1], groups, HELD_TILE)  # type: ignore[misc]
    tables = [table(tensor) for tensor in (embedding, weight, bias, scale, shift)]
    numbers = (_launch.counter_purpose(DROPOUT_STREAM, index), eps, dropout, 1.0 / (1.0 - dropout))
    drawn = key if dropout > 0.0 else None
    positional = (addressed[2], mean, rstd, addressed[0], addressed[1], *tables, drawn, *sizes, *numbers)
    start_norm(group_norm_silu_kernel, plan, positional, options_of(x, key, activation, dropout))
