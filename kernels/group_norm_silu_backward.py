"""fm_fast::group_norm_silu_backward on CUDA.

With xhat = (x + embedding - mean) rstd, z = xhat gain + offset and dz = mask silu'(z) dy:
dx = rstd (gain dz - mean(gain dz) - xhat mean(gain dz xhat)), means over the group. The sums of dz, dz xhat and dx over the positions
are left for a second kernel, which makes the parameters' gradients of them, over the samples in order.
"""

# Device functions are written in Triton's own language.
# pyright: reportGeneralTypeIssues=false, reportInvalidTypeForm=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from fm_fast.kernels import _launch
from fm_fast.kernels._norm import (
    affine,
    batch_channel,
    dropped_out,
    dropped_tiles,
    group_sum,
    inside_tile,
    load_tiles,
    per_channel,
    place_in,
    sigmoid,
)
from fm_fast.kernels._norm_geometry import (
    CHANNELS_LAST_CHANNELS,
    DROPOUT_STREAM,
    NormPlan,
    full,
    norm_plan,
    options_of,
    sizes_of,
    table,
    word_limit,
)
from fm_fast.kernels._tile import sample_and_chunk, write

REGISTERS = 128  # at most of a thread, where the compiler would take a few more and a multiprocessor hold three programs instead of four
NOTES = 32  # bits of a number: tiles whose dropout a program remembers instead of drawing it again
PARAMETER_TILE = (64, 16)  # samples, channels: a program walks over the samples, so few rounds and many programs


@triton.jit
def _silu_derivative(d, dy, gain, offset, ACTIVATION: tl.constexpr):
    """silu'(z) dy with z = d gain + offset."""
    if ACTIVATION:
        z = d * gain + offset
        s = sigmoid(z, ACTIVATION)
        dy *= s + z * s * (1.0 - s)
    return dy


@triton.jit
def _sources(x, second, grad_y, place, position, positions, SPLIT: tl.constexpr, MASKED: tl.constexpr, MASKED_POSITIONS: tl.constexpr,
             COMPUTE: tl.constexpr):  # fmt: skip
    """x and dy of the SPLIT tiles at ``position``."""
    values = load_tiles(x, second, place, position, positions, SPLIT, MASKED, MASKED_POSITIONS, COMPUTE)
    return values, load_tiles(grad_y, (None, 0), place, position, positions, SPLIT, MASKED, MASKED_POSITIONS, COMPUTE)


@triton.jit
def _derivative(sources, dropped, k, coefficients, dropout, ACTIVATION: tl.constexpr, DROPOUT: tl.constexpr):
    """(x + embedding - mean, dz) of tile k; coefficients are (origin, gain, offset) of z."""
    origin, gain, offset = coefficients
    d, dy = sources[0][k] - origin, dropped_out(sources[1][k], dropped, k, dropout, DROPOUT)
    return d, _silu_derivative(d, dy, gain, offset, ACTIVATION)


@triton.jit
def _add_sums(sums, sources, dropped, coefficients, dropout, SPLIT: tl.constexpr, ACTIVATION: tl.constexpr, DROPOUT: tl.constexpr):
    """The sums of dz and of dz (x + embedding - mean), lane by lane, with those of the tiles added."""
    sum_dz, sum_product = sums
    for k in tl.static_range(SPLIT):
        d, dz = _derivative(sources, dropped, k, coefficients, dropout, ACTIVATION, DROPOUT)
        sum_dz += dz
        sum_product += dz * d
    return sum_dz, sum_product


@triton.jit
def _noted(notes, dropped, bit, SPLIT: tl.constexpr):
    """A bit an element of each of the SPLIT tiles, from ``bit`` on."""
    for k in tl.static_range(SPLIT):
        notes |= tl.where(dropped[k], 1 << (bit + k), 0)
    return notes


@triton.jit
def _recalled(notes, bit, SPLIT: tl.constexpr):
    """What :func:`_noted` noted."""
    found = ((notes & (1 << bit)) != 0,)
    for k in tl.static_range(1, SPLIT):
        found += ((notes & (1 << (bit + k))) != 0,)
    return found


@triton.jit
def _write_tile(gradients, second, place, position, positions, dx, MASKED: tl.constexpr, MASKED_POSITIONS: tl.constexpr):
    """dx, zero where nothing exists, having stored it."""
    sample, channel, inside, first = place
    exists = inside_tile(inside, position, positions, MASKED_POSITIONS)
    if second[0] is None:
        write(place_in(gradients[0], sample, channel, position), dx, exists, MASKED)
    else:
        in_first = (channel < first)[:, None]
        write(place_in(gradients[0], sample, channel, position), dx, exists & in_first, True)
        write(place_in(gradients[1], sample, channel - first, position), dx, exists & (channel >= first)[:, None], True)
    return tl.where(exists, dx, 0.0) if MASKED_POSITIONS else dx


@triton.jit
def _write_gradients(gradients, second, sources, dropped, place, position, positions, coefficients, slopes, dropout, SPLIT: tl.constexpr,
                     MASKED: tl.constexpr, MASKED_POSITIONS: tl.constexpr, ACTIVATION: tl.constexpr,
                     DROPOUT: tl.constexpr):  # fmt: skip
    """Store dx = slopes[0] dz + slopes[1] (x + embedding - mean) + slopes[2] of the tiles; their sum, lane by lane."""
    total = tl.zeros_like(sources[0][0])
    for k in tl.static_range(SPLIT):
        d, dz = _derivative(sources, dropped, k, coefficients, dropout, ACTIVATION, DROPOUT)
        dx = dz * slopes[0] + (d * slopes[1] + slopes[2])
        total += _write_tile(gradients, second, place, position + k, positions, dx, MASKED, MASKED_POSITIONS)
    return total


@triton.jit(do_not_specialize=["batch", "purpose", "limit"])
def group_norm_silu_backward_kernel(
    grad_x,  # (pointer, strides) [B, C1, P]; the same for the others
    grad_second,  # [B, C - C1, P]
    grad_y,  # [B, C, P]
    sums_ptr,  # [B, 3, C]
    x,
    second,
    embedding,
    weight,
    bias,
    scale,
    shift,
    mean_ptr,  # [B, groups]
    rstd_ptr,
    key_ptr,
    batch,
    channels,
    first,
    positions,
    groups,
    purpose,
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
    NOTED: tl.constexpr,
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
    added = batch_channel(embedding, sample, channel, inside, MASKED_CHANNELS, COMPUTE)
    statistic = sample * groups + channel // WIDTH
    rstd = tl.load(rstd_ptr + statistic, mask=inside, other=0.0)
    origin = (tl.load(mean_ptr + statistic, mask=inside, other=0.0) - added)[:, None]
    gain, offset = affine(weight, bias, scale, shift, sample, channel, inside, MASKED_CHANNELS, COMPUTE)
    z_gain = (gain * rstd)[:, None]
    place, coefficients, dropout = (sample, channel, inside, first), (origin, z_gain, offset[:, None]), (key_ptr, purpose, limit, factor)
    nothing = tl.zeros((CHANNELS, POSITIONS), COMPUTE)
    sums, notes = (nothing, nothing), tl.zeros((CHANNELS, POSITIONS), tl.int32)
    if HELD:
        sources = _sources(x, second, grad_y, place, position, positions, SPLIT, MASKED, MASKED_POSITIONS, COMPUTE)
        dropped = dropped_tiles(dropout, sources[0][0], sample, channel, 0, positions, SPLIT, DROPOUT, EXPLICIT_IDS)
        sums = _add_sums(sums, sources, dropped, coefficients, dropout, SPLIT, ACTIVATION, DROPOUT)
    else:
        start = 0
        while start < positions:
            met = _sources(x, second, grad_y, place, start + position, positions, SPLIT, MASKED, MASKED_POSITIONS, COMPUTE)
            drawn = dropped_tiles(dropout, met[0][0], sample, channel, start, positions, SPLIT, DROPOUT, EXPLICIT_IDS)
            if NOTED:
                notes = _noted(notes, drawn, start // POSITIONS, SPLIT)
            sums = _add_sums(sums, met, drawn, coefficients, dropout, SPLIT, ACTIVATION, DROPOUT)
            start += POSITIONS * SPLIT
    sum_dz, sum_product = tl.sum(sums[0], axis=1), tl.sum(sums[1], axis=1) * rstd
    share = -rstd * (1.0 / (tl.full((), positions, COMPUTE) * WIDTH))
    level = (share * group_sum(gain * sum_dz, WIDTH, GROUPS))[:, None]
    slope = (share * rstd * group_sum(gain * sum_product, WIDTH, GROUPS))[:, None]
    gradients, slopes, total = (grad_x, grad_second), (z_gain, slope, level), nothing
    if HELD:
        total = _write_gradients(gradients, second, sources, dropped, place, position, positions, coefficients, slopes, dropout, SPLIT,
                                 MASKED, MASKED_POSITIONS, ACTIVATION, DROPOUT)  # fmt: skip
    else:
        start = 0
        while start < positions:
            met = _sources(x, second, grad_y, place, start + position, positions, SPLIT, MASKED, MASKED_POSITIONS, COMPUTE)
            if NOTED:
                drawn = _recalled(notes, start // POSITIONS, SPLIT)
            else:
                drawn = dropped_tiles(dropout, met[0][0], sample, channel, start, positions, SPLIT, DROPOUT, EXPLICIT_IDS)
            total += _write_gradients(gradients, second, met, drawn, place, start + position, positions, coefficients, slopes, dropout,
                                      SPLIT, MASKED, MASKED_POSITIONS, ACTIVATION, DROPOUT)  # fmt: skip
            start += POSITIONS * SPLIT
    row = sums_ptr + sample * 3 * channels + channel
    tl.store(row, sum_dz, mask=inside)
    tl.store(row + channels, sum_product, mask=inside)
    if embedding[0] is not None:
        tl.store(row + 2 * channels, tl.sum(total, axis=1), mask=inside)


@triton.jit(do_not_specialize=["batch"])
def parameter_gradients_kernel(
    grad_embedding,  # (pointer, strides) [B, C]
    grad_weight,  # [C]
    grad_bias,
    grad_scale,  # [B, C]
    grad_shift,
    sums_ptr,  # [B, 3, C]
    weight,
    bias,
    scale,
    batch,
    channels,
    COMPUTE: tl.constexpr,
    SAMPLES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """z = (xhat weight + bias) (1 + scale) + shift."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    weights = per_channel(weight[0], weight[1][0], channel, inside, True, COMPUTE)[None, :]
    biases = per_channel(bias[0], bias[1][0], channel, inside, True, COMPUTE)[None, :]
    weight_sum, bias_sum = tl.zeros((SAMPLES, CHANNELS), COMPUTE), tl.zeros((SAMPLES, CHANNELS), COMPUTE)
    start = 0
    while start < batch:
        sample = (start + tl.arange(0, SAMPLES)).to(tl.int64)[:, None]
        exists = (sample < batch) & inside[None, :]
        row = sums_ptr + sample * 3 * channels + channel[None, :]
        dz = tl.load(row, mask=exists, other=0.0)
        product = tl.load(row + channels, mask=exists, other=0.0)
        factor = tl.full((SAMPLES, CHANNELS), 1.0, COMPUTE)
        if scale[0] is not None:
            factor += tl.load(scale[0] + sample * scale[1][0] + channel[None, :] * scale[1][1], mask=exists, other=0.0).to(COMPUTE)
            write(grad_scale[0] + sample * grad_scale[1][0] + channel[None, :] * grad_scale[1][1], weights * product + biases * dz, exists,
                  True)  # fmt: skip
        if grad_shift[0] is not None:
            write(grad_shift[0] + sample * grad_shift[1][0] + channel[None, :] * grad_shift[1][1], dz, exists, True)
        if grad_embedding[0] is not None:
            dx = tl.load(row + 2 * channels, mask=exists, other=0.0)
            write(grad_embedding[0] + sample * grad_embedding[1][0] + channel[None, :] * grad_embedding[1][1], dx, exists, True)
        weight_sum += factor * product
        bias_sum += factor * dz
        start += SAMPLES
    write(grad_weight[0] + channel * grad_weight[1][0], tl.sum(weight_sum, axis=0), inside, True)
    write(grad_bias[0] + channel * grad_bias[1][0], tl.sum(bias_sum, axis=0), inside, True)


def _registers(x: Tensor, plan: NormPlan, extra: tuple[Tensor, ...], dropout: float) -> dict[str, int]:
    """The limit of registers of a launch, where it sends none to memory: without dropout, ``extra`` tensors and groups of odd widths.

    Nor where few programs have fewer channels: a multiprocessor then holds no second one.
    """
    plain = dropout == 0.0 and all(tensor.numel() == 0 for tensor in extra) and not plan.masked_channels
    plain = plain and plan.channels >= CHANNELS_LAST_CHANNELS
    fits = plain and x.element_size() == 2 and plan.split > 1 and not plan.held
    return _launch.register_limit(REGISTERS) if fits else {}


def launch(
    grad_x: Tensor,
    grad_second: Tensor,
    grad_embedding: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_scale: Tensor,
    grad_shift: Tensor,
    grad_y: Tensor,
    x: Tensor,
    second: Tensor,
    embedding: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor,
    rstd: Tensor,
    key: Tensor,
    groups: int,
    activation: bool,
    dropout: float,
    index: int,
) -> None:
    """Run ``fm_fast::group_norm_silu_backward``."""
    sizes = sizes_of(x, second, groups)
    batch, channels = sizes[:2]
    if grad_y.numel() == 0:
        for gradient in (grad_embedding, grad_weight, grad_bias, grad_scale, grad_shift):
            gradient.zero_()
        return
    names = ("x", "second", "grad_x", "grad_second", "grad_y")
    addressed = [full(name, tensor) for name, tensor in zip(names, (x, second, grad_x, grad_second, grad_y), strict=True)]
    plan = norm_plan(x, [strides for _, strides in addressed], channels, groups)  # type: ignore[misc]
    embedding_, weight_, bias_, scale_, shift_ = (table(tensor) for tensor in (embedding, weight, bias, scale, shift))
    sums = torch.empty(batch, 3, channels, dtype=mean.dtype, device=x.device)
    numbers = (_launch.counter_purpose(DROPOUT_STREAM, index), word_limit(dropout), 1.0 / (1.0 - dropout))
    inputs = (addressed[0], addressed[1], embedding_, weight_, bias_, scale_, shift_)
    positional = (*addressed[2:], sums, *inputs, mean, rstd, key if dropout > 0.0 else None, *sizes, *numbers)
    options = options_of(x, key, activation, dropout) | {"NOTED": dropout > 0.0 and plan.tiles <= NOTES}
    options |= _registers(x, plan, (second, embedding), dropout)
    _launch.start(group_norm_silu_backward_kernel, plan, positional, **options)
    gradients = [table(tensor) for tensor in (grad_embedding, grad_weight, grad_bias, grad_scale, grad_shift)]
    samples, width = PARAMETER_TILE
    positional, grid = (*gradients, sums, weight_, bias_, scale_, batch, channels), (-(-channels // width),)
    tile = {"COMPUTE": _launch.compute_dtype(x), "SAMPLES": samples, "CHANNELS": width}
    _launch.launch(parameter_gradients_kernel, grid, x.device, positional, warps=4, **tile)
