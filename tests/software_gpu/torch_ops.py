"""Torch's own CUDA ops on the software GPU: its CPU kernels compute them in the device's memory, when the stream's turn comes."""

import ctypes
import itertools
import traceback
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

# These need no kernel, only the runtime.
NATIVE = {
    "empty.memory_format", "empty_strided", "record_stream", "resize_", "resize_as_", "_local_scalar_dense", "pin_memory", "_pin_memory",
    "is_pinned", "_copy_from", "_resize_output_", "_has_same_storage_numel",
}  # fmt: skip
# Composite ops that pick a kernel by the device: registered here, so that they do not pick one of CUDA's libraries.
COMPOSITE = ("copy_", "convolution", "convolution_backward", "_convolution")
# Their shapes depend on values, for which torch waits too.
SYNCHRONISING = {
    "nonzero",
    "masked_select",
    "_unique2",
    "_unique",
    "unique_dim",
    "unique_consecutive",
    "repeat_interleave.Tensor",
    "bincount",
}

INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")

Run = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Place(NamedTuple):
    """Where a tensor of the device lies: memory of this process, kept by nobody, as a kernel's arguments are."""

    pointer: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def view(self) -> Tensor:
        if 0 in self.size:
            return torch.empty_strided(self.size, self.stride, dtype=self.dtype)
        extent = 1 + sum((n - 1) * step for n, step in zip(self.size, self.stride, strict=True))
        memory = (ctypes.c_char * (extent * self.dtype.itemsize)).from_address(self.pointer)
        return torch.frombuffer(memory, dtype=self.dtype).as_strided(self.size, self.stride)

    def stand_in(self) -> Tensor:
        """Of the same geometry, for shapes and dtypes of results."""
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype).zero_()


def place_of(tensor: Tensor) -> Place:
    return Place(tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())


_queued: dict[int, Callable[[], None]] = {}
_tickets = itertools.count(1)


@Run
def _run(ticket: int) -> None:
    try:
        with torch.inference_mode(False), torch.no_grad():
            _queued[ticket]()
    except BaseException:  # as a kernel that fails: nothing works on the device any more
        traceback.print_exc()
        _runtime.software_gpu_fail()


@Run
def _forget(ticket: int) -> None:
    _queued.pop(ticket, None)


_runtime = ctypes.CDLL("libcudart.so.13")
_runtime.software_gpu_submit.argtypes = [ctypes.c_void_p, Run, Run, ctypes.c_void_p]


def submit(device: torch.device, work: Callable[[], None]) -> None:
    """Have a stream of the device do this work when its turn comes, or at every replay of what it captures."""
    ticket = next(_tickets)
    _queued[ticket] = work
    with torch.cuda.device(device):  # whose default stream has no name
        error = _runtime.software_gpu_submit(torch._C._cuda_getCurrentRawStream(device.index), _run, _forget, ticket)
    if error:
        raise RuntimeError(f"the software GPU takes no work: CUDA error {error}")


def is_there(x: Any) -> bool:
    return isinstance(x, Tensor) and x.device.type == "cuda"


def on_host(x: Any) -> Any:
    """An argument as the CPU's kernel takes it, other than tensors of the device; what may change until then is copied."""
    if isinstance(x, torch.device):
        return torch.device("cpu")
    if isinstance(x, torch.Generator):
        return None
    return x.clone() if isinstance(x, Tensor) else x


def wait(device: torch.device) -> None:
    """As torch waits for a number: an error in a capture, and where the user asked for one."""
    torch.zeros(1, device=device).item()


def device_of(flat: list[Any]) -> torch.device:
    """The one that the tensors are on, else the one that is asked for; RuntimeError where torch's own kernels refuse other arguments."""
    device = next((x.device for x in flat if is_there(x)), None) or next(x for x in flat if isinstance(x, torch.device))
    device = torch.device("cuda", torch.cuda.current_device()) if device.index is None else device
    for x in flat:
        if isinstance(x, Tensor) and x.device != device and (is_there(x) or x.dim() > 0):
            raise RuntimeError(f"Expected all tensors to be on the same device, but found at least two devices, {device} and {x.device}!")
        if isinstance(x, torch.Generator) and x.device.type != "cuda":
            raise RuntimeError(f"Expected a 'cuda' device type for generator but found '{x.device.type}'")
    return device


def as_given(x: Any) -> Any:
    return place_of(x) if is_there(x) else on_host(x)


def moved_there(x: Tensor, device: torch.device) -> Tensor:
    """What a kernel has left there: no wait that a user hears of."""
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("default")
    try:
        return x.to(device)
    finally:
        torch.cuda.set_sync_debug_mode(mode)


class Op:
    """One of torch's ops, for tensors of the device."""

    def __init__(self, op: torch._ops.OpOverload) -> None:
        schema = op._schema
        self.op = op
        self.name = schema.name.removeprefix("aten::") + (f".{schema.overload_name}" if schema.overload_name else "")
        self.arguments = [argument.name for argument in schema.arguments]
        self.tensors = [i for i, argument in enumerate(schema.arguments) if str(argument.type) == "Tensor"]
        self.written = [self._written(value.alias_info) for value in schema.returns]
        self.waits = self.name in SYNCHRONISING or any("Tensor" not in str(value.type) for value in schema.returns)

    def _written(self, alias: Any) -> str | None:
        """The argument that is returned, where that is no new tensor."""
        if alias is None:
            return None
        given = {argument.name: argument.alias_info for argument in self.op._schema.arguments if argument.alias_info is not None}
        return next(name for name, info in given.items() if info.before_set == alias.before_set)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.name.split(".")[0] in INDEXING:
            args = (args[0], [None if index is None else index.to(args[0].device) for index in args[1]], *args[2:])
        flat, shape = tree_flatten((args, kwargs))
        device = device_of(flat)
        if self.waits or self._picks_by_mask(args):
            return self._at_once(flat, shape, device)
        given = dict(zip(self.arguments, args, strict=False)) | kwargs
        results = [given[name] if name else made for name, made in zip(self.written, self._new(flat, shape, device), strict=True)]
        self._start(flat, shape, results, device)
        return tuple(results) if len(results) > 1 else results[0] if results else None

    def _compute(self, flat: list[Any], shape: Any) -> tuple[Any, ...]:
        """What the CPU's kernel returns, of as many things as the op says."""
        args, kwargs = tree_unflatten(flat, shape)
        # Python has a number where the op has a tensor that was made of one: then by the overload for numbers.
        numbers = any(i < len(args) and isinstance(args[i], (bool, int, float, complex)) for i in self.tensors)
        found = (self.op.overloadpacket if numbers else self.op)(*args, **kwargs)
        return found if len(self.written) > 1 else (found,) if self.written else ()

    def _new(self, flat: list[Any], shape: Any, device: torch.device) -> tuple[Any, ...]:
        """Tensors on the device of the shapes that the op returns; what it is to write to gets the size that it needs.

        The CPU's kernel is asked, with zeros for every number, since those of the device are not yet there.
        """
        trial = [place_of(x).stand_in() if is_there(x) else on_host(x) for x in flat]
        found = self._compute(trial, shape)
        for x, tried in zip(flat, trial, strict=True):
            if is_there(x) and x.shape != tried.shape:
                x.resize_(tried.shape)
        return tree_map_only(Tensor, lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device), found)

    def _start(self, flat: list[Any], shape: Any, results: list[Any], device: torch.device) -> None:
        places = [as_given(x) for x in flat]
        new = [(i, [as_given(x) for x in tree_leaves(results[i])]) for i, name in enumerate(self.written) if name is None]

        def work() -> None:
            found = self._compute([x.view() if isinstance(x, Place) else x for x in places], shape)
            for i, targets in new:
                for target, x in zip(targets, tree_leaves(found[i]), strict=True):
                    if isinstance(target, Place):  # no gradient that was not asked for
                        target.view().copy_(x)

        submit(device, work)

    def _picks_by_mask(self, args: Any) -> bool:
        if self.name.split(".")[0] not in INDEXING:
            return False
        return any(is_there(x) and x.dtype in (torch.bool, torch.uint8) for x in args[1])

    def _at_once(self, flat: list[Any], shape: Any, device: torch.device) -> Any:
        wait(device)
        views = [place_of(x).view() if is_there(x) else on_host(x) for x in flat]
        with torch.no_grad():
            found = self._compute(views, shape)
        own = {id(view): x for view, x in zip(views, flat, strict=True)}
        moved = tree_map_only(Tensor, lambda x: own[id(x)] if id(x) in own else moved_there(x, device), found)
        return tuple(moved) if len(moved) > 1 else moved[0] if moved else None


class Copy:
    """copy_: what CUDA copies as it lies is left to torch; a kernel's work, such as conversions, is done on the device."""

    def __init__(self) -> None:
        self.native = torch.library.get_kernel("aten::copy_", "CUDA")
        self.compute = Op(torch.ops.aten.copy_.default)
        self.keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)

    def _as_it_lies(self, to: Tensor, source: Tensor) -> bool:
        dense = to.is_contiguous() or to.numel() == 1 + sum((n - 1) * s for n, s in zip(to.shape, to.stride(), strict=True))
        return to.dtype == source.dtype and to.shape == source.shape and to.stride() == source.stride() and dense

    def _by_runtime(self, to: Tensor, source: Tensor, non_blocking: bool) -> Tensor:
        self.native.call_boxed(self.keys, to, source, non_blocking)
        return to

    def __call__(self, to: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        if to.numel() == 0:
            return to
        if self._as_it_lies(to, source):
            return self._by_runtime(to, source, non_blocking)
        if is_there(to) and is_there(source) and to.device == source.device:
            self.compute(to, source)
            return to
        if is_there(to):
            source = source.contiguous()
            moved = torch.empty(source.shape, dtype=source.dtype, device=to.device)
            self._by_runtime(moved, source.to("cpu") if is_there(source) else source, non_blocking)
            self.compute(to, moved)
            return to
        converted = torch.empty(to.shape, dtype=to.dtype, device=source.device)
        self.compute(converted, source)
        if non_blocking and to.is_contiguous():
            return self._by_runtime(to, converted, True)
        return to.copy_(self._by_runtime(torch.empty(to.shape, dtype=to.dtype), converted, False))


def _ops() -> list[torch._ops.OpOverload]:
    """Those of torch that have a kernel for CUDA and are no mere views."""
    found = []
    for name in torch._C._dispatch_get_all_op_names():
        space, _, rest = name.partition("::")
        if space != "aten" or rest in NATIVE or rest.startswith("set_"):
            continue
        if rest not in COMPOSITE and not torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"):
            continue
        packet, _, overload = rest.partition(".")
        op = getattr(getattr(torch.ops.aten, packet), overload or "default")
        if not any(value.alias_info is not None and not value.alias_info.is_write for value in op._schema.returns):
            found.append(op)
    return found


def install() -> torch.library.Library:
    """Give torch's CUDA ops these kernels, as long as the result lives."""
    library, copy = torch.library.Library("aten", "IMPL"), Copy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for op in map(Op, _ops()):
            library.impl(op.name, copy if op.name == "copy_" else op, "CUDA")
    # Of several kernels, those that the CPU has too.
    torch.backends.cudnn.enabled = False
    for choose in (
        torch.backends.cuda.enable_flash_sdp,
        torch.backends.cuda.enable_mem_efficient_sdp,
        torch.backends.cuda.enable_cudnn_sdp,
    ):
        choose(False)
    return library
