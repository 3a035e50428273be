"""A wrapper that keeps the input and the output of a network at unit size at every time, whatever the path and the prediction."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fm_fast.objectives import OBJECTIVES, Schedule, schedule
from fm_fast.paths import Path, as_path, time_limits


def _velocity(p: Schedule, x: Tensor, noise: Tensor) -> Tensor:
    x_factor, noise_factor = OBJECTIVES["noise"].velocity(p)
    return x_factor * x + noise_factor * noise


def _score(p: Schedule, x: Tensor, noise: Tensor) -> Tensor:
    return -noise / p.s


# What an objective predicts, from x = a x1 + s x0 and a guess of the noise x0.
PREDICTIONS: dict[str, Callable[[Schedule, Tensor, Tensor], Tensor]] = {
    "velocity": _velocity,
    "noise": lambda p, x, noise: noise,
    "score": _score,
    "scoreflow": _score,
}


def can_precondition(path: Path, objective: str) -> bool:
    """Whether :class:`Preconditioned` takes them: the velocity of a path that starts at alpha = 0 does not follow from the noise."""
    return objective in PREDICTIONS and not (objective == "velocity" and getattr(path, "starts_at_noise", True))


class Preconditioned(nn.Module):
    """A noise prediction o = c_skip x + c_out network(c_in x, t), or what follows from it, after Karras et al. (2022, section 5).

    With x = a x1 + s x0 and data of unit variance, the linear guess of the noise is s x / (a^2 + s^2), and what remains has
    variance a^2 / (a^2 + s^2). So c_skip = s / (a^2 + s^2), c_out = a / sqrt(a^2 + s^2), c_in = 1 / sqrt(a^2 + s^2).
    Without this a network must copy its input to an accuracy of a(t) near t = 0 (0.007 on the VP path), since the velocity
    recovered from its output magnifies the error; a score grows like 1/sigma near t = 1; and input and velocity of the VE path
    reach sigma_max and more. Loss and target are unchanged.

    Called like the network, with x [B, ...] and t [B] (clamped to the path's range). Returns x's shape, in t's dtype or wider.
    Raises ValueError for an objective other than "velocity", "noise", "score" and "scoreflow", and for the velocity of a path that
    starts at alpha = 0, which the noise does not determine.
    """

    def __init__(self, network: nn.Module, path: str | Path, objective: str) -> None:
        super().__init__()
        path = as_path(path)
        if objective not in PREDICTIONS:
            raise ValueError(f"objective: expected one of {', '.join(PREDICTIONS)}, got {objective!r}")
        if not can_precondition(path, objective):
            raise ValueError(f"path: expected one whose alpha is not 0 at t = 0 with objective 'velocity', got {path!r}")
        self.network = network
        self.path = path
        self.objective = objective

    def forward(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        p = self._schedule(x, t)
        variance = p.a.square() + p.s.square()
        output = self.network(x * variance.rsqrt(), t, **cond)
        noise = p.s / variance * x + p.a * variance.rsqrt() * output
        return PREDICTIONS[self.objective](p, x, noise)

    def _schedule(self, x: Tensor, t: Tensor) -> Schedule:
        time = t.double().clamp(*time_limits(self.path)).reshape(-1, *[1] * (x.ndim - 1))
        return Schedule(*(value.to(t.dtype) for value in schedule(self.path, time)))
