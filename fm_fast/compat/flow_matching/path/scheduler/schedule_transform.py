"""``ScheduleTransformedModel``: a velocity model of one schedule, sampled on another.

At time r of the new schedule, whose alpha and sigma are a and b, the model is asked at the time t of its own where alpha / sigma = a / b.
The new states are then x = s y, with y a state of the model's own schedule: a = s alpha, b = s sigma. Their derivatives by r,

    a' = s' alpha + p alpha',    b' = s' sigma + p sigma',    p = s dt/dr,

are two linear equations for s' and p, and the new velocity is s' y + p u(y, t). Nothing here is divided by alpha or sigma, which vanish at
the ends: s is sqrt(a^2 + b^2) / sqrt(alpha^2 + sigma^2), and the determinant alpha' sigma - alpha sigma' is 1 for CondOT.

On purpose it differs in this:

* Velocities are finite at both ends. Where a factor is not (VP at the data, a polynomial schedule of the model's at the noise), all of
  them are those of a time 1e-5 inside. Times beyond [0, 1], which some adaptive solvers visit, count as its ends.
* A new schedule may begin with less data than the model's own ever has, as CondOT does for a VP model: the model is asked at 0, not before.
* t may be [B], and is spread over the samples.
* Factors are evaluated in float64, for the time that the model gets, as it is rounded. Results have the dtype of x.
* x, t, the schedulers and the model's output are checked.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fm_fast import _checks
from fm_fast._solver.field import check_output
from fm_fast.compat.flow_matching.path.scheduler.scheduler import Scheduler, SchedulerOutput
from fm_fast.compat.flow_matching.utils.model_wrapper import ModelWrapper
from fm_fast.compat.flow_matching.utils.utils import unsqueeze_to_match
from fm_fast.paths import EDGE

__all__ = ["ScheduleTransformedModel"]


class ScheduleTransformedModel(ModelWrapper):
    """The velocity on ``new_scheduler`` of a model of the velocity on ``original_scheduler``, which needs a ``snr_inverse``.

    Raises TypeError for what cannot be called, and for a scheduler without an inverse.
    """

    def __init__(
        self,
        velocity_model: Callable[..., Tensor],
        original_scheduler: Scheduler,
        new_scheduler: Callable[[Tensor], SchedulerOutput],
    ) -> None:
        if not callable(getattr(original_scheduler, "snr_inverse", None)):
            raise TypeError(f"original_scheduler must have a snr_inverse to call, got {type(original_scheduler).__name__}")
        called = {"velocity_model": velocity_model, "original_scheduler": original_scheduler, "new_scheduler": new_scheduler}
        for name, value in called.items():
            if isinstance(value, type) or not callable(value):
                raise TypeError(f"{name} must be callable, got {value if isinstance(value, type) else type(value).__name__}")
        super().__init__(model=velocity_model)
        self.original_scheduler = original_scheduler
        self.new_scheduler = new_scheduler

    def forward(self, x: Tensor, t: Tensor, **extras: Any) -> Tensor:
        """The velocity at x [B, ...] and new time t ([], [B] or one that broadcasts to x); the model gets its own time in t's shape."""
        _check_point(x, t)
        own_time, *factors = self._at(t).unbind()
        wide = torch.promote_types(x.dtype, torch.float32)
        scale, d_scale, speed = (unsqueeze_to_match(factor, x).to(wide) for factor in factors)
        y = (x.to(wide) / scale).to(x.dtype)
        velocity = self.model(x=y, t=own_time.to(t.dtype), **extras)
        check_output(velocity, y, "velocity_model")
        return (d_scale * y.to(wide) + speed * velocity.to(wide)).to(x.dtype)

    def _at(self, r: Tensor) -> Tensor:
        """t, s, s' and p at r [...], float64 [4, ...]; where a schedule leaves one of them without a finite value, a little inside."""
        row = r.double().reshape(-1)
        found = self._change(_and_inside(row, row, EDGE), r.dtype)
        there, inside = found.reshape(4, 2, *r.shape).unbind(1)
        return torch.where(there.isfinite().all(0), there, inside)

    def _change(self, r: Tensor, seen: torch.dtype) -> Tensor:
        """t, s, s' and p, [4, N], at r [N], of which the second half is kept inside; t as the model sees it, in that dtype."""
        new = self.new_scheduler(r)
        # abs: a sigma of -0.0 at the data is no negative ratio
        exact = self.original_scheduler.snr_inverse((new.alpha_t / new.sigma_t).abs())
        half = len(r) // 2
        t = _and_inside(exact[:half], exact[half:], torch.finfo(seen).eps).to(seen).double()
        return torch.stack(torch.broadcast_tensors(t, *_scale_and_rates(new, self.original_scheduler(t))))


def _and_inside(times: Tensor, others: Tensor, margin: float) -> Tensor:
    """Times [N] in [0, 1], then others [N] kept off the ends by a margin."""
    return torch.cat([times.clamp(0.0, 1.0), others.clamp(margin, 1.0 - margin)])


def _scale_and_rates(new: SchedulerOutput, own: SchedulerOutput) -> tuple[Tensor, Tensor, Tensor]:
    """s, s' and p of the module's text."""
    determinant = own.d_alpha_t * own.sigma_t - own.alpha_t * own.d_sigma_t
    return (
        torch.hypot(new.alpha_t, new.sigma_t) / torch.hypot(own.alpha_t, own.sigma_t),
        (new.d_sigma_t * own.d_alpha_t - new.d_alpha_t * own.d_sigma_t) / determinant,
        (new.d_alpha_t * own.sigma_t - new.d_sigma_t * own.alpha_t) / determinant,
    )


def _check_point(x: object, t: object) -> None:
    """A state x, and floating times on its device that broadcast to it, from its first dimension on."""
    _checks.state("x", x)
    _checks.tensor("t", t)
    assert isinstance(x, Tensor) and isinstance(t, Tensor)
    _checks.floating("t", t)
    _checks.same_device("t", t, x, "x")
    if t.dim() > x.dim() or any(a not in (1, b) for a, b in zip(t.shape, x.shape, strict=False)):
        raise ValueError(f"t must be a scalar tensor or have shape [{x.shape[0]}], got {tuple(t.shape)} for x of {tuple(x.shape)}")
