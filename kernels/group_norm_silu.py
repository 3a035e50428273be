"""fm_fast::group_norm_silu on CUDA: y = mask silu(GroupNorm([x, second] + embedding) (1 + scale) + shift).

One program a few groups of a sample: statistics, then the result, of inputs held in registers or read again from the cache.
"""

# Device functions are written in Triton's own language.
# pyright: reportGeneralTypeIssues=false, reportInvalidTypeForm=false

import triton
import triton.language as tl
from torch import Tensor

from fm_fast.kernels import _launch
from fm_fast.kernels._norm import affine, batch_channel, dropped_out, dropped_tiles, group_sum, inside_tile, load_tiles, place_in, sigmoid
from fm_fast.kernels._norm_geometry import DROPOUT_STREAM, full, norm_plan, options_of, sizes_of, table, word_limit
from fm_fast.kernels._tile import sample_and_chunk, write


@triton.jit
def _moments_of_tiles(values, inside, position, positions, SPLIT: tl.constexpr, MASKED_POSITIONS: tl.constexpr):
    """Mean and sum of squared deviations of each channel of tiles that have all positions."""
    total = values[0]
    for k in tl.static_range(1, SPLIT):
        total += values[k]
    mean = tl.sum(total, axis=1) * (1.0 / tl.full((), positions, total.dtype))
    square = tl.zeros_like(total)
    for k in tl.static_range(SPLIT):
        d = values[k] - mean[:, None]
        if MASKED_POSITIONS:
            d = tl.where(inside_tile(inside, position + k, positions, MASKED_POSITIONS), d, 0.0)
        square += d * d
    return mean, tl.sum(square, axis=1)


@triton.jit
def _lane_counts(position, positions, POSITIONS: tl.constexpr, SPLIT: tl.constexpr, MASKED_POSITIONS: tl.constexpr, COMPUTE: tl.constexpr):
    """How many positions each lane [1, POSITIONS] meets on its walk."""
    if MASKED_POSITIONS:
        count = tl.zeros_like(position)
        for k in tl.static_range(SPLIT):
            count += (positions - position - k + (POSITIONS * SPLIT - 1)) // (POSITIONS * SPLIT)
        return count[None, :].to(COMPUTE)
    else:
        return tl.full((1, POSITIONS), positions // POSITIONS, COMPUTE)


@triton.jit
def _moments_of_walk(origin, total, square, count, positions):
    """The same from what the lanes of a tile met on their walk: the first value of each, and the sums of all distances to it.

    A lane's mean is no further from its origin than its own spread over few values allows, so that little cancels. Lanes are then combined
    by their means (Chan, Golub & LeVeque 1983).
    """
    distance = total * (1.0 / tl.maximum(count, 1.0))
    lane_mean = origin + distance
    mean = tl.sum(count * lane_mean, axis=1) * (1.0 / tl.full((), positions, origin.dtype))
    d = lane_mean - mean[:, None]
    return mean, tl.sum(square - total * distance + count * d * d, axis=1)


@triton.jit
def _normalised(value, coefficients, ACTIVATION: tl.constexpr):
    center, gain, offset = coefficients
    z = (value - center) * gain + offset
    if ACTIVATION:
        z *= sigmoid(z, ACTIVATION)
    return z


@triton.jit
def _write_result(y, values, dropped, place, position, positions, coefficients, dropout, SPLIT: tl.constexpr, MASKED: tl.constexpr,
                  MASKED_POSITIONS: tl.constexpr, ACTIVATION: tl.constexpr, DROPOUT: tl.constexpr):  # fmt: skip
    sample, channel, inside, _ = place
    for k in tl.static_range(SPLIT):
        z = dropped_out(_normalised(values[k], coefficients, ACTIVATION), dropped, k, dropout, DROPOUT)
        exists = inside_tile(inside, position + k, positions, MASKED_POSITIONS)
        write(place_in(y, sample, channel, position + k), z, exists, MASKED)


@triton.jit(do_not_specialize=["batch", "purpose", "limit"])
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
    limit,
    factor: tl.float32,
    ACTIVATION: tl.constexpr,  # bits of the data, 0 for none
    DROPOUT: tl.constexpr,
    EXPLICIT_IDS: tl.constexpr,
    COMPUTE: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
    HELD: tl.constexpr,
    SPLIT: tl.constexpr,
    MASKED_CHANNELS: tl.constexpr,
    MASKED_POSITIONS: tl.constexpr,
    WIDE: tl.constexpr,
):
    sample, program = sample_and_chunk()
    if sample >= batch:
        return
    sample = sample.to(tl.int64)
    MASKED: tl.constexpr = MASKED_CHANNELS or MASKED_POSITIONS
    lane = tl.arange(0, CHANNELS)
    channel = program * (GROUPS * WIDTH) + lane
    inside = (lane < GROUPS * WIDTH) & (channel < channels)
    position = tl.arange(0, POSITIONS) * SPLIT
    if WIDE:
        channel, position = channel.to(tl.int64), position.to(tl.int64)
    place, dropout = (sample, channel, inside, first), (key_ptr, purpose, limit, factor)
    values = load_tiles(x, second, place, position, positions, SPLIT if HELD else 1, MASKED, MASKED_POSITIONS, COMPUTE)
    if HELD:
        mean, spread = _moments_of_tiles(values, inside, position, positions, SPLIT, MASKED_POSITIONS)
    else:
        origin, total, square = values[0], tl.zeros((CHANNELS, POSITIONS), COMPUTE), tl.zeros((CHANNELS, POSITIONS), COMPUTE)
        start = 0
        while start < positions:
            met = load_tiles(x, second, place, start + position, positions, SPLIT, MASKED, MASKED_POSITIONS, COMPUTE)
            for k in tl.static_range(SPLIT):
                d = met[k] - origin
                if MASKED_POSITIONS:
                    d = tl.where(inside_tile(inside, start + position + k, positions, MASKED_POSITIONS), d, 0.0)
                total += d
                square += d * d
            start += POSITIONS * SPLIT
        count = _lane_counts(position, positions, POSITIONS, SPLIT, MASKED_POSITIONS, COMPUTE)
        mean, spread = _moments_of_walk(origin, total, square, count, positions)
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
    coefficients = ((group_mean - added)[:, None], (gain * rstd)[:, None], offset[:, None])
    if HELD:
        dropped = dropped_tiles(dropout, values[0], sample, channel, 0, positions, SPLIT, DROPOUT, EXPLICIT_IDS)
        _write_result(y, values, dropped, place, position, positions, coefficients, dropout, SPLIT, MASKED, MASKED_POSITIONS, ACTIVATION,
                      DROPOUT)  # fmt: skip
    else:
        start = 0
        while start < positions:
            met = load_tiles(x, second, place, start + position, positions, SPLIT, MASKED, MASKED_POSITIONS, COMPUTE)
            dropped = dropped_tiles(dropout, met[0], sample, channel, start, positions, SPLIT, DROPOUT, EXPLICIT_IDS)
            _write_result(y, met, dropped, place, start + position, positions, coefficients, dropout, SPLIT, MASKED, MASKED_POSITIONS,
                          ACTIVATION, DROPOUT)  # fmt: skip
            start += POSITIONS * SPLIT


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
    plan = norm_plan(x, [strides for _, strides in addressed], sizes[1], groups)  # type: ignore[misc]
    tables = [table(tensor) for tensor in (embedding, weight, bias, scale, shift)]
    numbers = (_launch.counter_purpose(DROPOUT_STREAM, index), eps, word_limit(dropout), 1.0 / (1.0 - dropout))
    drawn = key if dropout > 0.0 else None
    positional = (addressed[2], mean, rstd, addressed[0], addressed[1], *tables, drawn, *sizes, *numbers)
    _launch.start(group_norm_silu_kernel, plan, positional, **options_of(x, key, activation, dropout))
