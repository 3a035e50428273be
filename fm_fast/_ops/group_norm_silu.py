"""Op ``group_norm_silu``: allocation, the autograd Function and the calls of the kernels."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fm_fast import reference
from fm_fast._ops import schemas
from fm_fast._ops.guard import absent, exports_gradient, is_batched, needs_reference, record, run, savable
from fm_fast._ops.layout import memory_format, native_layout
from fm_fast._ops.noise import drawer

_forward = schemas.op("group_norm_silu")
_backward = schemas.op("group_norm_silu_backward")

# x, second, embedding, weight, bias, scale, shift: the inputs that a gradient may be asked for, in the order of the schema.
Inputs = tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class NormSettings:
    """What is no tensor: groups and eps of the norm, whether SiLU follows, and probability and layer of the dropout (0.0: none)."""

    groups: int
    eps: float
    activation: bool
    dropout: float
    index: int


def group_norm_silu(inputs: Inputs, key: Tensor | None, settings: NormSettings, backend: str) -> Tensor:
    """See :func:`fm_fast.reference.group_norm_silu`; the dropout mask is drawn with ``key``, which may be None without dropout.

    Differentiable (twice) in all of ``inputs``; saved for that are x and second themselves and two numbers a group.
    """
    x, second, *others = inputs
    if x.dim() == 2:
        flat = (x[..., None], None if second is None else second[..., None], *others)
        return group_norm_silu(flat, key, settings, backend)[..., 0]  # type: ignore[arg-type]
    if needs_reference(backend) or exports_gradient(*inputs):
        return _plain(inputs, key, settings, backend)
    # The copy of an unusual layout happens here, where autograd sees it, and not inside the Function.
    tensors = (native_layout(x), *[None if t is None else native_layout(t) for t in inputs[1:]])
    tail = (settings.groups, settings.eps, settings.activation, settings.dropout, settings.index)
    if torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in tensors]):
        return record(_GroupNormSiLU, *tensors, key, tail, backend)
    return _fused(tensors, key, tail, backend)[0]


def _plain(inputs: Inputs, key: Tensor | None, settings: NormSettings, backend: str) -> Tensor:
    """The reference, with the mask drawn by ``backend``."""
    x, second = inputs[:2]
    mask = None
    if settings.dropout > 0.0:
        assert key is not None
        channels = x.shape[1] + (0 if second is None else second.shape[1])
        shape = (x.shape[0], channels, math.prod(x.shape[2:]))
        mask = reference.dropout_mask(key, shape, settings.dropout, settings.index, drawer(backend))
    return reference.group_norm_silu(*inputs, settings.groups, settings.eps, settings.activation, mask)


def _fused(tensors: tuple[Tensor | None, ...], key: Tensor | None, tail: tuple[Any, ...], backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """The result [B, C, ...] in the memory format of x, and the statistics [B, groups]."""
    x, second = tensors[:2]
    assert x is not None
    wide = reference.accumulation_dtype(x)
    mean, rstd = (x.new_empty(x.shape[0], tail[0], dtype=wide) for _ in range(2))
    y = torch.empty_like(x) if second is None else _empty_joined(x, second)
    run(_forward[backend], y, mean, rstd, *_filled((*tensors, key), x), *tail)
    return y, mean, rstd


def _empty_joined(x: Tensor, second: Tensor) -> Tensor:
    shape = (x.shape[0], x.shape[1] + second.shape[1], *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def _filled(tensors: tuple[Tensor | None, ...], like: Tensor) -> list[Tensor]:
    """The tensors as kernels take them: one without elements for each that is not there."""
    return [absent(like) if t is None else t for t in tensors]


class _GroupNormSiLU(torch.autograd.Function):
    """Forward and backward each in one op; x, second, mean and rstd are kept, everything else is computed again."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *tensors, key, tail, backend = arguments
        y, mean, rstd = _fused(tuple(tensors), key, tail, backend)
        present = savable(tuple(t for t in (*tensors, key) if t is not None))
        ctx.present = tuple(t is not None for t in (*tensors, key))
        ctx.tail, ctx.backend = tail, backend
        ctx.save_for_backward(*present, mean, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        *present, mean, rstd = ctx.saved_tensors
        saved = iter(present)
        *tensors, key = (next(saved) if there else None for there in ctx.present)
        if torch.is_grad_enabled() or is_batched(grad_y):
            gradients = _differentiable_gradients(tensors, key, ctx.tail, grad_y, ctx.needs_input_grad)
        else:
            gradients = _gradients(tensors, mean, rstd, key, ctx.tail, grad_y, ctx.backend)
        return (*gradients, None, None, None)


def _gradients(
    tensors: list[Tensor | None], mean: Tensor, rstd: Tensor, key: Tensor | None, tail: tuple[Any, ...], grad_y: Tensor, backend: str
) -> list[Tensor | None]:
    x = tensors[0]
    assert x is not None
    groups, _, *others = tail
    gradients = [None if t is None else torch.empty_like(t) for t in tensors]
    _backward[backend](*_filled((*gradients, native_layout(grad_y), *tensors, mean, rstd, key), x), groups, *others)
    return gradients


def _differentiable_gradients(
    tensors: list[Tensor | None], key: Tensor | None, tail: tuple[Any, ...], grad_y: Tensor, needed: tuple[bool, ...]
) -> list[Tensor | None]:
    """The gradients by the plain formula, themselves differentiable: what create_graph=True asks for.

    They are taken at views of the inputs: one input may be computed from another, and its gradient must not pass through that one here.
    """
    with torch.enable_grad():
        tensors = [None if t is None else t.view_as(t) for t in tensors]
        y = _plain(tuple(tensors), key, NormSettings(*tail), "reference")  # type: ignore[arg-type]
        wanted = [t for t, wants in zip(tensors, needed, strict=False) if wants and t is not None]
        found = iter(torch.autograd.grad(y, wanted, grad_y, create_graph=True))
    return [next(found) if wants and t is not None else None for t, wants in zip(tensors, needed, strict=False)]
