"""The transform guard: when an op's kernel may run, and how it is called."""

import functools
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor, is_legacy_batchedtensor

from fm_fast import _modes

_NOTHING = torch.empty(0, device="cpu")


def absent(like: Tensor) -> Tensor:
    """A tensor without elements. Where torch.compile may look, one of its own a call, because it refuses the same tensor twice."""
    if _modes.plainly_eager():
        if like.is_cpu:
            return _NOTHING
        if like.is_cuda and type(like) in (Tensor, torch.nn.Parameter):  # and not a fake tensor of a device that is not there
            return _nothing_on(like.device)
    return like.new_empty(0)


@functools.cache
@torch.inference_mode(False)  # autograd keeps it for backward passes
def _nothing_on(device: torch.device) -> Tensor:
    return torch.empty(0, device=device)


def run(op: Any, *arguments: Any) -> None:
    """Call a raw op whose inputs want no gradient, as the guard has found: with recording off it need not look for any, which is slow."""
    if _modes.is_compiling() or not torch.is_grad_enabled():
        return op(*arguments)
    torch._C._set_grad_enabled(False)
    try:
        op(*arguments)
    finally:
        torch._C._set_grad_enabled(True)


def record(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """``function.apply`` where the guard has found no transform: without torch's own search for one, which is slow."""
    if _modes.is_compiling():
        return function.apply(*arguments)
    return super(torch.autograd.Function, function).apply(*arguments)  # type: ignore[misc]


def needs_reference(backend: str, *tensors: Tensor | None) -> bool:
    """Whether plain PyTorch must run: asked for, a transform is active, or one of ``tensors`` wants its gradient."""
    if backend == "reference" or _modes.transforms_active():
        return True
    if torch.is_grad_enabled():
        for x in tensors:
            if x is not None and x.requires_grad:
                return True
    return False


def exports_gradient(*tensors: Tensor | None) -> bool:
    """Whether a program is exported through which gradients of ``tensors`` are to flow.

    It would keep a raw op without the autograd Function around it.
    """
    if not (_modes.is_exporting() and torch.is_grad_enabled()):
        return False
    return any([x is not None and x.requires_grad for x in tensors])


def savable(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The tensors, or copies of those made under inference mode, which autograd refuses to keep for the backward pass."""
    if not _modes.is_compiling():
        for x in tensors:
            if x.is_inference():
                return tuple(x.clone() if x.is_inference() else x for x in tensors)
    return tensors


def is_batched(grad_output: Tensor) -> bool:
    """Whether a vmap runs over several grad_outputs; the guard does not see it from inside a backward pass."""
    return not _modes.is_compiling() and (is_legacy_batchedtensor(grad_output) or is_batchedtensor(grad_output))
