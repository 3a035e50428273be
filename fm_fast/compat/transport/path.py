"""The three paths of SiT: their points, their velocities, and the diffusion of the SDEs that keep their distributions."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fm_fast import _checks, reference
from fm_fast.conversions import convert
from fm_fast.objectives import Schedule, schedule
from fm_fast.paths import OT, VP, Cosine, Path

__all__ = ["GVPCPlan", "ICPlan", "VPCPlan", "expand_t_like_x"]

# w(t) of dx = (v + w grad log p) dt + sqrt(2 w) dW, from the times, the path's sigma, and the w of the path's own diffusion (SBDM)
FORMS: dict[str, Callable[[Tensor, Schedule, float], Tensor]] = {
    "constant": lambda t, p, norm: torch.full_like(t, norm),
    "SBDM": lambda t, p, norm: norm * own_diffusion(p),
    "sigma": lambda t, p, norm: norm * p.s,
    "linear": lambda t, p, norm: norm * (1.0 - t),
    "decreasing": lambda t, p, norm: 0.25 * (norm * torch.cos(math.pi * t) + 1.0) ** 2,
    "inccreasing-decreasing": lambda t, p, norm: norm * torch.sin(math.pi * t) ** 2,  # spelt as in SiT
}


def own_diffusion(p: Schedule) -> Tensor:
    """sigma (alpha'/alpha sigma - sigma'): half the squared diffusion of the SDE that made the path; beta / 2 on VP."""
    return p.s * (p.da / p.a * p.s - p.ds)


def expand_t_like_x(t: Tensor, x: Tensor) -> Tensor:
    """t [B] with the dimensions of x [B, ...]."""
    return reference.per_sample(t, x)


class ICPlan:
    """x_t = t x1 + (1 - t) x0. Times are [B], and the path's values have their dtype."""

    path: Path = OT()

    def compute_alpha_t(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and its derivative."""
        p = schedule(self.path, t)
        return p.a, p.da

    def compute_sigma_t(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """sigma and its derivative."""
        p = schedule(self.path, t)
        return p.s, p.ds

    def compute_drift(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(f, w) of the velocity -f + w grad log p at x."""
        p = schedule(self.path, expand_t_like_x(t, x))
        return -(p.da / p.a) * x, own_diffusion(p)

    def compute_diffusion(self, x: Tensor, t: Tensor, form: str = "constant", norm: float = 1.0) -> Tensor:
        """w of the SDE dx = (v + w grad log p) dt + sqrt(2 w) dW, with the dimensions of x."""
        _checks.one_of("form", form, tuple(FORMS))
        times = expand_t_like_x(t, x)
        return FORMS[form](times, schedule(self.path, times), norm)

    def get_score_from_velocity(self, velocity: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """grad log p at x."""
        return convert(velocity, x, t, to="score", path=self.path)

    def get_noise_from_velocity(self, velocity: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """x0, of which x was made."""
        return convert(velocity, x, t, to="noise", path=self.path)

    def get_velocity_from_score(self, score: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return convert(score, x, t, to="velocity", path=self.path, objective="score")

    def plan(self, t: Tensor, x0: Tensor, x1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(t, x_t, u_t): the point between noise x0 and data x1, and its velocity."""
        p = schedule(self.path, expand_t_like_x(t, x1))
        return t, p.a * x1 + p.s * x0, p.da * x1 + p.ds * x0


class GVPCPlan(ICPlan):
    """x_t = sin(pi t / 2) x1 + cos(pi t / 2) x0."""

    path: Path = Cosine()


class VPCPlan(ICPlan):
    """The variance preserving path with beta from 0.1 to 20."""

    path: Path = VP()
