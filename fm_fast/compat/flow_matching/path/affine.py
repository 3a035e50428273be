"""``CondOTProbPath`` and ``AffineProbPath``: points and velocities as tensors, for loops that compute their own loss.

On purpose they differ in this: results have the dtype of x_1, so a bfloat16 loop stays one; the conversions spread t [B] over the batch;
shapes, dtypes, devices and t are checked. :func:`fm_fast.flow_matching_loss` fuses noise, point, velocity and loss, which separate tensors
cannot.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fm_fast import _checks
from fm_fast.compat.flow_matching.path.path import ProbPath
from fm_fast.compat.flow_matching.path.path_sample import PathSample
from fm_fast.compat.flow_matching.path.scheduler.scheduler import CondOTScheduler, SchedulerOutput

__all__ = ["AffineProbPath", "CondOTProbPath"]


class AffineProbPath(ProbPath):
    """x_t = alpha_t x_1 + sigma_t x_0 for the schedule of ``scheduler``, called with times."""

    def __init__(self, scheduler: Callable[[Tensor], SchedulerOutput]) -> None:
        self.scheduler = scheduler

    def sample(self, x_0: Tensor, x_1: Tensor, t: Tensor) -> PathSample:
        """The point and its velocity.

        Args:
            x_0, x_1: source and data [B, ...], floating, of one shape and device.
            t: [B] in [0, 1].
        """
        _check_ends(x_0, x_1, t)
        at = self._at(t, x_1)
        x_t = at.sigma_t * x_0 + at.alpha_t * x_1
        return PathSample(x_1, x_0, t, x_t.to(x_1.dtype), _velocity(at, x_0, x_1).to(x_1.dtype))

    def _at(self, t: Tensor, x: Tensor) -> SchedulerOutput:
        """The schedule at t, which is [B] or broadcasts to x, with the dimensions of x."""
        at = self.scheduler(t)
        values = (at.alpha_t, at.sigma_t, at.d_alpha_t, at.d_sigma_t)
        return SchedulerOutput(*(value.reshape(-1, *[1] * (x.dim() - 1)) if t.dim() == 1 else value for value in values))

    def target_to_velocity(self, x_1: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The velocity at x_t of a flow to x_1."""
        at = self._at(t, x_t)
        return _velocity(at, (x_t - at.alpha_t * x_1) / at.sigma_t, x_1).to(x_t.dtype)

    def epsilon_to_velocity(self, epsilon: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The velocity at x_t of a flow from the noise epsilon."""
        at = self._at(t, x_t)
        return _velocity(at, epsilon, (x_t - at.sigma_t * epsilon) / at.alpha_t).to(x_t.dtype)

    def velocity_to_target(self, velocity: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """x_1, from the velocity at x_t."""
        at = self._at(t, x_t)
        found = (at.sigma_t * velocity - at.d_sigma_t * x_t) / (at.d_alpha_t * at.sigma_t - at.d_sigma_t * at.alpha_t)
        return found.to(x_t.dtype)

    def velocity_to_epsilon(self, velocity: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The noise, from the velocity at x_t."""
        at = self._at(t, x_t)
        found = (at.alpha_t * velocity - at.d_alpha_t * x_t) / (at.d_sigma_t * at.alpha_t - at.d_alpha_t * at.sigma_t)
        return found.to(x_t.dtype)

    def epsilon_to_target(self, epsilon: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """x_1, from the noise and x_t."""
        at = self._at(t, x_t)
        return ((x_t - at.sigma_t * epsilon) / at.alpha_t).to(x_t.dtype)

    def target_to_epsilon(self, x_1: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The noise, from x_1 and x_t."""
        at = self._at(t, x_t)
        return ((x_t - at.alpha_t * x_1) / at.sigma_t).to(x_t.dtype)


class CondOTProbPath(AffineProbPath):
    """x_t = t x_1 + (1 - t) x_0, of velocity x_1 - x_0 (equation 23 with sigma_min = 0)."""

    def __init__(self) -> None:
        super().__init__(CondOTScheduler())

    def sample(self, x_0: Tensor, x_1: Tensor, t: Tensor) -> PathSample:
        _check_ends(x_0, x_1, t)
        wide = torch.promote_types(torch.promote_types(x_0.dtype, x_1.dtype), t.dtype)
        weight = t.to(wide).reshape(-1, *[1] * (x_1.dim() - 1))
        x_t = torch.lerp(x_0.to(wide), x_1.to(wide), weight)
        return PathSample(x_1, x_0, t, x_t.to(x_1.dtype), (x_1 - x_0).to(x_1.dtype))


def _velocity(at: SchedulerOutput, x_0: Tensor, x_1: Tensor) -> Tensor:
    """d x_t / dt between two ends (equation 10's derivative)."""
    return at.d_sigma_t * x_0 + at.d_alpha_t * x_1


def _check_ends(x_0: object, x_1: object, t: object) -> None:
    for name, x in (("x_0", x_0), ("x_1", x_1)):
        _checks.state(name, x)
    assert isinstance(x_0, Tensor) and isinstance(x_1, Tensor)
    _checks.like("x_0", x_0, x_1, "x_1")
    _checks.tensor("t", t)
    if isinstance(t, Tensor) and t.shape != x_1.shape[:1]:
        raise ValueError(f"t must have shape [{x_1.shape[0]}], got {tuple(t.shape)}")
    _checks.time(t, x_1, "x_1")
