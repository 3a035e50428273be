"""What is compared: ops, the inputs they run on, and the providers that compute them."""

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.costs import Costs, of_step
from benchmarks.timing import Clock


@dataclass(frozen=True)
class Setting:
    """One problem: where and on what every provider of an op runs, and which part of a step, or what it is part of (``run.PARTS``)."""

    device: torch.device
    size: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    mode: str
    part: str = "full"

    @property
    def problem(self) -> str:
        """The mode, and the part where it is not the whole."""
        return self.mode if self.part == "full" else f"{self.mode}, {self.part}"


@dataclass(frozen=True)
class Provider:
    """One way to compute an op.

    Attributes:
        name: as printed.
        build: from the inputs of a setting to a function without arguments that does one step and returns its results.
        gated: False for a bound that moves the op's memory without computing it.
    """

    name: str
    build: Callable[[Any, Setting], Callable[[], Any]]
    gated: bool = True

    @property
    def ours(self) -> bool:
        """Whether it is fm_fast, whose results have no excuse."""
        return self.name.startswith("fm_fast")


class Inexact(AssertionError):
    """Raised by a check: results that are off by more than the op allows, and by no more than the provider's own arithmetic explains.

    Such a provider is shown with its error and without a ratio, unless it is ours: then the run ends, as it does for a wrong result.
    """

    def __init__(self, message: str, error: float) -> None:
        super().__init__(message)
        self.error = error


def bytes_of_shape(setting: Setting) -> int:
    """Of one tensor of the setting's shape."""
    return math.prod(setting.shape) * setting.dtype.itemsize


def keeping_graphs() -> contextlib.AbstractContextManager[None]:
    """For a forward pass whose backward pass runs many times: what is compiled here must not reuse the memory of what it saves."""
    import torch._functorch.config

    return torch._functorch.config.patch(donated_buffer=False)


# (steps by name, rounds, clock) -> values by name, of which those with the same index are compared
Observe = Callable[[Mapping[str, Any], int, Clock], dict[str, list[float]]]


@dataclass(frozen=True)
class Op:
    """A benchmarked op.

    Attributes:
        sizes: shapes by name. modes: variants of the problem.
        inputs: new inputs for a setting.
        providers: those for a setting, the first being ours: every ratio is another's value over its value.
        check: raises AssertionError if a step's results are not the op's, recomputed in float64; Inexact where that is to be expected.
        bytes_moved: what the op must at least read and write; needed on a GPU.
        devices: where it runs.
        peers: packages that it compares with, which may be missing.
        rounds: of a run that does not ask for a number.
        unit: of the values that are observed: "ms", "us", "nats2".
        observe: what is compared where it is not the milliseconds of a step.
        relation: "ratio" to our value, or "share" of the first provider's where that is the whole of which the others are parts.
        tensor_bytes: of one full-size tensor, by which memory and traffic are also given; None where no tensor stands for the op.
        costs: of a step on a device, if they are not those of one call.
        work: what a step does, by the metric of its rate, which is this number over the step's milliseconds.
        parts: of a step that can be timed alone, after the whole; or what it is part of.
        gpu_sizes: further sizes, on a GPU.
    """

    name: str
    sizes: Mapping[str, tuple[int, ...]]
    modes: tuple[str, ...]
    inputs: Callable[[Setting], Any]
    providers: Callable[[Setting], list[Provider]]
    check: Callable[[Any, Setting, Any], None]
    bytes_moved: Callable[[Setting], int] | None = None
    devices: tuple[str, ...] = ("cpu", "cuda")
    peers: tuple[str, ...] = ()
    rounds: int = 60
    unit: str = "ms"
    observe: Observe | None = None
    relation: str = "ratio"
    tensor_bytes: Callable[[Setting], int] | None = None
    costs: Callable[[Any, torch.device], Costs] = of_step
    work: Callable[[Setting], Mapping[str, float]] = lambda setting: {}
    parts: tuple[str, ...] = ("full",)
    gpu_sizes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
