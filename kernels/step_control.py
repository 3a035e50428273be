"""fm_fast::step_control on CUDA: whether the step of each sample counts, and how its next one goes (Hairer, Norsett and Wanner, II.4.13).

A lane a sample; the totals are whole numbers, which may be added in any order.
"""

# Device functions are written in Triton's own language.
# pyright: reportGeneralTypeIssues=false, reportInvalidTypeForm=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from fm_fast import reference
from fm_fast.kernels import _launch

SAMPLES = 128  # of a program
SAFETY, SHORTEST, LONGEST = (tl.constexpr(factor) for factor in (reference.SAFETY, reference.SHORTEST, reference.LONGEST))
AT_THE_END, ON_THE_WAY, GIVEN_UP = (tl.constexpr(code) for code in (reference.AT_THE_END, reference.ON_THE_WAY, reference.GIVEN_UP))


@triton.jit
def _growth(square, order):
    """How much longer the next step is; an error below 1 is not followed by a shorter one."""
    # A literal would be rounded to float32.
    safety, shortest = tl.full((), SAFETY, tl.float64), tl.full((), SHORTEST, tl.float64)
    factor = safety * tl.exp(-0.5 * tl.log(square) / order)
    factor = tl.where(square == square, tl.minimum(tl.maximum(factor, shortest), LONGEST), shortest)
    return tl.where((square < 1.0) & (factor < 1.0), 1.0, factor)


@triton.jit
def _mean_square(means_ptr, sample, batch, parts, inside):
    """The largest of the parts; NaN if one is."""
    square = tl.load(means_ptr + sample, mask=inside, other=0.0)
    for part in range(1, parts):
        other = tl.load(means_ptr + part * batch + sample, mask=inside, other=0.0)
        square = tl.maximum(square, other, propagate_nan=tl.PropagateNan.ALL)
    return square


@triton.jit(do_not_specialize=["batch", "parts", "stop_count", "stages", "order", "evaluations"])
def step_control_kernel(
    numbers_ptr,  # [3, B] float64: t, the length of the next step before it is cut at a stop, and after
    counts_ptr,  # [3, B] int64: the number of the next stop, evaluations so far, status
    totals_ptr,  # [3] int64: samples on the way, given up now, accepted now
    accepted_ptr,  # [B] uint8
    times_ptr,  # [stages, B] float64
    factors_ptr,  # [2, B]: the next step's length, and that over the length before
    means_ptr,  # [parts, B] float64
    stops_ptr,  # [stop_count] float64
    nodes_ptr,  # [stages] float64
    batch,
    parts,
    stop_count,
    stages,
    order,
    evaluations,
    SAMPLES: tl.constexpr,
):
    batch = batch.to(tl.int64)  # several rows of it may be more than 32 bits count
    sample = tl.program_id(0).to(tl.int64) * SAMPLES + tl.arange(0, SAMPLES)
    inside = sample < batch
    t = tl.load(numbers_ptr + sample, mask=inside, other=0.0)
    length = tl.load(numbers_ptr + batch + sample, mask=inside, other=0.0)
    before = tl.load(numbers_ptr + 2 * batch + sample, mask=inside, other=0.0)
    stop = tl.load(counts_ptr + sample, mask=inside, other=1)
    spent = tl.load(counts_ptr + batch + sample, mask=inside, other=0)
    status = tl.load(counts_ptr + 2 * batch + sample, mask=inside, other=AT_THE_END)
    accepted = tl.zeros((SAMPLES,), tl.int1)
    if parts > 0:
        running = status == ON_THE_WAY
        due = tl.load(stops_ptr + stop)
        square = _mean_square(means_ptr, sample, batch, parts, inside)
        longer = before * _growth(square, order.to(tl.float64))
        cut = tl.abs(length) >= tl.abs(due - t)
        accepted = running & (square <= 1.0)
        arrived = accepted & cut
        # A step that was cut at a stop does not shorten the one that follows.
        keeps = (arrived & (tl.abs(length) > tl.abs(longer))) | (status != ON_THE_WAY)
        length = tl.where(keeps, length, longer)
        t = tl.where(accepted, tl.where(cut, due, t + before), t)
        spent += tl.where(running, evaluations, 0)
        ended = arrived & (stop + 1 == stop_count)
        status = tl.where(ended, AT_THE_END, status)
        stop += tl.where(arrived & (stop + 1 < stop_count), 1, 0)
    lost = (status == ON_THE_WAY) & (t + length == t)  # too short to be a step
    status = tl.where(lost, GIVEN_UP, status)
    left = tl.load(stops_ptr + stop) - t
    step = tl.where(tl.abs(length) >= tl.abs(left), left, length)
    step = tl.where(status == ON_THE_WAY, step, 0.0)
    tl.store(numbers_ptr + sample, t, mask=inside)
    tl.store(numbers_ptr + batch + sample, length, mask=inside)
    tl.store(numbers_ptr + 2 * batch + sample, step, mask=inside)
    tl.store(counts_ptr + sample, stop, mask=inside)
    tl.store(counts_ptr + batch + sample, spent, mask=inside)
    tl.store(counts_ptr + 2 * batch + sample, status, mask=inside)
    tl.store(accepted_ptr + sample, accepted.to(tl.uint8), mask=inside)
    tl.store(factors_ptr + sample, step.to(factors_ptr.dtype.element_ty), mask=inside)
    ratio = tl.where(before == 0.0, 0.0, step / tl.where(before == 0.0, 1.0, before))
    tl.store(factors_ptr + batch + sample, ratio.to(factors_ptr.dtype.element_ty), mask=inside)
    begin, end = tl.load(stops_ptr), tl.load(stops_ptr + stop_count - 1)
    for j in range(stages):
        time = t + tl.load(nodes_ptr + j) * step
        time = tl.minimum(tl.maximum(time, tl.minimum(begin, end)), tl.maximum(begin, end))
        tl.store(times_ptr + j * batch + sample, time, mask=inside)
    tl.atomic_add(totals_ptr, tl.sum((status == ON_THE_WAY).to(tl.int64)))
    tl.atomic_add(totals_ptr + 1, tl.sum(lost.to(tl.int64)))
    tl.atomic_add(totals_ptr + 2, tl.sum(accepted.to(tl.int64)))


def _check(name: str, x: Tensor, shape: tuple[int, ...], *dtypes: torch.dtype) -> None:
    if x.shape != shape or x.dtype not in dtypes or not x.is_contiguous():
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name} must be contiguous {wanted} {list(shape)}, got {x.dtype} {tuple(x.shape)}")


def launch(
    numbers: Tensor,
    counts: Tensor,
    totals: Tensor,
    accepted: Tensor,
    times: Tensor,
    factors: Tensor,
    means: Tensor,
    stops: Tensor,
    nodes: Tensor,
    order: int,
    evaluations: int,
) -> None:
    """Run ``fm_fast::step_control``: fill or update the first six tensors."""
    batch, parts, stages = accepted.numel(), means.shape[0], nodes.numel()
    doubles = {"numbers": (numbers, (3, batch)), "times": (times, (stages, batch)), "means": (means, (parts, batch))}
    doubles |= {"stops": (stops, (stops.numel(),)), "nodes": (nodes, (stages,))}
    for name, (x, shape) in doubles.items():
        _check(name, x, shape, torch.float64)
    _check("counts", counts, (3, batch), torch.int64)
    _check("totals", totals, (3,), torch.int64)
    _check("accepted", accepted, (batch,), torch.uint8)
    _check("factors", factors, (2, batch), torch.float32, torch.float64)
    if stops.numel() < 2 or stages < 1 or order < 1:
        raise ValueError(f"there must be 2 stops, a node and an order, got {stops.numel()}, {stages} and {order}")
    if batch == 0:
        return
    positional = (
        numbers, counts, totals, accepted, times, factors, means, stops, nodes, batch, parts, stops.numel(), stages, order, evaluations,
    )  # fmt: skip
    _launch.launch(step_control_kernel, (-(-batch // SAMPLES),), numbers.device, positional, warps=4, SAMPLES=SAMPLES)
