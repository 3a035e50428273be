"""Solvers and time grids as torchdiffeq names them, which flow_matching and torchcfm's examples use too."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fm_fast import _checks
from fm_fast._solver.ode import Stops
from fm_fast._solver.trial import Tolerance
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


def tolerance_of(rtol: float, atol: float) -> Tolerance:
    _checks.positive_number("rtol", rtol)
    _checks.positive_number("atol", atol)
    return Tolerance(rtol, atol)


def times_of(name: str, t: object) -> np.ndarray:
    """Two or more strictly monotone times, float64."""
    _checks.tensor(name, t)
    assert isinstance(t, Tensor)
    if t.requires_grad:
        raise ValueError(f"{name} must not require a gradient, which a solve does not give its times; use {name}.detach()")
    if t.dim() != 1 or len(t) < 2:
        raise ValueError(f"{name} must hold two or more times in one dimension, got shape {tuple(t.shape)}")
    times = t.to(device="cpu", dtype=torch.float64).numpy().copy()
    widths = np.diff(times)
    if not (np.all(widths > 0.0) or np.all(widths < 0.0)):
        raise ValueError(f"{name} must be strictly increasing or strictly decreasing, got {times.tolist()}")
    return times


def stops_at(times: np.ndarray, step_size: float | None, wanted: Sequence[int]) -> Stops:
    """Fixed steps that end at each of the times, of which the ``wanted`` are kept; None: no others."""
    if step_size is None:
        return Stops(times, tuple(wanted))
    _checks.positive_number("step_size", step_size)
    count = max(1, math.ceil(abs(times[-1] - times[0]) / step_size - WHOLE_STEPS))
    even = times[0] + math.copysign(step_size, times[-1] - times[0]) * np.arange(1, count)
    return _merged(times, even, WHOLE_STEPS * step_size, wanted)


def _merged(times: np.ndarray, others: np.ndarray, same: float, wanted: Sequence[int]) -> Stops:
    """Both together, where one of the others that rounding has moved off a time is that time."""
    apart = np.abs(others[:, None] - times[None, :]).min(axis=1, initial=np.inf) > same
    nodes = np.sort(np.concatenate([times, others[apart]]))
    nodes = nodes if times[-1] > times[0] else nodes[::-1].copy()
    return Stops(nodes, tuple(int(np.flatnonzero(nodes == times[position])[0]) for position in wanted))
