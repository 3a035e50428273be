"""Op ``attention``: where its kernel may run, the autograd Function and the calls of the kernels."""

from typing import Any

import torch
from torch import Tensor

from fm_fast import _backends, reference
from fm_fast._ops import schemas
from fm_fast._ops.guard import exports_gradient, is_batched, needs_reference, record, run, savable

_attention = schemas.op("attention")
_attention_backward = schemas.op("attention_backward")

# Instruction sets with which the kernel was measured to be faster than PyTorch's.
FASTER_ON = ("avx2", "avx512")
_ISA = _backends.cpu_isa()

FEATURES = 16  # the kernel's: those of a head must be a multiple of it
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def attention_backend(joint: Tensor) -> str:
    """The backend for a joint projection [B, pixels, 3, heads, features].

    The reference where PyTorch's kernels are as fast, or ours does not know the dtype or the number of features.
    """
    if _ISA not in FASTER_ON or joint.device.type != "cpu" or joint.dtype not in DTYPES or joint.shape[4] % FEATURES:
        return "reference"
    return _backends.resolve("attention", joint.device)


def attention(joint: Tensor, backend: str) -> Tensor:
    """[B, pixels, heads, features], see :func:`fm_fast.reference.attention`; ``backend`` is what :func:`attention_backend` says.

    Differentiable (twice); saved for that are the input, the result and a number a query and head.
    """
    if needs_reference(backend) or exports_gradient(joint):
        return reference.attention(joint)
    joint = joint.contiguous()
    if torch.is_grad_enabled() and joint.requires_grad:
        return record(_Attention, joint, backend)
    return _fused(joint, backend)[0]


def _fused(joint: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """The result, and log sum exp of the scores of each query, [B, heads, pixels]."""
    batch, pixels, _, heads, features = joint.shape
    out = joint.new_empty(batch, pixels, heads, features)
    log_sums = joint.new_empty(batch, heads, pixels, dtype=torch.float32)
    run(_attention[backend], out, log_sums, joint)
    return out, log_sums


class _Attention(torch.autograd.Function):
    """Forward and backward each in one op, which makes the weights of some queries at a time and stores none."""

    @staticmethod
    def forward(ctx: Any, joint: Tensor, backend: str) -> Tensor:
        (joint,) = savable((joint,))
        out, log_sums = _fused(joint, backend)
        ctx.backend = backend
        ctx.save_for_backward(joint, out, log_sums)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        joint, out, log_sums = ctx.saved_tensors
        if torch.is_grad_enabled() or is_batched(grad_out):
            return _differentiable_gradient(joint, grad_out), None
        grad_joint = torch.empty_like(joint)
        _attention_backward[ctx.backend](grad_joint, grad_out.contiguous(), joint, out, log_sums)
        return grad_joint, None


def _differentiable_gradient(joint: Tensor, grad_out: Tensor) -> Tensor:
    """The gradient by the plain formula, itself differentiable: what create_graph=True asks for."""
    with torch.enable_grad():
        leaf = joint.view_as(joint)
        return torch.autograd.grad(reference.attention(leaf), leaf, grad_out, create_graph=True)[0]
