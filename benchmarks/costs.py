"""What a step costs besides its time: the peak of the memory that it takes, the kernels that it runs, the bytes that they read and write.

Counted once, after the timing. Memory is what torch's allocators hand out, inside compiled graphs too; what a library takes from the
system by itself is not seen. On the CPU, memory from before the step that it frees does not lower its peak. A tensor that a kernel is
given is read or written once: what a cache spares, or a kernel does twice, is not seen either.
"""

import contextlib
import functools
import gc
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MIB = 1 << 20
# What the profiler calls a graph of torch.compile, whose kernels no dispatcher sees: the second alone, where only its backward pass runs
COMPILED = ("Torch-Compiled Region", "## Call CompiledFxGraph")
NAMESPACES = ("fm_fast", "fm_fast_triton")
# Names of ops, without their overloads. These do no work, as views do none:
FREE = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "_local_scalar_dense")
# these write what they change without reading it, as every op of ours does but for the arguments named:
OVERWRITING = ("fill_", "zero_", "copy_", "normal_", "uniform_", "random_", "bernoulli_", "_foreach_copy_", "_foreach_zero_")
CHANGED = {"adamw_ema": ("p", "m", "v", "averages", "counts"), "divergence_step": ("sums",)}
# Of these tables an op reads a row.
TABLES = {"linear_step": {"table"}}


@dataclass(frozen=True)
class Costs:
    """Of one step: the peak of its additional memory in bytes; kernels run; bytes read and written, None where that cannot be known."""

    peak: int
    kernels: float | None
    traffic: float | None

    def of_one_more(self, other: "Costs", steps: int) -> "Costs":
        """Of one of the ``steps`` by which the other took more; the peak of this one."""
        kernels, traffic = (
            None if more is None or less is None else (more - less) / steps
            for more, less in ((other.kernels, self.kernels), (other.traffic, self.traffic))
        )
        return Costs(self.peak, kernels, traffic)


def of_step(step: Callable[[], Any], device: torch.device) -> Costs:
    """Runs the step two or three times. On the CPU kernels are the operations that PyTorch dispatches and that do work."""
    # A collection of garbage meanwhile would give back what others left.
    with _without_collection():
        peak = _peak_on_device(step, device) if device.type == "cuda" else None
        events = _events(step, device)
        kernels = _kernels_on_device(events) if device.type == "cuda" else None
        peak = max(_running_sums(events), default=0) if peak is None else peak
        if any(event.name().startswith(COMPILED) for event in events):
            return Costs(peak, kernels, None)
        with Counter() as counter:
            step()
    return Costs(peak, counter.kernels if kernels is None else kernels, counter.traffic)


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _events(step: Callable[[], Any], device: torch.device) -> list[Any]:
    """What the profiler saw of a step, in the order of its beginnings."""
    on_gpu = device.type == "cuda"
    with profile(profile_memory=True, use_device="cuda" if on_gpu else None, use_kineto=on_gpu) as recorded:
        step()
        if on_gpu:
            torch.cuda.synchronize(device)
    assert recorded.kineto_results is not None
    return sorted(recorded.kineto_results.events(), key=lambda event: event.start_ns())


def _running_sums(events: Sequence[Any]) -> Iterator[int]:
    """Bytes taken since the beginning, after each event of torch's allocator."""
    return itertools.accumulate(event.nbytes() for event in events if event.name() == "[memory]")


def _peak_on_device(step: Callable[[], Any], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _kernels_on_device(events: Sequence[Any]) -> int:
    """Kernels, copies and fills that a GPU runs."""
    return sum("CUDA" in str(event.device_type()) and event.name() != "[memory]" and not event.is_user_annotation() for event in events)


class Counter(TorchDispatchMode):
    """Counts the ops below autograd that do work, and the bytes of their arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels, self.traffic = 0, 0

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = op(*args, **(kwargs or {}))
        use = _use(op)
        if use.works:
            self.kernels += len(args[0]) if use.loops and args[0][0].device.type == "cpu" else 1
            self.traffic += use.bytes_of(args, kwargs or {}, result)
        return result


@dataclass(frozen=True)
class _Use:
    """What an op does with its arguments. works: not only a view or an allocation. loops: torch's foreach ops, one by one on the CPU."""

    works: bool
    loops: bool
    names: tuple[str, ...]
    read: frozenset[str]
    written: frozenset[str]

    def bytes_of(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
        """A tensor given twice is read once, and of a broadcast one only what is in memory."""
        values = dict(zip(self.names, args, strict=False)) | kwargs
        read = _distinct([value for name, value in values.items() if name in self.read])
        written = _distinct([*(values[name] for name in self.written if name in values), result])
        return sum(map(_bytes, (*read, *written)))


@functools.cache
def _use(op: Any) -> _Use:
    name, arguments = op.name().partition("::")[2].partition(".")[0], op._schema.arguments
    changed = {argument.name for argument in arguments if argument.is_write}
    if op.namespace in NAMESPACES:
        overwritten = changed - set(CHANGED.get(name, ()))
    else:
        overwritten = changed if name in OVERWRITING else {argument.name for argument in arguments if argument.is_out}
    names = tuple(argument.name for argument in arguments)
    # randn_like and its kin take a tensor for its shape alone.
    read = set() if name.startswith("new_") or name.endswith("_like") else set(names) - overwritten - TABLES.get(name, set())
    works = not op.is_view and name not in FREE
    return _Use(works, name.startswith("_foreach_"), names, frozenset(read), frozenset(changed))


def _distinct(values: Iterable[Any]) -> list[Tensor]:
    return list({id(leaf): leaf for leaf in tree_leaves(list(values)) if isinstance(leaf, Tensor)}.values())


def _bytes(x: Tensor) -> int:
    return math.prod(size for size, stride in zip(x.shape, x.stride(), strict=True) if stride or not size) * x.element_size()
