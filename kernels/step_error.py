"""fm_fast::step_error on CUDA: of each sample the mean of (e / (atol + rtol max(|y|, |end|)))^2, for the error e = sum_j c_j k_j of a step.

The coefficients are in device memory. Each tensor is read once; each program writes one partial sum, and where a sample has several a
second kernel adds them in float64 in a fixed order, so the norm is bitwise repeatable.
"""

# Device functions are written in Triton's own language.
# pyright: reportGeneralTypeIssues=false, reportInvalidTypeForm=false

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fm_fast.kernels import _launch
from fm_fast.kernels._combine import combine, partials
from fm_fast.kernels._tile import offset, place, read, read_numbers, sample_and_chunk

REGISTERS = {6: 64, 9: 96}  # a thread, where so many tensors are read


@triton.jit(do_not_specialize=["batch"])
def step_error_kernel(
    partial_ptr,  # [B, programs] float64
    y_ptr,  # [B, C, P]
    end_ptr,  # [B, C, P]
    k_ptrs,  # a tuple of [B, C, P]
    coefficients_ptr,  # [len(k)] float64
    y_batch,
    y_channel,
    y_position,
    end_batch,
    end_channel,
    end_position,
    k_strides,  # (batch, channel, position) of each k
    batch,
    channels,
    positions,
    rtol: tl.float64,
    atol: tl.float64,
    share: tl.float64,  # of an element in the mean of its sample
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
    coefficients = read_numbers(coefficients_ptr, len(k_ptrs), COMPUTE)
    relative, absolute = tl.full((), rtol, COMPUTE), tl.full((), atol, COMPUTE)
    total = tl.zeros((ROWS, 4 * BLOCKS), COMPUTE)
    for i in range(TILES):
        _, channel, position, inside = place(chunk * TILES + i, channels, positions, ROWS, BLOCKS, FLAT, CHANNEL_FAST, WIDE)
        error = tl.zeros((ROWS, 4 * BLOCKS), COMPUTE)
        for j in tl.static_range(len(k_ptrs)):
            strides = k_strides[j]
            k_place = sample * strides[0] + offset(channel, position, strides[1], strides[2], FLAT)
            error += coefficients[j] * read(k_ptrs[j] + k_place, inside, MASKED).to(COMPUTE)
        y = read(y_ptr + sample * y_batch + offset(channel, position, y_channel, y_position, FLAT), inside, MASKED).to(COMPUTE)
        end = read(end_ptr + sample * end_batch + offset(channel, position, end_channel, end_position, FLAT), inside, MASKED).to(COMPUTE)
        size = tl.maximum(tl.abs(y), tl.abs(end), propagate_nan=tl.PropagateNan.ALL)
        ratio = error / (absolute + relative * size)
        square = ratio * ratio
        total += tl.where(inside, square, 0.0) if MASKED else square
    tl.store(partial_ptr + sample * tl.num_programs(0) + chunk, tl.sum(total).to(tl.float64) * share)


def _check(means: Tensor, y: Tensor, tensors: dict[str, Tensor], coefficients: Tensor, terms: int) -> None:
    if terms < 1:
        raise ValueError("k must hold at least one tensor, got none")
    for name, x in tensors.items():
        if x.shape != y.shape:
            raise ValueError(f"{name} must be y's size {tuple(y.shape)}, got {tuple(x.shape)}")
    for name, x, count in (("means", means, y.shape[0]), ("coefficients", coefficients, terms)):
        if x.shape != (count,) or x.dtype != torch.float64 or not x.is_contiguous():
            raise ValueError(f"{name} must be contiguous float64 [{count}], got {x.dtype} {tuple(x.shape)}")


def launch(means: Tensor, y: Tensor, end: Tensor, k: Sequence[Tensor], coefficients: Tensor, rtol: float, atol: float) -> None:
    """Run ``fm_fast::step_error``: fill means."""
    tensors = {"y": y, "end": end} | {f"k[{j}]": term for j, term in enumerate(k)}
    _check(means, y, tensors, coefficients, len(k))
    if y.numel() == 0:
        means.fill_(float("nan"))
        return
    plan = _launch.sample_plan(y, **tensors)
    partial = partials(means, plan.programs)
    flattened = (stride for triple in plan.strides[:2] for stride in triple)
    numbers = (plan.batch, plan.channels, plan.positions, rtol, atol, means.numel() / y.numel())
    _launch.start(
        step_error_kernel,
        plan,
        (partial, y, end, tuple(k), coefficients, *flattened, plan.strides[2:], *numbers),
        COMPUTE=_launch.compute_dtype(y, end),
        **_launch.early_terms(plan, tensors.values(), len(tensors), REGISTERS),
    )
    if partial is not means:
        combine(means, partial, 1.0)
