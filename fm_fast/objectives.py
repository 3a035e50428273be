"""What the network predicts and how its error is weighted: the rows of the paper's Table 1, and data prediction.

With x_t = a x1 + s x0, every objective is w ||k o - (c1 x1 + c0 x0)||^2 for the network's output o, and the velocity of the flow is
p x + r o (paper sections 3-4 and appendix E.1). Six numbers a sample and two numbers a step therefore cover all of them.

A score is grad log p_t(x | x1) = -x0 / s here. Equation 43 of the paper writes it with the opposite sign and equation 46 undoes that.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fm_fast import _checks
from fm_fast.paths import EDGE, Path, as_path, time_limits


class Schedule(NamedTuple):
    """A path and its derivatives at some times: x_t = a x1 + s x0."""

    a: Tensor
    s: Tensor
    da: Tensor
    ds: Tensor


class Target(NamedTuple):
    """The loss w ||k o - (c1 x1 + c0 x0)||^2."""

    c1: Tensor
    c0: Tensor
    k: Tensor
    w: Tensor


@dataclass(frozen=True)
class Objective:
    """One way to train the network: its loss target and the velocity p x + r o recovered from its output o.

    Attributes:
        name: what messages call it.
        target: (c1, c0, k, w) of the loss from the path's values at some times.
        velocity: (p, r) of the velocity from the same.
        weight_is_singular: w is infinite where alpha or sigma is 0, which training then keeps away from.
        velocity_divides_by_alpha, velocity_divides_by_sigma: the same of the velocity, or of the output itself, for sampling.
    """

    name: str
    target: Callable[[Schedule], Target]
    velocity: Callable[[Schedule], tuple[Tensor, Tensor]]
    weight_is_singular: bool = False
    velocity_divides_by_alpha: bool = False
    velocity_divides_by_sigma: bool = False


def schedule(path: Path, t: Tensor) -> Schedule:
    """The path at times t (any shape), in t's dtype. Its methods get them in one row, as they do in training."""
    row = t if t.dim() == 1 else t.reshape(-1)
    found = (_like_times(f"{name} of a path", getattr(path, name)(row), row) for name in ("alpha", "sigma", "d_alpha", "d_sigma"))
    return Schedule(*(values.reshape(t.shape) for values in found))


def _parts(what: str, names: tuple[str, ...], found: object, t: Tensor) -> list[Tensor]:
    """What a function of an objective returned for times t: one value, or one a time, for each of ``names``."""
    if not isinstance(found, Sequence) or len(found) != len(names):
        got = f"{len(found)} values" if isinstance(found, Sequence) else type(found).__name__
        raise TypeError(f"{what} must return ({', '.join(names)}), got {got}")
    return [_like_times(f"{name} of {what}", value, t) for name, value in zip(names, found, strict=True)]


def _like_times(name: str, value: Tensor | float, t: Tensor) -> Tensor:
    """What ``name`` returned for times t, a number or single element spread over them."""
    if isinstance(value, Tensor) and value.shape == t.shape and not value.is_complex():
        return value
    if _checks.is_number(value):
        return torch.full_like(t, float(value))
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must return a tensor or a number, got {type(value).__name__}")
    if value.is_complex():
        raise TypeError(f"{name} must return real values, got {value.dtype}")
    if value.numel() != 1 or value.dim() > 1:
        raise ValueError(f"{name} must return a number or the shape of its times, {tuple(t.shape)}, got {tuple(value.shape)}")
    return value.reshape(()).to(t).expand(t.shape)


def _velocity_target(p: Schedule) -> Target:
    one = torch.ones_like(p.s)
    return Target(p.da, p.ds, one, one)


def _noise_target(p: Schedule) -> Target:
    one = torch.ones_like(p.s)
    return Target(torch.zeros_like(p.s), one, one, one)


def _score_target(p: Schedule) -> Target:
    one = torch.ones_like(p.s)
    return Target(torch.zeros_like(p.s), -one, p.s, one)


def _scoreflow_target(p: Schedule) -> Target:
    # g^2 / s^2 with g^2 = 2 s^2 (a'/a - s'/s); on VP g^2 is beta, the likelihood weighting of appendix E.1.
    return _score_target(p)._replace(w=2.0 * (p.da / p.a - p.ds / p.s))


def _data_target(p: Schedule) -> Target:
    one = torch.ones_like(p.s)
    return Target(one, torch.zeros_like(p.s), one, one)


def _velocity_from_velocity(p: Schedule) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(p.s), torch.ones_like(p.s)


def _velocity_from_noise(p: Schedule) -> tuple[Tensor, Tensor]:
    return p.da / p.a, p.ds - p.da * p.s / p.a


def _velocity_from_score(p: Schedule) -> tuple[Tensor, Tensor]:
    x_factor, noise_factor = _velocity_from_noise(p)
    return x_factor, -p.s * noise_factor


def _velocity_from_data(p: Schedule) -> tuple[Tensor, Tensor]:
    return p.ds / p.s, p.da - p.ds * p.a / p.s


OBJECTIVES = {
    o.name: o
    for o in (
        Objective("velocity", _velocity_target, _velocity_from_velocity),
        Objective("noise", _noise_target, _velocity_from_noise, velocity_divides_by_alpha=True),
        # The velocity does not divide by sigma, but the score itself is infinite where sigma is 0.
        Objective("score", _score_target, _velocity_from_score, velocity_divides_by_alpha=True, velocity_divides_by_sigma=True),
        Objective(
            "scoreflow",
            _scoreflow_target,
            _velocity_from_score,
            weight_is_singular=True,
            velocity_divides_by_alpha=True,
            velocity_divides_by_sigma=True,
        ),
        Objective("data", _data_target, _velocity_from_data, velocity_divides_by_sigma=True),
    )
}


def as_objective(objective: str | Objective) -> Objective:
    """The objective of that name; anything else is an error that lists the names."""
    if isinstance(objective, Objective):
        return objective
    if not isinstance(objective, str) or objective not in OBJECTIVES:
        raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, got {objective!r}")
    return OBJECTIVES[objective]


def is_built_in(objective: Objective) -> bool:
    """Whether this is one of the objectives above, whose coefficients the kernels know; a changed copy is not."""
    known = OBJECTIVES.get(objective.name)
    return known is objective or known == objective  # which a pickled one is


def time_range(path: str | Path, objective: str | Objective) -> tuple[float, float]:
    """(t_min, t_max) of training: the path's own limits, kept off an end where the objective's weight is infinite."""
    path, objective = as_path(path), as_objective(objective)
    return _range(path, objective.weight_is_singular, objective.weight_is_singular)


def velocity_range(path: str | Path, objective: str | Objective) -> tuple[float, float]:
    """(t_min, t_max) of sampling: the path's own limits, kept off an end where the velocity of the output is infinite."""
    path, objective = as_path(path), as_objective(objective)
    return _range(path, objective.velocity_divides_by_alpha, objective.velocity_divides_by_sigma)


def conversion_range(path: Path, objective: Objective, to: str) -> tuple[float, float]:
    """(t_min, t_max) where an output of the objective gives the velocity, the noise or the data; the score, too, divides by sigma."""
    return _range(path, objective.velocity_divides_by_alpha, objective.velocity_divides_by_sigma or to == "score")


def _range(path: Path, off_noise: bool, off_data: bool) -> tuple[float, float]:
    low, high = time_limits(path)
    if off_noise and getattr(path, "starts_at_noise", True):
        low = max(low, EDGE)
    if off_data and getattr(path, "ends_at_data", True):
        high = min(high, 1.0 - EDGE)
    return low, high


def loss_coefficients(path: Path, objective: Objective, t: Tensor) -> Tensor:
    """The rows (a, s, c1, c0, k, w) of the loss at times t [B], evaluated in float64: float64 [B, 6]."""
    p = schedule(path, t.to(torch.float64))
    return torch.stack([p.a, p.s, *_parts(f"the target of objective {objective.name!r}", Target._fields, objective.target(p), p.s)], dim=-1)


def velocity_coefficients(path: str | Path, objective: str | Objective, t: float | Tensor) -> tuple[Tensor, Tensor]:
    """(p, r) with velocity = p x + r o at times t (a number, or a tensor of any shape), float64 on the CPU.

    Times are kept inside :func:`velocity_range`. Raises ValueError for a time outside [0, 1] and where the path gives no finite value.
    """
    times = _on_host(t)
    outside = ~((times >= 0.0) & (times <= 1.0))
    if bool(outside.any()):
        raise ValueError(f"t must lie in [0, 1], got {float(times[outside][0])}")
    path, objective = as_path(path), as_objective(objective)
    p, r = velocity_factors(path, objective, times)
    require_finite(path, objective, times, p, r)
    return p.detach(), r.detach()


def _on_host(t: float | Tensor) -> Tensor:
    """t as float64 on the CPU, whatever torch's default device."""
    if isinstance(t, Tensor):
        return t.detach().to(device="cpu", dtype=torch.float64)
    return torch.tensor(t, dtype=torch.float64, device="cpu")


def require_finite(path: Path, objective: Objective, times: Tensor, p: Tensor, r: Tensor) -> None:
    """ValueError if the velocity p x + r o has a factor that is not finite, with its time; looks at the values."""
    infinite = ~(torch.isfinite(p) & torch.isfinite(r))
    if bool(infinite.any()):
        raise ValueError(f"objective {objective.name!r} has no finite velocity on path {path!r} at t = {float(times[infinite][0])}")


def velocity_factors(path: Path, objective: Objective, t: Tensor) -> tuple[Tensor, Tensor]:
    """(p, r) at times t on t's device, float64, differentiable in t, without looking at any value."""
    low, high = velocity_range(path, objective)
    p = schedule(path, t.to(torch.float64).clamp(low, high))
    x_factor, output_factor = _parts(f"the velocity of objective {objective.name!r}", ("p", "r"), objective.velocity(p), p.s)
    return x_factor, output_factor
