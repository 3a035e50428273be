"""What is compared: ops, the inputs they run on, and the providers that compute them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Setting:
    """One problem: where and on what every provider of an op runs."""

    device: torch.device
    size: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    mode: str


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


@dataclass(frozen=True)
class Op:
    """A benchmarked op.

    Attributes:
        inputs: new inputs for a setting.
        providers: those for a setting, the first being ours: every ratio is another's time over its time.
        check: raises AssertionError if a step's results are not the op's, recomputed in float64.
        bytes_moved: what the op must at least read and write.
    """

    name: str
    sizes: Mapping[str, tuple[int, ...]]
    modes: tuple[str, ...]
    inputs: Callable[[Setting], Any]
    providers: Callable[[Setting], list[Provider]]
    check: Callable[[Any, Setting, Callable[[], Any]], None]
    bytes_moved: Callable[[Setting], int]
