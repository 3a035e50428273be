"""Op ``path_loss``: the loss and its gradient in one pass, and the autograd Function around it."""

from typing import Any

import torch
from torch import Tensor

from fm_fast import _modes, reference
from fm_fast._ops import schemas
from fm_fast._ops.guard import absent, is_batched, record, savable
from fm_fast._ops.layout import native_layout
from fm_fast._ops.noise import drawer
from fm_fast._spec import PathSpec

_path_loss = schemas.op("path_loss")
_path_loss_backward = schemas.op("path_loss_backward")


def recovers_noise(x0: Tensor | None, backend: str) -> bool:
    """Whether the kernel may divide drawn noise out of x_t: a CPU draws slower than it reads, a GPU faster."""
    return x0 is None and backend == "cpp"


def path_loss(
    o: Tensor,
    x1: Tensor,
    x0: Tensor | None,
    x_t: Tensor | None,
    key: Tensor,
    coefficients: Tensor,
    weight: Tensor | None,
    reduction: str,
    spec: PathSpec,
    backend: str,
) -> Tensor:
    """The reduced loss, differentiable in ``o`` (twice); float32, or float64 for float64 data.

    ``x_t`` is what :func:`path_sample` made of x1 and drawn noise, from which a kernel may recover that noise; None: it is drawn again.
    """
    # The copy of an unusual layout happens here, where autograd sees it, and not inside the Function.
    x0 = absent(coefficients) if x0 is None else native_layout(x0)
    mask = absent(coefficients) if weight is None else _kernel_weight(weight, o, coefficients.dtype)
    inputs = (native_layout(o), native_layout(x1), x0, key, coefficients, mask)
    tail = (reference.REDUCTIONS.index(reduction), *spec.data_map)
    if torch.is_grad_enabled() and o.requires_grad:
        o, *others = savable(inputs)
        return record(_PathLoss, o, tuple(others), x_t, tail, backend)
    with torch.no_grad():  # the raw op would otherwise look for gradients to refuse
        return _fused_loss(inputs, x_t, tail, backend, with_gradient=False)[0]


def _fused_loss(
    inputs: tuple[Tensor, ...], x_t: Tensor | None, tail: tuple[Any, ...], backend: str, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    o, coefficients = inputs[0], inputs[4]
    shape = o.shape[:1] if tail[0] == reference.REDUCTIONS.index("none") else ()
    loss = o.new_empty(shape, dtype=reference.accumulation_dtype(o, coefficients))
    gradient = torch.empty_like(o) if with_gradient else o.new_empty(0)
    _path_loss[backend](loss, gradient, *inputs, *tail, x_t)
    return loss, gradient


class _PathLoss(torch.autograd.Function):
    """Loss and finished gradient in one pass, for a grad_output of one. Backward scales it, and can run again.

    float16 keeps no gradient: 2 / N underflows in it, so backward computes the gradient with grad_output / N applied in float32. On a
    GPU the op looks whether grad_output is one, and computes the gradient anew where it is not: the host would have to wait.
    Only ``o`` gets a gradient, so the others come in one tuple, which spares autograd a look at each of them.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, o: Tensor, others: tuple[Tensor, ...], x_t: Tensor | None, tail: tuple[Any, ...], backend: str
    ) -> Tensor:
        loss, gradient = _fused_loss((o, *others), x_t, tail, backend, with_gradient=o.dtype != torch.float16)
        ctx.tail, ctx.backend, ctx.is_given_away = tail, backend, False
        ctx.save_for_backward(o, *others, gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        *inputs, gradient = ctx.saved_tensors
        if torch.is_grad_enabled() or (gradient.dtype == torch.float16 and is_batched(grad_output)):
            result = _differentiable_gradient(inputs, ctx.tail, grad_output, ctx.backend)
        elif gradient.dtype == torch.float16:
            result = torch.empty_like(inputs[0])
            _path_loss_backward[ctx.backend](result, *inputs, grad_output.contiguous(), *ctx.tail)
        elif not _is_plain_number(grad_output):
            result = _scaled(gradient, grad_output)
        elif _is_on_device(grad_output):
            result = _finished_by_device(ctx, inputs, gradient, grad_output)
        else:  # the usual loss.backward() needs no multiplication
            result = _given_away(gradient) if grad_output.item() == 1 else _scaled(gradient, grad_output)
        return result, None, None, None, None


def _finished_by_device(ctx: Any, inputs: list[Tensor], gradient: Tensor, grad_output: Tensor) -> Tensor:
    """The first time in the memory of the saved gradient (``data``: as if it had not been written), later in memory of its own."""
    result = torch.empty_like(gradient) if ctx.is_given_away else gradient.data
    _path_loss_backward[ctx.backend](result, *inputs, grad_output, *ctx.tail, not ctx.is_given_away)
    ctx.is_given_away = True
    return result


def _given_away(gradient: Tensor) -> Tensor:
    """Memory that the caller may write to: what is saved is needed again where the graph is kept."""
    keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph()  # type: ignore[attr-defined]
    return gradient.clone() if keeps_graph else gradient


def _scaled(gradient: Tensor, grad_output: Tensor) -> Tensor:
    return (gradient * reference.per_sample(grad_output, gradient) if grad_output.dim() else gradient * grad_output).to(gradient.dtype)


def _is_plain_number(grad_output: Tensor) -> bool:
    return not _modes.is_compiling() and type(grad_output) is Tensor and grad_output.dim() == 0 and not is_batched(grad_output)


def _is_on_device(number: Tensor) -> bool:
    """Whether to see that it is one means to wait for a device."""
    return not number.is_cpu


def _differentiable_gradient(inputs: list[Tensor], tail: tuple[Any, ...], grad_output: Tensor, backend: str) -> Tensor:
    """The gradient by the plain formula, itself differentiable: what create_graph=True asks for. Its noise is the kernels' own."""
    o, x1, x0, key, coefficients, weight = inputs
    reduction, flip, levels, dequantise = tail
    draw = reference.noise if is_batched(grad_output) else drawer(backend)
    data, noise_x0 = reference.plain_inputs(x1, x0 if x0.numel() else None, key, flip, levels, dequantise, coefficients.dtype, draw)
    mask = weight.reshape(o.shape) if weight.numel() == o.numel() else weight
    with torch.enable_grad():
        loss = reference.path_loss(o, data, noise_x0, coefficients, mask if weight.numel() else None, reference.REDUCTIONS[reduction])
        return torch.autograd.grad(loss, o, grad_output, create_graph=True)[0]


def _kernel_weight(weight: Tensor, o: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight as kernels read it: contiguous, one value a sample or one an element."""
    return (weight if weight.dim() == 1 else weight.expand(o.shape)).to(dtype).contiguous()
