"""One prediction as another: the velocity, the noise, the score or the data that a network's output amounts to."""

import warnings

import torch
from torch import Tensor

from fm_fast import _checks, _modes, reference
from fm_fast.objectives import Objective, Schedule, as_objective, conversion_range, schedule, velocity_factors
from fm_fast.paths import EDGE, Path, as_path

PREDICTIONS = ("velocity", "noise", "score", "data")
LARGE_FACTOR = 1e3


def convert(
    output: Tensor, x: Tensor, t: Tensor | float, *, to: str, path: str | Path = "ot", objective: str | Objective = "velocity"
) -> Tensor:
    """What a network's output at (x, t) says of the velocity, the noise, the score or the data.

    With x = alpha x1 + sigma x0 and the velocity alpha' x1 + sigma' x0, any one of velocity, x0, -x0 / sigma and x1 gives the others
    (paper section 3 and appendix E.1). Of a trained network they are expectations given x: ``to="data"`` is where its flow is heading.

    Args:
        output: [B, ...], what the network returned for (x, t), floating.
        x: [B, ...], the point on the path, of output's shape and device.
        t: times, a number in [0, 1], a scalar tensor or [B]; kept inside the range in which the result is finite. At an end outside of it,
            such as t = 0 for the velocity of a predicted noise on the OT path, the network must be asked inside too.
        to: "velocity", "noise" (x0), "score" (-x0 / sigma, the gradient of log p_t) or "data" (x1).
        path, objective: those of training; an objective of one's own too.

    Returns:
        [B, ...] of x's dtype, computed in float32 (float64 for float64 inputs) from factors computed in float64; differentiable in output
        and x, and in t and the path's own parameters where they require a gradient.

    Raises:
        ValueError, TypeError: for any argument out of range or of wrong shape, dtype or device, naming it.

    Warns (UserWarning) of such an end, where values may be looked at without a wait.

    Naive equivalent for the velocity of the OT path and ``to="data"``::

        x1 = x + (1 - t) * output        # t shaped to broadcast
    """
    _checks.state("x", x)
    _checks.like("output", output, x, "x")
    _checks.time(t, x, "x")
    _checks.one_of("to", to, PREDICTIONS)
    times = t if isinstance(t, Tensor) else x.new_full((), float(t), dtype=torch.float64)
    chosen_path, chosen_objective, wide = as_path(path), as_objective(objective), reference.accumulation_dtype(x, output)
    limits = conversion_range(chosen_path, chosen_objective, to)
    x_factor, output_factor = prediction_factors(chosen_path, chosen_objective, to, times.to(torch.float64).clamp(*limits))
    _warn_of_ends(times, limits, output_factor)
    return (_over(x_factor.to(wide), x) * x.to(wide) + _over(output_factor.to(wide), x) * output.to(wide)).to(x.dtype)


def _warn_of_ends(times: Tensor, limits: tuple[float, float], factor: Tensor) -> None:
    """UserWarning where the output of a time outside the limits is multiplied by the huge factor of the limit."""
    if not _modes.values_readable(times, factor):
        return
    if bool((((times < limits[0]) | (times > limits[1])) & (factor.abs() > LARGE_FACTOR)).any()):
        warnings.warn(
            f"t is outside [{limits[0]:.7g}, {limits[1]:.7g}], where the result is finite: call the network, too, with t kept inside",
            stacklevel=3,
        )


def prediction_factors(path: Path, objective: Objective, to: str, t: Tensor) -> tuple[Tensor, Tensor]:
    """(A, B) with the prediction A x + B o at times t, float64."""
    if to == "velocity":
        return velocity_factors(path, objective, t)
    t = _while_moving(path, t)
    x_factor, output_factor = velocity_factors(path, objective, t)
    p = schedule(path, t)
    turn = _turn(p)
    if to == "data":
        return (p.s * x_factor - p.ds) / turn, p.s * output_factor / turn
    scale = turn if to == "noise" else -p.s * turn
    return (p.da - p.a * x_factor) / scale, -p.a * output_factor / scale


def _turn(p: Schedule) -> Tensor:
    """The determinant of (x, velocity) in (x1, x0)."""
    return p.da * p.s - p.ds * p.a


def _while_moving(path: Path, t: Tensor) -> Tensor:
    """A little inside of an end where the path stands still: the velocity there is 0 whatever noise and data are."""
    return torch.where(_turn(schedule(path, t)) == 0.0, t.clamp(EDGE, 1.0 - EDGE), t)


def _over(factor: Tensor, x: Tensor) -> Tensor:
    return reference.per_sample(factor, x) if factor.dim() else factor
