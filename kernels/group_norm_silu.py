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
def _add_moments(x, exists, start, positions, count, mean, spread, POSITIONS: tl.constexpr):
    """Mean and sum of squared deviations of each channel, with those of a tile added (Chan, Golub & LeVeque 1983)."""
    more = tl.full((), tl.minimum(positions - start, POSITIONS), mean.dtype)
    tile_mean = tl.sum(x, axis=1) / more
    d = tl.where(exists, x - tile_mean[:, None], 0.0)
    total, distance = count + more, tile_mean - mean
    return mean + distance * (more / total), spread + tl.sum(d * d, axis=1) + distance * distance * (count * more / total)


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
    mean, spread = tl.zeros((CHANNELS,), COMPUTE), tl.zeros((CHANNELS,), COMPUTE)
    start = 0
    exists = inside_tile(inside, position, positions, MASKED_POSITIONS)
    value = load_inputs(x, second, sample, channel, position, first, exists, MASKED, COMPUTE)
    mean, spread = _add_moments(value, exists, start, positions, 0.0, mean, spread, POSITIONS)
    if not HELD:
        start += POSITIONS
        while start < positions:
            exists = inside_tile(inside, start + position, positions, MASKED_POSITIONS)
            value = load_inputs(x, second, sample, channel, start + position, first, exists, MASKED, COMPUTE)
            mean, spread = _add_moments(value, exists, start, positions, tl.full((), start, COMPUTE), mean, spread, POSITIONS)
            start += POSITIONS
    added = batch_channel(embedding, sample, channel, inside, MASKED_CHANNELS, COMPUTE)
    mean = tl.where(inside, mean + added, 0.0)
    group_mean = group_sum(mean, WIDTH, GROUPS) / WIDTH
    distance = tl.where(inside, mean - group_mean, 0.0)
    variance = group_sum(spread + distance * distance * positions, WIDTH, GROUPS) / (tl.full((), positions, COMPUTE) * WIDTH)
    rstd = 1.0 / tl.sqrt(variance + tl.full((), eps, COMPUTE))
    heads = inside & (lane % WIDTH == 0)
    tl.store(mean_ptr + sample * groups + channel // WIDTH, group_mean, mask=heads)
    tl.store(rstd_ptr + sample * groups + channel // WIDTH, rstd, mask=heads)
    gain, offset = affine(weight, bias, scale, shift, sample, channel, inside, MASKED_CHANNELS, COMPUTE)
    gain, origin = (gain * rstd)[:, None], (group_mean - added)[:, None]
    start = 0
    while start < positions:
        if not HELD:
            exists = inside_tile(inside, start + position, positions, MASKED_POSITIONS)
            value = load_inputs(x, second, sample, channel, start + position, first, exists, MASKED, COMPUTE)
        z = (value - origin) * gain + offset[:, None]
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
