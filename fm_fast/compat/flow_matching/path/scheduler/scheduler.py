"""Schedulers: a path of fm_fast, called with times. ``scheduler.path`` is what fm_fast's own calls take as ``path``."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fm_fast import _checks
from fm_fast.objectives import schedule
from fm_fast.paths import OT, VP, Cosine, Path

__all__ = [
    "CondOTScheduler",
    "CosineScheduler",
    "LinearVPScheduler",
    "PolynomialConvexScheduler",
    "Scheduler",
    "SchedulerOutput",
    "VPScheduler",
]


@dataclass
class SchedulerOutput:
    """alpha, sigma and their derivatives at times t, of t's shape and dtype."""

    alpha_t: Tensor
    sigma_t: Tensor
    d_alpha_t: Tensor
    d_sigma_t: Tensor


class Scheduler:
    """x_t = alpha_t x_1 + sigma_t x_0. A subclass may have a ``__call__`` of its own instead of a path."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path

    def __call__(self, t: Tensor) -> SchedulerOutput:
        if self.path is None:
            raise NotImplementedError(f"{type(self).__name__} must have a path or a __call__ of its own")
        return SchedulerOutput(*(value.to(t.dtype) for value in schedule(self.path, t.double())))


class CondOTScheduler(Scheduler):
    """alpha = t, sigma = 1 - t."""

    def __init__(self) -> None:
        super().__init__(OT())


class CosineScheduler(Scheduler):
    """alpha = sin(pi t / 2), sigma = cos(pi t / 2)."""

    def __init__(self) -> None:
        super().__init__(Cosine())


class VPScheduler(Scheduler):
    """The variance-preserving diffusion of the paper's appendix E.1."""

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0) -> None:
        super().__init__(VP(beta_min, beta_max))


@dataclass(frozen=True)
class Polynomial:
    """The path alpha = t^n, sigma = 1 - t^n."""

    n: float

    def __post_init__(self) -> None:
        _checks.positive_number("n", self.n)

    def alpha(self, t: Tensor) -> Tensor:
        return t**self.n

    def sigma(self, t: Tensor) -> Tensor:
        return 1.0 - t**self.n

    def d_alpha(self, t: Tensor) -> Tensor:
        return self.n * t ** (self.n - 1)

    def d_sigma(self, t: Tensor) -> Tensor:
        return -self.d_alpha(t)


class PolynomialConvexScheduler(Scheduler):
    """alpha = t^n, sigma = 1 - t^n."""

    def __init__(self, n: float) -> None:
        super().__init__(Polynomial(n))


@dataclass(frozen=True)
class LinearVP:
    """The path alpha = t, sigma = sqrt(1 - t^2), whose derivative is infinite at the data."""

    def alpha(self, t: Tensor) -> Tensor:
        return t

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(1.0 - t**2)

    def d_alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return -t / self.sigma(t)


class LinearVPScheduler(Scheduler):
    """alpha = t, sigma = sqrt(1 - t^2)."""

    def __init__(self) -> None:
        super().__init__(LinearVP())
