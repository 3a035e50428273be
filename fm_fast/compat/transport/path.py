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

# w(t) of dx = (v + w grad log p) dt + sqrt(2 w) dW beside the path's own diffusion ("SBDM")
FORMS: dict[str, Callable[[Tensor, Schedule, float], Tensor]] = {
    "constant": lambda t, p, norm: torch.full_like(t, norm),
    "sigma": lambda t, p, norm: norm * p.s,
    "linear": lambda t, p, norm: norm * (1.0 - t),
    "decreasing": lambda t, p, norm: 0.25 * (norm * torch.cos(math.pi * t) + 1.0) ** 2,
    "increasing-decreasing": lambda t, p, norm: norm * torch.sin(math.pi * t) ** 2,  # as SiT's scripts offer it
}
FORMS["inccreasing-decreasing"] = FORMS["increasing-decreasing"]  # as its module spells it
OWN = "SBDM"


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

    def compute_d_alpha_alpha_ratio_t(self, t: Tensor) -> Tensor:
        """alpha' / alpha."""
        p = schedule(self.path, t)
        return p.da / p.a

    def own_diffusion(self, t: Tensor) -> Tensor:
        """sigma (alpha'/alpha sigma - sigma'): half the squared diffusion of the SDE that makes noise of data along this path."""
        p = schedule(self.path, t)
        return p.s * (p.da / p.a * p.s - p.ds)

    def diffusion(self, t: Tensor, form: str, norm: float) -> Tensor:
        """w of the SDE dx = (v + w grad log p) dt + sqrt(2 w) dW at times of any shape."""
        _checks.one_of("form", form, (OWN, *FORMS))
        return norm * self.own_diffusion(t) if form == OWN else FORMS[form](t, schedule(self.path, t), norm)

    def compute_drift(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(f, w) of the velocity -f + w grad log p at x."""
        times = expand_t_like_x(t, x)
        return -self.compute_d_alpha_alpha_ratio_t(times) * x, self.own_diffusion(times)

    def compute_diffusion(self, x: Tensor, t: Tensor, form: str = "constant", norm: float = 1.0) -> Tensor:
        """w of the SDE, with the dimensions of x."""
        return self.diffusion(expand_t_like_x(t, x), form, norm)

    def get_score_from_velocity(self, velocity: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """grad log p at x."""
        return convert(velocity, x, t, to="score", path=self.path)

    def get_noise_from_velocity(self, velocity: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """x0, of which x was made."""
        return convert(velocity, x, t, to="noise", path=self.path)

    def get_velocity_from_score(self, score: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return convert(score, x, t, to="velocity", path=self.path, objective="score")

    def compute_mu_t(self, t: Tensor, x0: Tensor, x1: Tensor) -> Tensor:
        """The point between noise x0 and data x1."""
        p = schedule(self.path, expand_t_like_x(t, x1))
        return p.a * x1 + p.s * x0

    def compute_xt(self, t: Tensor, x0: Tensor, x1: Tensor) -> Tensor:
        """The same."""
        return self.compute_mu_t(t, x0, x1)

    def compute_ut(self, t: Tensor, x0: Tensor, x1: Tensor, xt: Tensor) -> Tensor:
        """The velocity of that point."""
        p = schedule(self.path, expand_t_like_x(t, x1))
        return p.da * x1 + p.ds * x0

    def plan(self, t: Tensor, x0: Tensor, x1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(t, x_t, u_t): the point between noise x0 and data x1, and its velocity."""
        xt = self.compute_xt(t, x0, x1)
        return t, xt, self.compute_ut(t, x0, x1, xt)


class GVPCPlan(ICPlan):
    """x_t = sin(pi t / 2) x1 + cos(pi t / 2) x0."""

    path: Path = Cosine()


class VPCPlan(ICPlan):
    """The variance preserving path; sigma_min and sigma_max are the ends of its beta."""

    def __init__(self, sigma_min: float = 0.1, sigma_max: float = 20.0) -> None:
        self.path = VP(sigma_min, sigma_max)

    def own_diffusion(self, t: Tensor) -> Tensor:
        """beta / 2, which is alpha' / alpha here, and finite also where sigma is 0."""
        return self.compute_d_alpha_alpha_ratio_t(t)
