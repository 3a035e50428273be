"""Time grids: where a fixed-step solver places its steps. Frozen value objects; times are float64 numbers on the host.

A grid maps evenly spaced u in [0, 1] to times in [0, 1], from noise to data; an interval [t0, t1] receives the same pattern, scaled.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from fm_fast import _checks
from fm_fast.objectives import schedule
from fm_fast.paths import EDGE, Path

Times = np.ndarray


@runtime_checkable
class Grid(Protocol):
    """Anything with ``nodes(steps, path)``: steps + 1 increasing float64 times from 0 to 1."""

    def nodes(self, steps: int, path: Path) -> Times: ...


@dataclass(frozen=True)
class UniformGrid:
    """Equal steps."""

    def nodes(self, steps: int, path: Path) -> Times:
        return _shares(steps)


@dataclass(frozen=True)
class CosineGrid:
    """t = (1 - cos(pi u)) / 2: short steps at both ends."""

    def nodes(self, steps: int, path: Path) -> Times:
        return 0.5 * (1.0 - np.cos(math.pi * _shares(steps)))


@dataclass(frozen=True)
class ShiftGrid:
    """The timestep shift of Stable Diffusion 3 (Esser et al., 2024, equation 23).

    The noise level s = 1 - t becomes shift s / (1 + (shift - 1) s). shift > 1 spends more steps near the noise; 1 is the uniform grid.
    """

    shift: float = 3.0

    def __post_init__(self) -> None:
        _checks.positive_number("shift", self.shift)

    def nodes(self, steps: int, path: Path) -> Times:
        level = 1.0 - _shares(steps)
        return 1.0 - self.shift * level / (self.shift * level + (1.0 - level))


@dataclass(frozen=True)
class KarrasGrid:
    """Noise-to-signal ratios sigma(t) / alpha(t) with evenly spaced rho-th roots (Karras et al., 2022, equation 5).

    Ratios run from sigma_max down to sigma_min, or between the path's own largest and smallest ratio where these are closer (VE); the
    first and the last node are then moved to the ends of the interval.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        for name in ("sigma_min", "sigma_max", "rho"):
            _checks.positive_number(name, getattr(self, name))
        if not self.sigma_min < self.sigma_max:
            raise ValueError(f"sigma_min and sigma_max must satisfy 0 < sigma_min < sigma_max, got {self.sigma_min} and {self.sigma_max}")

    def nodes(self, steps: int, path: Path) -> Times:
        high, low = self._range(path)
        with np.errstate(over="ignore"):
            roots = np.array([high, low]) ** (1.0 / self.rho)
        if not np.isfinite(roots).all():
            raise ValueError(f"rho must be large enough for finite roots of ratios up to {high:g}, got {self.rho}")
        times = _time_of_ratio(np.linspace(roots[0], roots[1], steps + 1) ** self.rho, path)
        times[0], times[-1] = 0.0, 1.0
        return times

    def _range(self, path: Path) -> tuple[float, float]:
        ends = torch.tensor([0.0, 1.0], dtype=torch.float64, device="cpu")
        point = schedule(path, ends)
        first, last = (point.s / point.a).tolist()
        high, low = min(self.sigma_max, first), max(self.sigma_min, last)
        if high <= low:
            raise ValueError(
                f"sigma_min and sigma_max must meet the path's ratios, {last:g} to {first:g}, got {self.sigma_min} and {self.sigma_max}"
            )
        return high, low


NAMED: dict[str, Grid] = {"uniform": UniformGrid(), "cosine": CosineGrid(), "shift": ShiftGrid(), "karras": KarrasGrid()}
BISECTIONS = 60
# Times that differ by no more are one; and so are two that rounding tells apart, as far as it is a small share of a step.
SAME_TIME, SMALL_SHARE = 1e-9, 0.01
KEPT_INSIDE = 2.0 * EDGE  # how far nodes may be from the times that were meant, where a path keeps its ends inside [0, 1]


def _shares(steps: int) -> Times:
    """0, 1 / steps, ..., 1; float64 from the start, since torch.compile divides whole numbers in float32."""
    return np.arange(steps + 1, dtype=np.float64) / steps


def _time_of_ratio(ratios: Times, path: Path) -> Times:
    """Times at which sigma / alpha, which falls with t, has these values."""
    low, high = np.zeros_like(ratios), np.ones_like(ratios)
    for _ in range(BISECTIONS):
        middle = 0.5 * (low + high)
        point = schedule(path, torch.from_numpy(middle))
        too_noisy = (point.s > torch.from_numpy(ratios) * point.a).numpy()
        low, high = np.where(too_noisy, middle, low), np.where(too_noisy, high, middle)
    return 0.5 * (low + high)


def grid_nodes(
    grid: "str | Grid | Sequence[float]", steps: int | None, t0: float, t1: float, path: Path, limits: tuple[float, float]
) -> Times:
    """The nodes of a solve from t0 to t1 (t0 < t1), kept inside ``limits``; float64 [steps + 1], strictly increasing.

    Raises ValueError for a missing or contradictory number of steps, unknown grids, and times that do not increase inside [0, 1].
    """
    _check_interval(t0, t1)
    if isinstance(grid, (str, type, Grid)):
        pattern = _checked_pattern(_as_grid(grid).nodes(_required(steps), path), _required(steps))
        low, high = max(t0, limits[0]), min(t1, limits[1])
        if low >= high:
            raise ValueError(f"t0 and t1 must leave room inside [{limits[0]}, {limits[1]}], where the path is solved, got {t0} and {t1}")
        nodes = pattern * (high - low) + low
        nodes[0], nodes[-1] = low, high
        return _increasing(nodes, "grid")
    return _increasing(np.clip(_explicit(grid, steps, t0, t1), *limits), f"grid, kept inside [{limits[0]}, {limits[1]}],")


def _checked_pattern(pattern: object, steps: int) -> Times:
    """What a grid object returned, as an array."""
    times = _times("grid.nodes", pattern)  # type: ignore[arg-type]
    if times.shape != (steps + 1,) or times[0] != 0.0 or times[-1] != 1.0:
        found = f"{len(times)} from {times[0]} to {times[-1]}" if len(times) else "none"
        raise ValueError(f"grid.nodes must return {steps + 1} times from 0 to 1, got {found}")
    return times


def _check_interval(t0: float, t1: float) -> None:
    if not (0.0 <= t0 < t1 <= 1.0):
        raise ValueError(f"t0 and t1 must satisfy 0 <= t0 < t1 <= 1, got {t0} and {t1}; t0 is the noise's end of every solve")


def _as_grid(grid: "str | type | Grid") -> Grid:
    if not isinstance(grid, (str, type)):
        return grid
    if not isinstance(grid, str) or grid not in NAMED:
        raise ValueError(f"grid must be one of {', '.join(NAMED)}, a grid object or a sequence of times, got {grid!r}")
    return NAMED[grid]


def _required(steps: int | None) -> int:
    if steps is None:
        raise ValueError("steps must be given for a fixed-step method: the number of steps, a whole number of at least 1")
    _checks.count("steps", steps)
    return steps


def _explicit(grid: Sequence[float], steps: int | None, t0: float, t1: float) -> Times:
    times = _times("grid", grid)
    if len(times) < 2:
        raise ValueError(f"grid must hold at least two times, got {len(times)}")
    if steps is not None and _required(steps) != len(times) - 1:
        raise ValueError(f"steps must be left out or equal the {len(times) - 1} steps of grid, got {steps}")
    if (t0, t1) != (0.0, 1.0) and not np.allclose((t0, t1), times[[0, -1]], rtol=0.0, atol=_rounding_of_ends(grid)):
        raise ValueError(f"t0 and t1 must be left out or equal the ends of grid, {times[0]} and {times[-1]}, got {t0} and {t1}")
    return _increasing(times, "grid")


def _times(name: str, values: Sequence[float]) -> Times:
    if isinstance(values, torch.Tensor):
        _check_times_tensor(name, values)
    try:
        times = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be a sequence of times, got {values!r}") from None
    if times.ndim != 1 or not np.all((times >= 0.0) & (times <= 1.0)):
        raise ValueError(f"{name} must be a sequence of times in [0, 1], got {values!r}")
    return times


def _check_times_tensor(name: str, values: torch.Tensor) -> None:
    if values.device.type != "cpu":
        raise ValueError(f"{name} must be on the CPU, where a solve's times are numbers, got a tensor on {values.device}")
    if values.requires_grad:
        raise ValueError(f"{name} must not require a gradient, which a solve does not give its times; use {name}.detach()")
    if values.dtype == torch.bfloat16:
        raise TypeError(f"{name} must be float64, float32 or float16, got torch.bfloat16, which holds times to three digits only")


def _increasing(times: Times, name: str) -> Times:
    falls = np.flatnonzero(~(np.diff(times) > 0.0))
    if falls.size:
        raise ValueError(f"{name} must be strictly increasing, got {times[falls[0] + 1]} after {times[falls[0]]}")
    return times


def with_times(nodes: Times, wanted: Sequence[float]) -> tuple[Times, list[int]]:
    """The nodes with the wanted times added, and the position of each of these: a step that contains one is split there.

    Ends that the path keeps a little inside [0, 1] may be asked for as 0 and 1. A time that rounding has moved off a node is that node,
    be it the rounding of the wanted times' own dtype: a step of 3e-8 would cost calls of the network, and ruin the weights of multistep
    methods.
    """
    given = _times("save", wanted)
    extra = np.clip(given, nodes[0], nodes[-1])
    margins = [KEPT_INSIDE if margin <= KEPT_INSIDE else _rounding_of_ends(wanted) for margin in (nodes[0], 1.0 - nodes[-1])]
    outside = (given < nodes[0] - margins[0]) | (given > nodes[-1] + margins[1])
    if outside.any():  # not the size of given[outside], which torch.compile takes for true where there are none
        raise ValueError(f"save must lie inside the solve, [{nodes[0]}, {nodes[-1]}], got {given[outside].tolist()}")
    merged, rounding = nodes, _rounding_of(wanted)
    for time in np.sort(extra):
        steps = np.diff(merged)
        shortest = np.minimum(np.append(steps, np.inf), np.insert(steps, 0, np.inf))  # beside each node
        if (np.abs(merged - time) > np.maximum(SAME_TIME, np.minimum(rounding, SMALL_SHARE * shortest))).all():
            merged = np.sort(np.append(merged, time))
    return merged, [int(np.abs(merged - time).argmin()) for time in extra]


def _rounding_of(times: object) -> float:
    """Of the times' dtype; Python's numbers may have been float32 before."""
    dtype = getattr(times, "dtype", torch.float32)
    if isinstance(dtype, np.dtype):
        return float(np.finfo(dtype).eps) if dtype.kind == "f" else 0.0
    return torch.finfo(dtype).eps if dtype.is_floating_point else 0.0


def _rounding_of_ends(times: object) -> float:
    """The same for times that are to be the ends of a solve, or within: float64 ones may have been float32 before, too, or sums."""
    return max(_rounding_of(times), torch.finfo(torch.float32).eps)
