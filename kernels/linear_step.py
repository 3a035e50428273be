"""fm_fast::linear_step on CUDA: y = a x + sum_j c_j m(k_j), every update of a Runge-Kutta or multistep method.

m mixes the halves of a doubled batch, m(k) = u + guidance (c - u), and is the identity for other k. The coefficients are one row of a
table in device memory. Each input is read once; the result is written once, and once more or twice in the dtype of the network's input.
The last k can be kept as it came.
"""

# Device functions are written in Triton's own language.
# pyright: reportGeneralTypeIssues=false, reportInvalidTypeForm=false

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fm_fast.kernels import _launch
from fm_fast.kernels._tile import offset, place, read, read_numbers, sample_and_chunk, write

REGISTERS = {5: 64, 9: 80}  # a thread, where so many tensors are read


@triton.jit
def _term(pointer, sample, batch, strides, channel, position, inside, guidance, GUIDED: tl.constexpr, FLAT: tl.constexpr,
          MASKED: tl.constexpr, COMPUTE: tl.constexpr):  # fmt: skip
    """m(k) of a tile."""
    within = offset(channel, position, strides[1], strides[2], FLAT)
    k = read(pointer + sample * strides[0] + within, inside, MASKED).to(COMPUTE)
    if GUIDED:
        unconditional = read(pointer + (sample + batch) * strides[0] + within, inside, MASKED).to(COMPUTE)
        k = unconditional + guidance * (k - unconditional)
    return k


@triton.jit(do_not_specialize=["batch", "row"])
def linear_step_kernel(
    out_ptr,  # [B, C, P], may be x
    copy_ptr,  # [B, C, P] or [2B, C, P], not written with COPIES 0
    x_ptr,  # [B, C, P]
    k_ptrs,  # a tuple of [B, C, P] or [2B, C, P]
    table_ptr,  # [rows, 1 + len(k)] float64
    kept_ptr,  # [B, C, P], gets the last k with KEEPS
    out_batch,
    out_channel,
    out_position,
    copy_batch,
    copy_channel,
    copy_position,
    x_batch,
    x_channel,
    x_position,
    kept_batch,
    kept_channel,
    kept_position,
    k_strides,  # (batch, channel, position) of each k
    batch,
    channels,
    positions,
    row,
    guidance: tl.float64,
    COPIES: tl.constexpr,
    KEEPS: tl.constexpr,
    GUIDED: tl.constexpr,  # bit j: k_j is [2B, C, P]
    COMPUTE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    TILES: tl.constexpr,
    FLAT: tl.constexpr,
    CHANNEL_FAST: tl.constexpr,
    MASKED: tl.constexpr,
    WIDE: tl.constexpr,
):
    sample, chunk = sample_and_chunk()
    if sample >= batch:
        return
    sample = sample.to(tl.int64)
    TERMS: tl.constexpr = len(k_ptrs)
    coefficients = read_numbers(table_ptr + row.to(tl.int64) * (1 + TERMS), 1 + TERMS, COMPUTE)
    scale = tl.full((), guidance, COMPUTE)
    for i in range(TILES):
        _, channel, position, inside = place(chunk * TILES + i, channels, positions, ROWS, BLOCKS, FLAT, CHANNEL_FAST, WIDE)
        x_place = sample * x_batch + offset(channel, position, x_channel, x_position, FLAT)
        y = coefficients[0] * read(x_ptr + x_place, inside, MASKED).to(COMPUTE)
        for j in tl.static_range(TERMS):
            k = _term(k_ptrs[j], sample, batch, k_strides[j], channel, position, inside, scale, (GUIDED >> j) & 1, FLAT, MASKED, COMPUTE)
            # Not `y +=`, which compilers contract in either order: the bits would depend on the layouts.
            y = tl.fma(coefficients[1 + j], k, y)
            if KEEPS and j == TERMS - 1:
                kept_place = sample * kept_batch + offset(channel, position, kept_channel, kept_position, FLAT)
                write(kept_ptr + kept_place, k, inside, MASKED)
        write(out_ptr + sample * out_batch + offset(channel, position, out_channel, out_position, FLAT), y, inside, MASKED)
        for half in tl.static_range(COPIES):
            copy_place = (sample + half * batch) * copy_batch + offset(channel, position, copy_channel, copy_position, FLAT)
            write(copy_ptr + copy_place, y, inside, MASKED)


def _batches(name: str, tensor: Tensor, x: Tensor) -> int:
    """1 or 2: how many batches of x's size the tensor holds."""
    held = 2 if tensor.dim() == x.dim() and tensor.shape[0] != x.shape[0] else 1
    if tensor.shape != (held * x.shape[0], *x.shape[1:]):
        raise ValueError(f"{name} must be x's size {tuple(x.shape)} or a batch twice as large, got {tuple(tensor.shape)}")
    return held


def _check(out: Tensor, x: Tensor, table: Tensor, row: int, terms: int) -> None:
    if terms < 1:
        raise ValueError("k must hold at least one tensor, got none")
    if out.shape != x.shape:
        raise ValueError(f"out must be x's size {tuple(x.shape)}, got {tuple(out.shape)}")
    if table.dim() != 2 or table.shape[1] != 1 + terms or table.dtype != torch.float64 or not table.is_contiguous():
        raise ValueError(f"table must be contiguous float64 [rows, {1 + terms}], got {table.dtype} {tuple(table.shape)}")
    if not 0 <= row < table.shape[0]:
        raise ValueError(f"row must be 0 to {table.shape[0] - 1}, got {row}")


def _check_kept(kept: Tensor, x: Tensor, last: Tensor) -> None:
    if kept.shape != x.shape or last.shape != x.shape:
        raise ValueError(f"kept and the last k must be x's size {tuple(x.shape)}, got {tuple(kept.shape)} and {tuple(last.shape)}")


def launch(
    out: Tensor,
    copy: Tensor,
    x: Tensor,
    k: Sequence[Tensor],
    table: Tensor,
    row: int,
    guidance: float,
    kept: Tensor | None = None,
) -> None:
    """Run ``fm_fast::linear_step``: fill out, which may be x, copy unless it has no elements, and kept if it is there."""
    guided = sum((_batches(f"k[{j}]", term, x) - 1) << j for j, term in enumerate(k))
    _check(out, x, table, row, len(k))
    copies = _batches("copy", copy, x) if copy.numel() else 0
    if kept is not None:
        _check_kept(kept, x, k[-1])
    if x.numel() == 0:
        return
    named = {"out": out, "copy": copy, "x": x, "kept": x if kept is None else kept} | {f"k[{j}]": term for j, term in enumerate(k)}
    plan = _launch.elementwise_plan(x.shape[0], x.shape[1:], named)
    single, k_strides = plan.strides[:4], plan.strides[4:]
    flattened = (stride for triple in single for stride in triple)
    sizes = (plan.batch, plan.channels, plan.positions)
    _launch.start(
        linear_step_kernel,
        plan,
        (out, copy, x, tuple(k), table, out if kept is None else kept, *flattened, k_strides, *sizes, row, guidance),
        COPIES=copies,
        KEEPS=kept is not None,
        GUIDED=guided,
        COMPUTE=_launch.compute_dtype(x, out),
        **_launch.early_terms(plan, [out, copy, x, *k], 1 + len(k) + guided.bit_count(), REGISTERS),
    )
