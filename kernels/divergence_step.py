"""fm_fast::divergence_step on CUDA: z . (J^T z) of each probe and sample (Hutchinson's estimate of the divergence, paper equation 34).

The probes z are drawn again, not read. Each program writes one partial sum; a second kernel adds those of a sample in float64 in a fixed
order, so the estimate is bitwise repeatable. After the last probe a third adds mean and variance to the sums of the solve.
"""

# Device functions are written in Triton's own language.
# pyright: reportGeneralTypeIssues=false, reportInvalidTypeForm=false, reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from fm_fast.kernels import _launch
from fm_fast.kernels._combine import combine, partials
from fm_fast.kernels._philox import NORMAL, numbers, read_key
from fm_fast.kernels._probes import check_numbers, parities, place_signs, probe_purpose, sign_bits, sign_plan, sign_words
from fm_fast.kernels._tile import offset, place, read, sample_and_chunk

SIGNS, NORMALS = 0, 1
REGISTERS_OF_ONE_TILE = 80  # a thread, at most, for 32 numbers with masks; in a loop over tiles the compiler would load some late
FINISH_SAMPLES, MOST_GROUPS = 32, 32  # a tile of the last kernel


@triton.jit
def _turned(g, bits):
    """g in the compute dtype, negated where the top bit is set."""
    if g.dtype == tl.float64:
        return (g.to(tl.uint64, bitcast=True) ^ (bits.to(tl.uint64) << 32)).to(tl.float64, bitcast=True)
    else:
        return (g.to(tl.float32).to(tl.uint32, bitcast=True) ^ bits).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["batch", "probes", "index", "first"])
def sign_dots_kernel(
    partial_ptr,  # [probes, B, programs] float64
    g_ptr,  # [probes, B, C, P]
    key_ptr,  # [3] or [2 + B] int64
    parity_ptr,  # none, or [probes, C, ceil(P / 128), 4] int32
    g_batch,
    g_channel,
    g_position,
    batch,
    channels,
    positions,
    g_probe,
    probes,
    index,
    first,
    share,
    STRUCTURED: tl.constexpr,
    EXPLICIT_IDS: tl.constexpr,
    COMPUTE: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    TILES: tl.constexpr,
    CHANNEL_FAST: tl.constexpr,
    MASKED: tl.constexpr,
    WIDE: tl.constexpr,
):
    entry, chunk = sample_and_chunk()
    if entry >= probes * batch:
        return
    probe, sample = entry // batch, (entry % batch).to(tl.int64)
    seed, step, identity = read_key(key_ptr, sample, EXPLICIT_IDS)
    purpose = probe_purpose(index, first, share, probe)
    probe = probe.to(tl.int64)
    if STRUCTURED:
        parity_ptr += probe * (channels * ((positions + 127) // 128) * 4)
    g_ptr += probe * g_probe + sample * g_batch
    # COMPUTE within the 128 elements of a row, float64 beyond.
    sums = tl.zeros((ROWS,), tl.float64)
    for i in range(TILES):
        block, channel, start, inside = place_signs(chunk * TILES + i, channels, positions, ROWS, CHANNEL_FAST, WIDE)
        a, b, c, d = sign_words(parity_ptr, block, inside, identity, step, seed, purpose, STRUCTURED)
        total = tl.zeros((ROWS, LANES), COMPUTE)
        for j in tl.static_range(0, 128, LANES):
            position = start + j + tl.arange(0, LANES)[None, :]
            g = read(g_ptr + channel * g_channel + position * g_position, inside & (position < positions), MASKED)
            total += _turned(g, sign_bits(a, b, c, d, j, LANES))
        sums += tl.sum(total, axis=1).to(tl.float64)
    tl.store(partial_ptr + entry.to(tl.int64) * tl.num_programs(0) + chunk, tl.sum(sums))


@triton.jit(do_not_specialize=["batch", "probes", "index", "first"])
def normal_dots_kernel(
    partial_ptr,  # [probes, B, programs] float64
    g_ptr,  # [probes, B, C, P]
    key_ptr,  # [3] or [2 + B] int64
    g_batch,
    g_channel,
    g_position,
    batch,
    channels,
    positions,
    g_probe,
    probes,
    index,
    first,
    share,
    EXPLICIT_IDS: tl.constexpr,
    COMPUTE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    TILES: tl.constexpr,
    FLAT: tl.constexpr,
    CHANNEL_FAST: tl.constexpr,
    MASKED: tl.constexpr,
    WIDE: tl.constexpr,
):
    entry, chunk = sample_and_chunk()
    if entry >= probes * batch:
        return
    probe, sample = entry // batch, (entry % batch).to(tl.int64)
    seed, step, identity = read_key(key_ptr, sample, EXPLICIT_IDS)
    purpose = probe_purpose(index, first, share, probe)
    probe = probe.to(tl.int64)
    g_ptr += probe * g_probe + sample * g_batch
    total = tl.zeros((), tl.float64)
    for i in range(TILES):
        block, channel, position, inside = place(chunk * TILES + i, channels, positions, ROWS, BLOCKS, FLAT, CHANNEL_FAST, WIDE)
        # The model was given probes of g's dtype.
        z = numbers(block, identity, step, seed, purpose, NORMAL, BLOCKS).to(g_ptr.dtype.element_ty)
        g = read(g_ptr + offset(channel, position, g_channel, g_position, FLAT), inside, MASKED)
        total += tl.sum(z.to(COMPUTE) * g.to(COMPUTE)).to(tl.float64)
    tl.store(partial_ptr + entry.to(tl.int64) * tl.num_programs(0) + chunk, total)


@triton.jit
def _group_means(dots_ptr, start, groups, size, sample, batch, GROUPS: tl.constexpr):
    """Means [GROUPS, SAMPLES] of groups start, start + 1, ..., zero beyond the last."""
    group = start + tl.arange(0, GROUPS)[:, None]
    inside = (group < groups) & (sample < batch)
    pointer = dots_ptr + group.to(tl.int64) * size * batch + sample
    total = tl.zeros((GROUPS, sample.shape[1]), tl.float64)
    member = 0
    while member < size:
        total += tl.load(pointer, mask=inside, other=0.0)
        pointer += batch
        member += 1
    return total / size


@triton.jit(do_not_specialize=["batch", "groups", "size"])
def finish_kernel(
    sums_ptr,  # [2, B] float64
    dots_ptr,  # [groups, size, B] float64
    batch,
    groups,
    size,
    bias: tl.float64,
    factor: tl.float64,
    GROUPS: tl.constexpr,
    SAMPLES: tl.constexpr,
):
    """sums[0] += bias + factor mean; sums[1] += factor^2 (variance of that mean), from the spread of independent groups."""
    sample = tl.program_id(0) * SAMPLES + tl.arange(0, SAMPLES)[None, :]
    total = tl.zeros((GROUPS, SAMPLES), tl.float64)
    start = 0
    while start < groups:
        total += _group_means(dots_ptr, start, groups, size, sample, batch, GROUPS)
        start += GROUPS
    mean = tl.sum(total, axis=0, keep_dims=True) / groups
    tl.store(sums_ptr + sample, tl.load(sums_ptr + sample, mask=sample < batch) + bias + factor * mean, mask=sample < batch)
    if groups >= 2:
        squares = tl.zeros((GROUPS, SAMPLES), tl.float64)
        start = 0
        while start < groups:
            difference = _group_means(dots_ptr, start, groups, size, sample, batch, GROUPS) - mean
            squares += tl.where(start + tl.arange(0, GROUPS)[:, None] < groups, difference * difference, 0.0)
            start += GROUPS
        pairs = (groups - 1).to(tl.float64) * groups
        variance = tl.sum(squares, axis=0, keep_dims=True) / pairs
        place = sums_ptr + batch + sample
        tl.store(place, tl.load(place, mask=sample < batch) + factor * factor * variance, mask=sample < batch)


def _check(sums: Tensor, dots: Tensor, g: Tensor, codes: Tensor, kind: int, first: int, groups: int) -> None:
    batch = g.shape[1]
    for name, tensor, rows in (("sums", sums, 2), ("dots", dots, dots.shape[0])):
        if tensor.shape != (rows, batch) or tensor.dtype != torch.float64 or not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous float64 [{rows}, {batch}], got {tensor.dtype} {tuple(tensor.shape)}")
    if kind not in (SIGNS, NORMALS) or (kind == NORMALS and codes.numel()):
        raise ValueError(f"kind must be {SIGNS}, or {NORMALS} without codes, got {kind}")
    if groups < 1 or dots.shape[0] % groups:
        raise ValueError(f"groups must divide the number of probes, {dots.shape[0]}, got {groups}")
    if first + g.shape[0] > dots.shape[0]:
        raise ValueError(f"dots must have a row for each of {first + g.shape[0]} probes, got {dots.shape[0]}")


def _write_dots(dots: Tensor, g: Tensor, key: Tensor, codes: Tensor, rows: Tensor, kind: int, index: int, first: int, share: int) -> None:
    """Fill dots [k, B] of the probes of this call."""
    compute = _launch.compute_dtype(g)
    options = {"EXPLICIT_IDS": _launch.explicit_ids(key, g.shape[1]), "COMPUTE": compute}
    counters = (g.stride(0), g.shape[0], index, first, share)
    if kind == NORMALS:
        plan = _launch.plan(g[0], probes=g.shape[0], g=g[0])
        partial = partials(dots, plan.programs)
        options |= _launch.early_loads(plan.flat, compute)
        _launch.run(normal_dots_kernel, plan, (partial, g, key), counters, **options)
    else:
        signs = sign_plan("g", g)
        partial = partials(dots, signs.programs)
        tensors = (partial, g, key, parities(signs, codes, rows, first))
        registers = REGISTERS_OF_ONE_TILE if signs.tiles == 1 else _launch.REGISTERS
        options |= {"STRUCTURED": codes.numel() > 0} | _launch.early_loads(signs.aligned, compute, registers)
        _launch.run(sign_dots_kernel, signs, tensors, counters, **options)
    if partial is not dots:
        combine(dots, partial, 1.0)


def _finish(sums: Tensor, dots: Tensor, groups: int, bias: float, factor: float) -> None:
    probes, batch = dots.shape
    tile = min(MOST_GROUPS, _launch.power_of_two(groups))
    positional, grid = (sums, dots, batch, groups, probes // groups, bias, factor), (-(-batch // FINISH_SAMPLES),)
    _launch.launch(finish_kernel, grid, dots.device, positional, warps=max(1, tile // 8), GROUPS=tile, SAMPLES=FINISH_SAMPLES)


def launch(
    sums: Tensor,
    dots: Tensor,
    g: Tensor,
    key: Tensor,
    codes: Tensor,
    rows: Tensor,
    kind: int,
    index: int,
    first: int,
    share: int,
    groups: int,
    bias: float,
    factor: float,
) -> None:
    """Run ``fm_fast::divergence_step``: fill the rows of dots of this call's probes, and with the last one add to sums."""
    _check(sums, dots, g, codes, kind, first, groups)
    end = first + g.shape[0]
    if dots.shape[1] == 0:
        return
    if g.numel():
        check_numbers(g, codes, rows, index, first, share)
        _write_dots(dots[first:end], g, key, codes, rows, kind, index, first, share)
    else:
        dots[first:end].zero_()
    if end == dots.shape[0]:
        _finish(sums, dots, groups, bias, factor)
