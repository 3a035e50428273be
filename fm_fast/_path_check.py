"""A path of the user's own, compared with what it claims: for ``fm_fast.testing``."""

import torch
from torch import Tensor

from fm_fast.objectives import Schedule, schedule
from fm_fast.paths import Path, as_path, time_limits

TIMES = 201
STEP = 1e-6  # of the central differences
TOLERANCE = 1e-4  # of a derivative, beside 1 + its size


def check_path(path: Path) -> None:
    """ValueError where a path cannot be one: for the tests of a path of your own, whose training would go wrong in silence.

    Within its limits, d_alpha and d_sigma must be the derivatives of alpha and sigma (compared with central differences), sigma must not
    be negative, and alpha / sigma must grow from the noise at t = 0 to the data at t = 1.
    """
    chosen = as_path(path)
    low, high = time_limits(chosen)
    margin = 0.01 * (high - low)  # where slopes may be infinite
    t = torch.linspace(low + margin, high - margin, TIMES, dtype=torch.float64, device="cpu")
    here, behind, ahead = (Schedule(*(part.detach() for part in schedule(chosen, t + shift))) for shift in (0.0, -STEP, STEP))
    _check_derivative("alpha", t, here.da, (ahead.a - behind.a) / (2.0 * STEP))
    _check_derivative("sigma", t, here.ds, (ahead.s - behind.s) / (2.0 * STEP))
    if bool((here.s < 0.0).any()):
        raise ValueError(f"sigma of a path must not be negative, got {float(here.s.min()):.6g} at t = {float(t[here.s.argmin()]):.4g}")
    falls = (here.a / here.s).diff() < 0.0
    if bool(falls.any()):
        raise ValueError(
            "alpha / sigma of a path must grow with t, from the noise at t = 0 to the data at t = 1; "
            f"it falls at t = {float(t[falls.nonzero()[0, 0]]):.4g}"
        )


def _check_derivative(name: str, t: Tensor, told: Tensor, found: Tensor) -> None:
    errors = (told - found).abs() / (1.0 + found.abs())
    worst = errors.nan_to_num(torch.inf).argmax()
    if not bool(errors[worst] <= TOLERANCE):
        raise ValueError(
            f"d_{name} of a path must be the derivative of {name}, got {float(told[worst]):.6g} at t = {float(t[worst]):.4g}, "
            f"where it is {float(found[worst]):.6g}"
        )
