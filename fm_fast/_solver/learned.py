"""Solves that a path's own parameters take part in: (p, r) of the velocity p x + r o stay tensors, which gradients follow.

A plan holds p and r multiplied into its coefficients, as numbers. Here its evaluations return velocities instead, and its coefficients
are those of the method alone. Where the steps are stays a matter of numbers.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fm_fast import _modes
from fm_fast._codes import PathCode
from fm_fast._constants import own_constant
from fm_fast._solver.loop import Evaluate
from fm_fast._solver.plan import Plan
from fm_fast._solver.settings import Settings
from fm_fast.objectives import Objective, is_built_in, require_finite, velocity_factors, velocity_range
from fm_fast.paths import Path, kernel_form


def is_learned(path: Path, objective: Objective, device: torch.device) -> bool:
    """Whether p or r has a derivative that is recorded now; under a transform, which may hide one, any path of the user's has."""
    if kernel_form(path)[0] != PathCode.given and is_built_in(objective):
        return False
    if _modes.transforms_active():
        return True
    if not torch.is_grad_enabled():
        return False
    middle = torch.full((1,), 0.5 * sum(velocity_range(path, objective)), dtype=torch.float64, device=device)
    return any(factor.requires_grad for factor in velocity_factors(path, objective, middle))


class LearnedFactors(NamedTuple):
    """(p, r) at each evaluation of a plan, float64 scalars with their graph."""

    p: tuple[Tensor, ...]
    r: tuple[Tensor, ...]

    def velocity(self, number: int, x: Tensor, output: Tensor) -> Tensor:
        """p x + r o in x's dtype."""
        return self.p[number] * x + self.r[number] * output.to(x.dtype)


def plan_and_factors(settings: Settings, device: torch.device) -> tuple[Plan, LearnedFactors | None]:
    """The plan of a solve, and what is not part of it where the path's own parameters take part."""
    if not is_learned(settings.path, settings.objective, device):
        return settings.plan(), None
    plan = settings.plan(folded=False)
    return plan, _learned_factors(plan, settings.path, settings.objective, device)


def _learned_factors(plan: Plan, path: Path, objective: Objective, device: torch.device) -> LearnedFactors:
    """Raises ValueError where they are not finite, if they can be looked at without a wait."""
    times = own_constant(plan.times, torch.float64, device)
    p, r = velocity_factors(path, objective, times)
    if _modes.values_readable(p, r):
        require_finite(path, objective, times, p, r)
    return LearnedFactors(p.unbind(), r.unbind())


def velocities(factors: LearnedFactors, evaluate: Evaluate, dtype: torch.dtype) -> Evaluate:
    """The velocity in x's dtype, from the output for an input of ``dtype``."""
    return lambda x, number: factors.velocity(number, x, evaluate(x.to(dtype), number))
