"""What torch is doing: transforms, compilers, modes and captures, and whether values may be looked at meanwhile."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack, get_unwrapped, is_batchedtensor, is_functorch_wrapped_tensor
from torch._functorch import eager_transforms
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._mode_utils import no_dispatch


def transforms_active() -> bool:
    """Whether a ``torch.func`` transform or forward-mode differentiation is running, which only plain PyTorch supports.

    The level of the latter belongs to the process: torch.func's own transforms, which this thread would know of, do not count here.
    """
    return function_transforms_active() or (torch.autograd.forward_ad._current_level >= 0 and eager_transforms.JVP_NESTING == 0)


def function_transforms_active() -> bool:
    """Whether a ``torch.func`` transform is running."""
    return torch._C._are_functorch_transforms_active()


def is_mapped(x: object) -> bool:
    """Whether a vmap that is running gives x another value in each of its calls."""
    while isinstance(x, Tensor) and is_functorch_wrapped_tensor(x):
        if is_batchedtensor(x):
            return True
        x = get_unwrapped(x)
    return False


def gradient_transform_active() -> bool:
    """Whether one of them is reverse-mode differentiation."""
    return function_transforms_active() and any(level.key() == TransformType.Grad for level in get_interpreter_stack() or ())


def host_arithmetic() -> contextlib.AbstractContextManager[Any]:
    """Where the host computes numbers of its own, which a running ``torch.func`` transform would wrap, and a mode record or fake."""
    outside = temporarily_clear_interpreter_stack() if function_transforms_active() else contextlib.nullcontext()
    return _without_modes(outside) if mode_active() and not torch.compiler.is_dynamo_compiling() else outside


@contextlib.contextmanager
def _without_modes(outside: contextlib.AbstractContextManager[Any]) -> Iterator[None]:
    with outside, torch._C.DisableTorchFunction(), no_dispatch():
        yield


def is_compiling() -> bool:
    """Whether this thread runs for a compiler. torch's own flag is also set while another thread compiles; what traces is a mode here."""
    return torch.compiler.is_dynamo_compiling() or (mode_active() and torch.compiler.is_compiling())


def is_exporting() -> bool:
    """Whether that compiler exports the program."""
    return torch.compiler.is_exporting() and is_compiling()


def plainly_eager() -> bool:
    """Whether torch runs without a compiler or a mode that looks at every op: then tensors may be made or shared behind its back."""
    return not (torch.compiler.is_dynamo_compiling() or mode_active())


def mode_active() -> bool:
    """Whether a mode looks at every op, as fake tensors' and the profilers' of graphs do."""
    return torch._C._len_torch_dispatch_stack() != 0


def is_captured(device: torch.device) -> bool:
    """Whether a CUDA graph is being recorded: what is copied from the host now would be copied again at every replay."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def values_readable(*tensors: Tensor) -> bool:
    """Whether values may be looked at without a wait: plain CPU tensors only, and no mode that records, which a number read escapes."""
    if function_transforms_active() or not plainly_eager():
        return False
    # A subclass may hold no values at all, as fake tensors do.
    return all(type(x) in (Tensor, torch.nn.Parameter) and x.device.type == "cpu" for x in tensors)


def has_values(x: Tensor) -> bool:
    """Whether x has values and an address, which tensors of the meta device and fake ones do not."""
    return not (x.is_meta or isinstance(x, FakeTensor))


def memory_reader(like: Tensor) -> Callable[[Tensor], int]:
    """What says which memory tensors like this are views of: by its address, or where there is none by the storage that stands for it."""
    return _address if has_values(like) else _stand_in


def _address(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _stand_in(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def worth_a_wait(values: Tensor) -> bool:
    """Whether values may be looked at once their device has finished; not while they are traced, transformed or captured."""
    return not (is_compiling() or transforms_active() or not has_values(values) or is_captured(values.device))
