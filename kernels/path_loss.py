"""fm_fast::path_loss and path_loss_backward on CUDA: w ||k o - (c1 x1 + c0 x0)||^2 and its gradient (paper equation 14, 23 for OT).

One read of o and x1, one write of the gradient; the noise x0 is drawn again at its counters unless given. Each program writes one partial
sum and a second kernel adds them in float64 in a fixed order, so the loss is bitwise repeatable.
"""

# Device functions are written in Triton's own language.
# pyright: reportGeneralTypeIssues=false, reportInvalidTypeForm=false, reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from fm_fast.kernels import _launch
from fm_fast.kernels._coefficients import C0, C1, COLUMNS, K, W
from fm_fast.kernels._combine import combine
from fm_fast.kernels._philox import read_key
from fm_fast.kernels._tile import data_scale, mirror, offset, place, read, sample_and_chunk, source, write
from fm_fast.reference import REDUCTIONS

MEAN, SUM = REDUCTIONS.index("mean"), REDUCTIONS.index("sum")
NO_WEIGHT, SAMPLE_WEIGHT, ELEMENT_WEIGHT = (tl.constexpr(code) for code in range(3))


@triton.jit
def _gradient_factor(w, k, grad_output_ptr, sample, scale, GRAD_OUTPUT: tl.constexpr):
    """2 w k scale grad_output: what the residual is multiplied by, without an elementwise weight."""
    factor = 2.0 * w * k * scale
    if GRAD_OUTPUT == 1:
        factor *= tl.load(grad_output_ptr).to(w.dtype)
    if GRAD_OUTPUT == 2:
        factor *= tl.load(grad_output_ptr + sample).to(w.dtype)
    return factor


@triton.jit(do_not_specialize=["batch"])
def path_loss_kernel(
    grad_ptr,  # [B, C, P] in o's dtype, not written without WANT_GRAD
    o_ptr,  # [B, C, P]
    x1_ptr,  # [B, C, P]
    x0_ptr,  # [B, C, P], not read with DRAW
    weight_ptr,  # none, [B] or contiguous [B, C, P]
    key_ptr,  # [3] or [2 + B] int64
    coef_ptr,  # [B, 6]
    partial_ptr,  # [B, programs] in the compute dtype, not written without WANT_LOSS
    grad_output_ptr,  # none, [] or [B]
    grad_batch,
    grad_channel,
    grad_position,
    o_batch,
    o_channel,
    o_position,
    x1_batch,
    x1_channel,
    x1_position,
    x0_batch,
    x0_channel,
    x0_position,
    weight_batch,
    weight_channel,
    weight_position,
    batch,
    channels,
    positions,
    scale: tl.float64,  # 1 / (number of elements that a loss averages)
    flip,
    WANT_LOSS: tl.constexpr,
    WANT_GRAD: tl.constexpr,
    WEIGHT: tl.constexpr,
    GRAD_OUTPUT: tl.constexpr,
    FINISHED: tl.constexpr,  # grad is the gradient already if grad_output is one
    EXPLICIT_IDS: tl.constexpr,
    DRAW: tl.constexpr,
    LEVELS: tl.constexpr,
    DEQUANTISE: tl.constexpr,
    WIDTH: tl.constexpr,
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
    if FINISHED:  # noqa: SIM102 (not by "and": without FINISHED there is nothing to load)
        if tl.load(grad_output_ptr) == 1.0:
            return
    sample = sample.to(tl.int64)
    seed, step, identity = read_key(key_ptr, sample, EXPLICIT_IDS)
    row = coef_ptr + sample * COLUMNS
    c1, c0 = tl.load(row + C1).to(COMPUTE), tl.load(row + C0).to(COMPUTE)
    k, w = tl.load(row + K).to(COMPUTE), tl.load(row + W).to(COMPUTE)
    if WEIGHT == SAMPLE_WEIGHT:
        w *= tl.load(weight_ptr + sample).to(COMPUTE)
    factor = _gradient_factor(w, k, grad_output_ptr, sample, tl.full((), scale, COMPUTE), GRAD_OUTPUT)
    total = tl.zeros((ROWS, 4 * BLOCKS), COMPUTE)
    for i in range(TILES):
        block, channel, position, inside = place(chunk * TILES + i, channels, positions, ROWS, BLOCKS, FLAT, CHANNEL_FAST, WIDE)
        o = read(o_ptr + sample * o_batch + offset(channel, position, o_channel, o_position, FLAT), inside, MASKED).to(COMPUTE)
        x1_place = offset(channel, mirror(position, identity, step, seed, flip, WIDTH), x1_channel, x1_position, FLAT)
        x1 = read(x1_ptr + sample * x1_batch + x1_place, inside, MASKED)
        x1 = data_scale(x1, block, identity, step, seed, LEVELS, DEQUANTISE, BLOCKS, COMPUTE)
        x0_place = sample * x0_batch + offset(channel, position, x0_channel, x0_position, FLAT)
        x0 = source(x0_ptr, x0_place, block, inside, identity, step, seed, DRAW, MASKED, BLOCKS, COMPUTE)
        residual = k * o - (c1 * x1 + c0 * x0)
        weighted = residual
        if WEIGHT == ELEMENT_WEIGHT:
            weight_place = sample * weight_batch + offset(channel, position, weight_channel, weight_position, FLAT)
            weighted *= read(weight_ptr + weight_place, inside, MASKED).to(COMPUTE)
        if WANT_GRAD:
            grad_place = sample * grad_batch + offset(channel, position, grad_channel, grad_position, FLAT)
            write(grad_ptr + grad_place, factor * weighted, inside, MASKED)
        if WANT_LOSS:
            square = residual * weighted
            total += tl.where(inside, square, 0.0) if MASKED else square
    if WANT_LOSS:
        tl.store(partial_ptr + sample * tl.num_programs(0) + chunk, w * tl.sum(total))


def _averaged(o: Tensor, reduction: int) -> int:
    """How many elements one loss value averages."""
    if not 0 <= reduction < len(REDUCTIONS):
        raise ValueError(f"reduction must be 0 to {len(REDUCTIONS) - 1}, got {reduction}")
    if reduction == SUM:
        return 1
    return o.numel() if reduction == MEAN else o.numel() // o.shape[0]


def _weight_code(weight: Tensor, batch: int) -> int:
    if weight.numel() == 0:
        return NO_WEIGHT.value
    return SAMPLE_WEIGHT.value if weight.numel() == batch else ELEMENT_WEIGHT.value


def _plan(grad: Tensor, o: Tensor, x1: Tensor, x0: Tensor, weight: Tensor) -> _launch.Plan:
    """The geometry; the weight is addressed only where it has a value an element."""
    elementwise = _weight_code(weight, o.shape[0]) == ELEMENT_WEIGHT.value
    return _launch.plan(o, grad=grad, o=o, x1=x1, x0=x0, weight=weight.reshape(o.shape) if elementwise else weight.new_empty(0))


def launch(
    loss: Tensor,
    grad: Tensor,
    o: Tensor,
    x1: Tensor,
    x0: Tensor,
    key: Tensor,
    coef: Tensor,
    weight: Tensor,
    reduction: int,
    flip: float,
    levels: float,
    dequantise: bool,
    x_t: Tensor | None = None,
) -> None:
    """Run ``fm_fast::path_loss``: fill loss, and grad unless it has no elements. x_t is not read: drawing x0 again costs a GPU less."""
    if o.numel() == 0:
        loss.fill_(0.0 if reduction == SUM else float("nan"))
        return
    plan, compute, scale = _plan(grad, o, x1, x0, weight), _launch.compute_dtype(o, coef), 1.0 / _averaged(o, reduction)
    partial = torch.empty(plan.batch * plan.programs, dtype=loss.dtype, device=o.device)
    _launch.run(
        path_loss_kernel,
        plan,
        (grad, o, x1, x0, weight, key, coef, partial, None),
        (scale, flip),
        WANT_LOSS=True,
        WANT_GRAD=grad.numel() > 0,
        WEIGHT=_weight_code(weight, o.shape[0]),
        GRAD_OUTPUT=0,
        FINISHED=False,
        COMPUTE=compute,
        **_launch.early_loads(plan.flat, compute),
        **_launch.data_options(x1, x0, key, flip, levels, dequantise),
    )
    combine(loss, partial, scale)


def launch_backward(
    grad: Tensor,
    o: Tensor,
    x1: Tensor,
    x0: Tensor,
    key: Tensor,
    coef: Tensor,
    weight: Tensor,
    grad_output: Tensor,
    reduction: int,
    flip: float,
    levels: float,
    dequantise: bool,
    finished: bool = False,
) -> None:
    """Run ``fm_fast::path_loss_backward``: fill grad, with grad_output multiplied in before the rounding to grad's dtype.

    finished: grad is the gradient already if grad_output, a single number, is one.
    """
    if o.numel() == 0:
        return
    plan, compute = _plan(grad, o, x1, x0, weight), _launch.compute_dtype(o, coef)
    _launch.run(
        path_loss_kernel,
        plan,
        (grad, o, x1, x0, weight, key, coef, None, grad_output),
        (1.0 / _averaged(o, reduction), flip),
        WANT_LOSS=False,
        WANT_GRAD=True,
        WEIGHT=_weight_code(weight, o.shape[0]),
        GRAD_OUTPUT=2 if grad_output.dim() else 1,
        FINISHED=finished and grad_output.dim() == 0,
        COMPUTE=compute,
        **_launch.early_loads(plan.flat, compute),
        **_launch.data_options(x1, x0, key, flip, levels, dequantise),
    )
