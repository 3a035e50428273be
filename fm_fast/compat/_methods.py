"""Solvers and time grids as torchdiffeq names them, which flow_matching and torchcfm's examples use too."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fm_fast import _checks
from fm_fast._solver.arithmetic import Tolerance
from fm_fast._solver.ode import Accuracy, Stops
from fm_fast.solvers import ADAPTIVE, METHODS, EmbeddedRungeKutta, RungeKutta, Table

# torchdiffeq's "rk4" is Kutta's other rule of order four.
FIXED: dict[str, Table] = {
    "euler": METHODS["euler"],
    "midpoint": METHODS["midpoint"],
    "heun2": METHODS["heun2"],
    "heun3": RungeKutta(((), (1 / 3,), (0.0, 2 / 3)), (1 / 4, 0.0, 3 / 4)),
    "rk4": METHODS["rk4_38"],
}
MAX_STEPS = 2**31 - 1  # torchdiffeq's limit
WHOLE_STEPS = 1e-6  # a last step shorter than this part of the others is rounding


def method_named(name: object) -> Table | EmbeddedRungeKutta:
    """What one of torchdiffeq's names stands for; ValueError for implicit, Adams and SciPy's methods."""
    _checks.one_of("method", name, (*FIXED, *ADAPTIVE))
    return FIXED[str(name)] if name in FIXED else ADAPTIVE[str(name)]


def accuracy_of(method: Table | EmbeddedRungeKutta, rtol: float, atol: float, max_steps: int = MAX_STEPS) -> Accuracy:
    """The tolerances, looked at where the method does."""
    if not isinstance(method, EmbeddedRungeKutta):
        return Accuracy(Tolerance(1.0, 1.0), max_steps)
    _checks.positive_number("rtol", rtol)
    _checks.positive_number("atol", atol)
    return Accuracy(Tolerance(rtol, atol), max_steps)


def times_of(name: str, t: object) -> np.ndarray:
    """Two or more strictly monotone times, float64."""
    _checks.tensor(name, t)
    assert isinstance(t, Tensor)
    if t.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} must not require a gradient, which a solve does not give its times; use {name}.detach()")
    if t.dim() != 1 or len(t) < 2:
        raise ValueError(f"{name} must hold two or more times in one dimension, got shape {tuple(t.shape)}")
    times = np.array(t.double().tolist())  # which transforms let through
    widths = np.diff(times)
    if not (np.all(widths > 0.0) or np.all(widths < 0.0)):
        raise ValueError(f"{name} must be strictly increasing or strictly decreasing, got {times.tolist()}")
    return times


def stops_at(times: np.ndarray, step_size: float | None, wanted: Sequence[int]) -> Stops:
    """Fixed steps that end at each of the times, of which the ``wanted`` are kept; None: no others."""
    if step_size is None:
        return Stops(times, tuple(wanted))
    _checks.positive_number("step_size", step_size)
    # Times are float32 as a rule, and are still rounded so where they have become float64.
    same = max(WHOLE_STEPS * step_size, min(4.0 * torch.finfo(torch.float32).eps * np.abs(times).max(), 0.25 * step_size))
    count = max(1, math.ceil((abs(times[-1] - times[0]) - same) / step_size))
    even = times[0] + math.copysign(step_size, times[-1] - times[0]) * np.arange(1, count)
    return _merged(times, even, same, wanted)


def stops_on(times: np.ndarray, grid: object, rounding: float, wanted: Sequence[int]) -> Stops:
    """Fixed steps that end at the nodes of the grid [N], from the first of the times to the last, and at each of the times.

    rounding: of the times and the grid, relative: a node as near to a time is that time.
    """
    name = "the grid of options['grid_constructor']"
    nodes = times_of(name, grid)
    if nodes[0] != times[0] or nodes[-1] != times[-1]:
        raise ValueError(f"{name} must run from t[0] = {times[0]} to t[-1] = {times[-1]}, got {nodes[0]} to {nodes[-1]}")
    same = min(4.0 * rounding * np.abs(nodes).max(), 0.25 * np.abs(np.diff(nodes)).min())
    return _merged(times, nodes[1:-1], same, wanted)


def rounding_of(*tensors: Tensor) -> float:
    """The largest relative rounding of their dtypes."""
    return max(torch.finfo(x.dtype).eps if x.is_floating_point() else 0.0 for x in tensors)


def _merged(times: np.ndarray, others: np.ndarray, same: float, wanted: Sequence[int]) -> Stops:
    """Both together, where one of the others that rounding has moved off a time is that time."""
    rising = times if times[-1] > times[0] else times[::-1]
    after = np.clip(np.searchsorted(rising, others), 1, len(rising) - 1)
    apart = np.minimum(np.abs(others - rising[after - 1]), np.abs(others - rising[after])) > same
    nodes = np.sort(np.concatenate([rising, others[apart]]))
    places = np.searchsorted(nodes, times)
    if rising is not times:
        nodes, places = nodes[::-1].copy(), len(nodes) - 1 - places
    return Stops(nodes, places[list(wanted)].tolist())
