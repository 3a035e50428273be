"""The transform guard: when an op's kernel may run, and how it is called."""

import array
import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack, is_batchedtensor, is_legacy_batchedtensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack


def transforms_active() -> bool:
    """Whether a ``torch.func`` transform or forward-mode differentiation is running, which only plain PyTorch supports."""
    return function_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def function_transforms_active() -> bool:
    """Whether a ``torch.func`` transform is running."""
    return torch._C._are_functorch_transforms_active()


def gradient_transform_active() -> bool:
    """Whether one of them is reverse-mode differentiation."""
    return function_transforms_active() and any(level.key() == TransformType.Grad for level in get_interpreter_stack() or ())


def outside_transforms() -> contextlib.AbstractContextManager[Any]:
    """Where the host computes numbers of its own, which a running ``torch.func`` transform would wrap."""
    return temporarily_clear_interpreter_stack() if torch._C._are_functorch_transforms_active() else contextlib.nullcontext()


def plainly_eager() -> bool:
    """Whether torch runs without a compiler or a mode that looks at every op: then tensors may be made or shared behind its back."""
    return not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() == 0


_NOTHING = torch.empty(0, device="cpu")


def absent(like: Tensor) -> Tensor:
    """A tensor without elements. Where torch.compile may look, one of its own a call, because it refuses the same tensor twice."""
    return _NOTHING if like.device.type == "cpu" and plainly_eager() else like.new_empty(0)


def host_words(words: Sequence[int]) -> Tensor:
    """An int64 tensor on the CPU; from a buffer where nothing watches, which takes a quarter of torch.tensor's time."""
    if not plainly_eager():
        return torch.tensor(words, dtype=torch.int64, device="cpu")
    return torch.frombuffer(array.array("q", words), dtype=torch.int64)


def run(op: Any, *arguments: Any) -> None:
    """Call a raw op whose inputs want no gradient, as the guard has found: with recording off it need not look for any, which is slow."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return op(*arguments)
    torch._C._set_grad_enabled(False)
    try:
        op(*arguments)
    finally:
        torch._C._set_grad_enabled(True)


def needs_reference(backend: str, *tensors: Tensor | None) -> bool:
    """Whether plain PyTorch must run: asked for, a transform is active, or one of ``tensors`` wants its gradient."""
    if backend == "reference" or transforms_active():
        return True
    if torch.is_grad_enabled():
        for x in tensors:
            if x is not None and x.requires_grad:
                return True
    return False


def savable(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The tensors, or copies of those made under inference mode, which autograd refuses to keep for the backward pass."""
    if not torch.compiler.is_compiling():
        for x in tensors:
            if x.is_inference():
                return tuple(x.clone() if x.is_inference() else x for x in tensors)
    return tensors


def is_batched(grad_output: Tensor) -> bool:
    """Whether a vmap runs over several grad_outputs; the guard does not see it from inside a backward pass."""
    return not torch.compiler.is_compiling() and (is_legacy_batchedtensor(grad_output) or is_batchedtensor(grad_output))
