"""fm_fast::adamw_ema on CUDA: AdamW (Loshchilov & Hutter 2019), moving averages and the 16-bit copy of many tensors in one launch.

g' = c g with c = min(1, largest norm / norm); m += (1 - b1)(g' - m); v = b2 v + (1 - b2) g'^2;
p = (1 - lr wd) p - lr / (1 - b1^n) m / (sqrt(v) / sqrt(1 - b2^n) + eps), n being the updates that p had a gradient for, this one included;
average += (1 - decay)(p - average).

Addresses and sizes of the tensors are a table in device memory, one row a tensor; a program works on one chunk of one of them. Another
program before them turns step number, settings and norm into the numbers above, and says whether the step is to be skipped. The norm is
a sum of squares in float64 in a fixed order, so it is bitwise repeatable.
"""

# Device functions are written in Triton's own language.
# pyright: reportGeneralTypeIssues=false, reportInvalidTypeForm=false

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fm_fast import reference
from fm_fast.kernels import _launch
from fm_fast.kernels._combine import combine
from fm_fast.kernels._table import (
    COPY,
    GRADIENT,
    INDEX,
    OFFSET,
    VALUE,
    Batch,
    Kind,
    Memories,
    Memory,
    Row,
    by_kind,
    check_alike,
    check_gapless,
    chunk_of,
    members,
    memories,
    pointer_of,
    tables,
    type_of,
)
from fm_fast.kernels._tile import read, read_numbers, write

ROWS, LANES, TILES = 256, 4, 4  # of a chunk: rows of a tile, elements of a row (128 bits of float32), tiles
CHUNK = ROWS * LANES * TILES
WARPS = 4
SETTINGS, DECAYS, NUMBERS, OWN = tl.constexpr(6), tl.constexpr(4), tl.constexpr(8), tl.constexpr(2)
MOST_PARAMETERS = 1024  # whose numbers the one program of numbers_kernel makes at once: more take rounds, which wait for memory each
MOST_NUMBER_WARPS = 16
NORM_EPSILON = tl.constexpr(reference.NORM_EPSILON)


@triton.jit
def _squares(g_ptr, first, count, ROWS: tl.constexpr, LANES: tl.constexpr, TILES: tl.constexpr, MASKED: tl.constexpr):
    """The sum of squares of a chunk, in float64, in which the square of a float32 is exact."""
    total = tl.zeros((ROWS,), tl.float64)
    for i in range(TILES):
        place = first + (i * ROWS + tl.arange(0, ROWS)[:, None]) * LANES + tl.arange(0, LANES)[None, :]
        g = read(g_ptr + place, place < count, MASKED).to(tl.float64)
        total += tl.sum(g * g, 1)  # within a thread, which then holds 2 sums and not 8
    return tl.sum(total)


@triton.jit
def norm_kernel(
    partial_ptr,  # [programs] float64
    table_ptr,  # [tensors, 6] int64
    chunks_ptr,  # [programs, 2] int64
    G_TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    TILES: tl.constexpr,
):
    row_ptr, first, count = chunk_of(chunks_ptr, table_ptr)
    g_ptr = pointer_of(row_ptr, GRADIENT, G_TYPE, ALIGNED)
    if first + ROWS * LANES * TILES <= count:
        tl.store(partial_ptr + tl.program_id(0), _squares(g_ptr, first, count, ROWS, LANES, TILES, False))
    else:
        tl.store(partial_ptr + tl.program_id(0), _squares(g_ptr, first, count, ROWS, LANES, TILES, True))


@triton.jit
def _power(base, exponent):
    """base^exponent for base >= 0 in float64, 1 for exponent 0."""
    return tl.where(exponent == 0.0, 1.0, tl.exp(exponent * tl.log(base)))


@triton.jit
def _store_numbers(place, row, n, total, inside):
    """The 8 numbers of parameters whose settings are at ``row``, for their update number n."""
    rate, beta1, beta2 = tl.load(row, inside, 0.0), tl.load(row + 1, inside, 0.0), tl.load(row + 2, inside, 0.0)
    epsilon, weight_decay, largest = tl.load(row + 3, inside, 0.0), tl.load(row + 4, inside, 0.0), tl.load(row + 5, inside, 0.0)
    tl.store(place, tl.minimum(largest / (tl.sqrt(total) + NORM_EPSILON), 1.0), inside)  # factor of the gradient
    tl.store(place + 1, 1.0 - rate * weight_decay, inside)
    tl.store(place + 2, 1.0 - beta1, inside)
    tl.store(place + 3, beta2, inside)
    tl.store(place + 4, 1.0 - beta2, inside)
    tl.store(place + 5, 1.0 / tl.sqrt(1.0 - _power(beta2, n)), inside)
    tl.store(place + 6, epsilon, inside)
    tl.store(place + 7, rate / (1.0 - _power(beta1, n)), inside)


@triton.jit
def numbers_kernel(
    numbers_ptr,  # [parameters, 8]
    rates_ptr,  # [averages]
    finite_ptr,  # [1] int32
    counts_ptr,  # [2 + parameters] int64: updates, skipped steps, each parameter's own updates
    total_ptr,  # [1] float64: sum of squares of all gradients
    settings_ptr,  # [groups, 6] float64: learning rate, beta1, beta2, epsilon, weight decay, largest norm
    decays_ptr,  # [averages, 4] float64: limit, a, b, exponent
    members_ptr,  # [parameters, 2] int64: row of the settings, whether there is a gradient
    parameters,
    averages,
    PARAMETERS: tl.constexpr,
    AVERAGES: tl.constexpr,
):
    """What an element needs beyond its own memory, and the count of this step."""
    total = tl.load(total_ptr)
    finite = (total - total) == 0.0
    updates, skipped = tl.load(counts_ptr), tl.load(counts_ptr + 1)
    done = updates.to(tl.float64)
    for first in range(0, parameters, PARAMETERS):
        parameter = first + tl.arange(0, PARAMETERS)
        inside = parameter < parameters
        row = settings_ptr + tl.load(members_ptr + parameter * 2, inside, 0) * SETTINGS
        present, own_ptr = tl.load(members_ptr + parameter * 2 + 1, inside, 0), counts_ptr + OWN + parameter
        own = tl.load(own_ptr, inside, 0)
        _store_numbers(numbers_ptr + parameter * NUMBERS, row, own.to(tl.float64) + 1.0, total, inside)
        tl.store(own_ptr, own + present * finite.to(tl.int64), inside)

    average = tl.arange(0, AVERAGES)
    row, inside = decays_ptr + average * DECAYS, average < averages
    limit, a, b = tl.load(row, inside, 0.0), tl.load(row + 1, inside, 1.0), tl.load(row + 2, inside, 1.0)
    decay = _power((a + done) / (b + done), tl.load(row + 3, inside, 0.0))
    tl.store(rates_ptr + average, 1.0 - tl.minimum(limit, decay), inside)

    tl.debug_barrier()  # all warps have read the counts
    tl.store(finite_ptr, finite.to(tl.int32))
    tl.store(counts_ptr, updates + finite.to(tl.int64))
    tl.store(counts_ptr + 1, skipped + 1 - finite.to(tl.int64))


@triton.jit
def _updated(p, g, m, v, numbers):
    """(p, m, v) of a tile after AdamW; the numbers are those of numbers_kernel."""
    g *= numbers[0]
    near = numbers[2] < 0.5  # from the nearer end, as torch.lerp does: beta1 = 0 gives g itself, not what is left of it beside a large m
    m = tl.where(near, m, g) + tl.where(near, numbers[2], numbers[2] - 1.0) * (g - m)
    v = numbers[3] * v + numbers[4] * g * g
    direction = m / (tl.sqrt(v) * numbers[5] + numbers[6])
    return numbers[1] * p - numbers[7] * direction, m, v


@triton.jit
def _update(
    row_ptr, m_ptr, v_ptr, averages_ptr, number_ptr, rates_ptr, length, offset, first, count,
    HAS_GRADIENT: tl.constexpr, G_TYPE: tl.constexpr, HAS_COPY: tl.constexpr, COPY_TYPE: tl.constexpr, AVERAGES: tl.constexpr,
    COMPUTE: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, TILES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One chunk of one tensor."""
    p_ptr = pointer_of(row_ptr, VALUE, COMPUTE, ALIGNED)
    g_ptr, copy_ptr = pointer_of(row_ptr, GRADIENT, G_TYPE, ALIGNED), pointer_of(row_ptr, COPY, COPY_TYPE, ALIGNED)
    numbers, rates = read_numbers(number_ptr, NUMBERS, COMPUTE), read_numbers(rates_ptr, AVERAGES, COMPUTE)
    m_ptr, v_ptr, averages_ptr = m_ptr + offset, v_ptr + offset, averages_ptr + offset
    for i in range(TILES):
        place = first + (i * ROWS + tl.arange(0, ROWS)[:, None]) * LANES + tl.arange(0, LANES)[None, :]
        inside = place < count
        p = read(p_ptr + place, inside, MASKED)
        if HAS_GRADIENT:
            g = read(g_ptr + place, inside, MASKED).to(COMPUTE)
            m, v = read(m_ptr + place, inside, MASKED), read(v_ptr + place, inside, MASKED)
            p, m, v = _updated(p, g, m, v, numbers)
            write(p_ptr + place, p, inside, MASKED)
            write(m_ptr + place, m, inside, MASKED)
            write(v_ptr + place, v, inside, MASKED)
        for k in tl.static_range(AVERAGES):
            average_ptr = averages_ptr + k * length + place
            average = read(average_ptr, inside, MASKED)
            write(average_ptr, average + rates[k] * (p - average), inside, MASKED)
        if HAS_COPY:
            write(copy_ptr + place, p, inside, MASKED)


@triton.jit
def adamw_ema_kernel(
    table_ptr,  # [tensors, 6] int64
    chunks_ptr,  # [programs, 2] int64
    m_ptr,  # [N]
    v_ptr,  # [N]
    averages_ptr,  # [averages, N]
    numbers_ptr,  # [parameters, 8]
    rates_ptr,  # [averages]
    finite_ptr,  # [1]
    length: tl.int64,  # N
    HAS_GRADIENT: tl.constexpr,
    G_TYPE: tl.constexpr,
    HAS_COPY: tl.constexpr,
    COPY_TYPE: tl.constexpr,
    AVERAGES: tl.constexpr,
    COMPUTE: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    TILES: tl.constexpr,
):
    if tl.load(finite_ptr) == 0:
        return
    row_ptr, first, count = chunk_of(chunks_ptr, table_ptr)
    offset = tl.load(row_ptr + OFFSET)
    if ALIGNED:
        offset = tl.multiple_of(offset, 16)
    number_ptr = numbers_ptr + tl.load(row_ptr + INDEX) * NUMBERS
    if first + ROWS * LANES * TILES <= count:
        _update(
            row_ptr, m_ptr, v_ptr, averages_ptr, number_ptr, rates_ptr, length, offset, first, count, HAS_GRADIENT, G_TYPE,
            HAS_COPY, COPY_TYPE, AVERAGES, COMPUTE, ALIGNED, ROWS, LANES, TILES, False,
        )  # fmt: skip
    else:
        _update(
            row_ptr, m_ptr, v_ptr, averages_ptr, number_ptr, rates_ptr, length, offset, first, count, HAS_GRADIENT, G_TYPE,
            HAS_COPY, COPY_TYPE, AVERAGES, COMPUTE, ALIGNED, ROWS, LANES, TILES, True,
        )  # fmt: skip


def _launch_chunks(kernel: Any, chunks: Tensor, positional: Sequence[Any], **options: Any) -> None:
    tile = {"ROWS": ROWS, "LANES": LANES, "TILES": TILES}
    _launch.launch(kernel, (len(chunks),), chunks.device, positional, warps=WARPS, **options, **tile)


def launch_norm(total: Tensor, g: Sequence[Tensor]) -> None:
    """Run ``fm_fast::adamw_ema_norm``: the sum of squares of all g into total [1]."""
    launches = [(batch, *tables(batch, CHUNK, total.device)) for batch in _norm_plan(memories(g))]
    partial = torch.empty(sum(len(chunks) for _, _, chunks in launches), dtype=torch.float64, device=total.device)
    if not launches:
        total.zero_()
        return
    first = 0
    for batch, table, chunks in launches:
        options = {"G_TYPE": type_of(batch.kind.gradient), "ALIGNED": batch.aligned}
        _launch_chunks(norm_kernel, chunks, (partial[first:], table, chunks), **options)
        first += len(chunks)
    combine(total, partial, 1.0)


@functools.lru_cache(maxsize=64)
def _norm_plan(g: Memories) -> tuple[Batch, ...]:
    found = [Memory(*fields) for fields in g]
    for i, gradient in enumerate(found):
        check_gapless(f"g[{i}]", gradient)
    return by_kind([Kind(x.dtype, None) for x in found], [Row(0, x.address, 0, 0, x.count, 0) for x in found])


@functools.lru_cache(maxsize=64)
def _plan(p: Memories, copies: Memories, g: Memories, layout: tuple[int, ...], state: Memory, groups: int) -> tuple[Batch, ...]:
    """One row a parameter, checked: a wrong one would write into memory of others. layout: where each begins, and its group, in turn."""
    if len(g) != len(p) or len(copies) not in (0, len(p)):
        raise ValueError(f"g and copies must have one entry a parameter, {len(p)}, got {len(g)} and {len(copies)}")
    kinds, rows, begin = [], [], 0
    places = zip(layout[::2], layout[1::2], strict=True)
    for i, (fields, other, (offset, group)) in enumerate(zip(p, g, places, strict=True)):
        weights, gradient, copy = Memory(*fields), _present(other), _present(copies[i]) if copies else None
        for name, memory in (("g", gradient), ("copies", copy)):
            if memory is not None:
                check_alike(f"{name}[{i}]", memory, weights)
        check_gapless(f"p[{i}]", weights)
        if weights.dtype != state.dtype or offset < begin or offset + weights.count > state.count or not 0 <= group < groups:
            raise ValueError(f"layout and m must hold p[{i}], {weights.count} of {weights.dtype}, behind {begin}, got {offset}, {group}")
        begin = offset + weights.count
        kinds.append(Kind(gradient.dtype if gradient else None, copy.dtype if copy else None))
        addresses = (weights.address, gradient.address if gradient else 0, copy.address if copy else 0)
        rows.append(Row(*addresses, offset, weights.count, i))
    return by_kind(kinds, rows)


def _present(fields: tuple[int, torch.dtype, tuple[int, ...], tuple[int, ...]]) -> Memory | None:
    """None for a tensor without elements, which stands for one that is not there."""
    found = Memory(*fields)
    return found if found.count else None


def launch(
    p: Sequence[Tensor],
    copies: Sequence[Tensor],
    m: Tensor,
    v: Tensor,
    averages: Tensor,
    counts: Tensor,
    g: Sequence[Tensor],
    layout: Tensor,
    total: Tensor,
    settings: Tensor,
    decays: Tensor,
) -> None:
    """Run ``fm_fast::adamw_ema``: update everything in place, or count the step as skipped where total is not finite."""
    _check_state(m, v, averages, counts, layout, total, settings, decays, len(p))
    count = len(averages)
    places, state = tuple(layout.flatten().tolist()), Memory(*memories([m])[0])
    batches = _plan(memories(p), memories(copies), memories(g), places, state, len(settings))
    numbers, rates = m.new_empty(len(p), NUMBERS.value), m.new_empty(max(count, 1))
    finite = torch.empty(1, dtype=torch.int32, device=m.device)
    belonging = members(tuple([(group, int(x.numel() > 0)) for group, x in zip(places[1::2], g, strict=True)]), m.device)
    round_ = min(_launch.power_of_two(len(p)), MOST_PARAMETERS)
    powers, warps = {"PARAMETERS": round_, "AVERAGES": _launch.power_of_two(count)}, max(1, min(MOST_NUMBER_WARPS, round_ // 32))
    positional = (numbers, rates, finite, counts, total, settings, decays, belonging, len(p), count)
    _launch.launch(numbers_kernel, (1,), m.device, positional, warps=warps, **powers)
    for batch in batches:
        kind, (table, chunks) = batch.kind, tables(batch, CHUNK, m.device)
        is_aligned = batch.aligned and m.numel() % 16 == 0 and all(x.data_ptr() % 16 == 0 for x in (m, v, averages))
        _launch_chunks(
            adamw_ema_kernel, chunks, (table, chunks, m, v, averages, numbers, rates, finite, m.numel()),
            HAS_GRADIENT=kind.gradient is not None, G_TYPE=type_of(kind.gradient), HAS_COPY=kind.copy is not None,
            COPY_TYPE=type_of(kind.copy), AVERAGES=count, COMPUTE=type_of(m.dtype), ALIGNED=is_aligned,
        )  # fmt: skip


def _check_state(
    m: Tensor, v: Tensor, averages: Tensor, counts: Tensor, layout: Tensor, total: Tensor, settings: Tensor, decays: Tensor,
    parameters: int,
) -> None:  # fmt: skip
    wanted = {
        "m": (m, (m.numel(),), m.dtype),
        "v": (v, (m.numel(),), m.dtype),
        "averages": (averages, (len(averages), m.numel()), m.dtype),
        "counts": (counts, (OWN.value + parameters,), torch.int64),
        "layout": (layout, (parameters, 2), torch.int64),
        "total": (total, (1,), torch.float64),
        "settings": (settings, (len(settings), SETTINGS.value), torch.float64),
        "decays": (decays, (len(averages), DECAYS.value), torch.float64),
    }
    for name, (tensor, shape, dtype) in wanted.items():
        if tuple(tensor.shape) != shape or tensor.dtype != dtype or not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous {dtype} {shape}, got {tensor.dtype} {tuple(tensor.shape)}")
