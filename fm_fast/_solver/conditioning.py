"""Solves that multiply the network's errors: where the velocity divides by an alpha or sigma that is almost 0.

With the noise predicted on the OT path the velocity at time t is (x - o) / t, so a step of 0.02 from t = 1e-5 moves x by 2000 times the
error of o. Steps as short as t itself bear it as far as o follows x, as it should there: with do/dx = 1 - c an error grows like t^c. The
other end is like it for predicted data, where encode and likelihoods begin. Noise on the way takes steps back towards the first end.
"""

import warnings

import numpy as np
import torch

from fm_fast import _modes
from fm_fast._codes import PathCode
from fm_fast._solver.plan import churned_begins
from fm_fast.objectives import Objective, schedule, velocity_range
from fm_fast.paths import Path, kernel_form
from fm_fast.solvers import RungeKutta, Table

LARGEST_FACTOR = 30.0
ADAPTIVE_STEPS = 100  # what an adaptive method is taken to need


def warn_if_ill_conditioned(path: Path, objective: Objective, table: Table | None, nodes: np.ndarray, churn: float) -> None:
    """UserWarning where a step at an end of the solve multiplies the relative error of an output by more than ``LARGEST_FACTOR``.

    With ``churn`` it may be any step. Paths of the user's own are not looked at: their parameters may lie on a device that the host would
    have to wait for.
    """
    singular = objective.velocity_divides_by_alpha or objective.velocity_divides_by_sigma
    if not singular or kernel_form(path)[0] == PathCode.given or _modes.transforms_active():
        return
    limits = velocity_range(path, objective)
    if churn > 0.0 and table is not None:
        with _modes.host_arithmetic():
            times, widths = _evaluations(table, churned_begins(path, nodes, churn, limits[0]), nodes[1:])
    else:
        times, widths = _evaluations_at_the_ends(table, nodes)
    times = np.clip(times, *limits)
    factors = widths * error_factors(path, objective, times)
    worst = int(factors.argmax())
    if factors[worst] > LARGEST_FACTOR:
        remedy = "t0=0.01" if times[worst] < 0.5 else "t1=0.999"
        if churn > 0.0 and times[worst] < nodes[0]:
            remedy = "a larger t0 or less churn"
        warnings.warn(
            f"objective {objective.name!r} does not determine the velocity well at t = {times[worst]:.6g}: a step there multiplies an "
            f"error of the network's output by {factors[worst]:.2g}. Solve with {remedy}, or train the velocity",
            stacklevel=4,
        )


def _evaluations_at_the_ends(table: Table | None, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Times of the evaluations in the first and the last step, and the lengths of their steps.

    Towards a singular end errors shrink, and only fixed steps jump across: an adaptive method is judged by where it begins.
    """
    if table is None:
        return nodes[:1], np.full(1, np.ptp(nodes) / ADAPTIVE_STEPS)
    return _evaluations(table, nodes[[0, -2]], nodes[[1, -1]])


def _evaluations(table: Table, begins: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same of steps from ``begins`` to ``ends``."""
    stages = np.array(table.c if isinstance(table, RungeKutta) else (0.0, *table.start.c))
    steps = ends - begins
    return np.concatenate([begins + c * steps for c in stages]), np.tile(np.abs(steps), len(stages))


def error_factors(path: Path, objective: Objective, times: np.ndarray) -> np.ndarray:
    """The relative error of x, per unit of time, over that of the output, for data of variance 1."""
    with torch.no_grad(), _modes.host_arithmetic():
        t = torch.from_numpy(np.ascontiguousarray(times))
        point = schedule(path, t)
        target = objective.target(point)
        output = torch.hypot(target.c1, target.c0) / target.k.abs()
        r = objective.velocity(point)[1]
        # Not a number where an objective of one's own has k = 0 and the velocity does not use its output.
        return (r.abs() * output / torch.hypot(point.a, point.s)).nan_to_num(0.0).numpy()
