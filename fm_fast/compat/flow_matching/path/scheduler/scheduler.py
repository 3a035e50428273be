"""Schedulers: a path of fm_fast, called with times. ``scheduler.path`` is what fm_fast's own calls take as ``path``.

On purpose they differ in this: neither base is abstract, so that a scheduler of one's own needs no inverse where none is called; schedules
and inverses are evaluated in float64, whatever the dtype of their arguments; an inverse at sigma = 0, where the ratio is infinite, is 1;
``VPScheduler`` may have a constant beta; what an inverse gets is checked.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fm_fast import _checks, _modes
from fm_fast.objectives import schedule
from fm_fast.paths import OT, VP, Cosine, Path

__all__ = [
    "CondOTScheduler",
    "ConvexScheduler",
    "CosineScheduler",
    "LinearVPScheduler",
    "PolynomialConvexScheduler",
    "Scheduler",
    "SchedulerOutput",
    "VPScheduler",
]


@dataclass
class SchedulerOutput:
    """alpha, sigma and their derivatives at times t, of t's shape and dtype, or torch's default dtype for integers."""

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
        _checks.tensor("t", t)
        dtype = t.dtype if t.is_floating_point() else torch.get_default_dtype()
        return SchedulerOutput(*(value.to(dtype) for value in schedule(self.path, t.double())))

    def snr_inverse(self, snr: Tensor) -> Tensor:
        """The times, of any shape, at which alpha / sigma is ``snr``, which may be infinite."""
        raise NotImplementedError(f"{type(self).__name__} must have a snr_inverse of its own")


class ConvexScheduler(Scheduler):
    """A schedule whose alpha and sigma sum to 1. A subclass has a ``kappa_inverse``, from which ``snr_inverse`` follows."""

    def kappa_inverse(self, kappa: Tensor) -> Tensor:
        """The times, of any shape, at which alpha is ``kappa``."""
        raise NotImplementedError(f"{type(self).__name__} must have a kappa_inverse of its own")

    def snr_inverse(self, snr: Tensor) -> Tensor:
        # As snr / (1 + snr), but not nan where snr is infinite.
        return _inverse("snr", snr, math.inf, lambda ratio: self.kappa_inverse(1.0 / (1.0 + 1.0 / ratio)))


class CondOTScheduler(ConvexScheduler):
    """alpha = t, sigma = 1 - t."""

    def __init__(self) -> None:
        super().__init__(OT())

    def kappa_inverse(self, kappa: Tensor) -> Tensor:
        return _inverse("kappa", kappa, 1.0, lambda alpha: alpha)


class CosineScheduler(Scheduler):
    """alpha = sin(pi t / 2), sigma = cos(pi t / 2)."""

    def __init__(self) -> None:
        super().__init__(Cosine())

    def snr_inverse(self, snr: Tensor) -> Tensor:
        return _inverse("snr", snr, math.inf, lambda ratio: torch.atan(ratio) * (2.0 / math.pi))


class VPScheduler(Scheduler):
    """The variance-preserving diffusion of the paper's appendix E.1."""

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0) -> None:
        super().__init__(VP(beta_min, beta_max))
        self.beta_min, self.beta_max = beta_min, beta_max

    def snr_inverse(self, snr: Tensor) -> Tensor:
        """The times; below 0, down to -inf, for a ratio smaller than the schedule has at 0."""
        return _inverse("snr", snr, math.inf, self._time)

    def _time(self, ratio: Tensor) -> Tensor:
        """With s = 1 - t, T = beta_min s + (beta_max - beta_min) s^2 / 2 = log(1 + 1 / ratio^2), solved for s through q = 1 / T."""
        q = 1.0 / torch.log1p(ratio**-2)
        linear = self.beta_min * q
        return 1.0 - 2.0 / (linear + torch.sqrt(linear**2 + 2.0 * (self.beta_max - self.beta_min) * q))


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


class PolynomialConvexScheduler(ConvexScheduler):
    """alpha = t^n, sigma = 1 - t^n."""

    def __init__(self, n: float) -> None:
        super().__init__(Polynomial(n))
        self.n = n

    def kappa_inverse(self, kappa: Tensor) -> Tensor:
        return _inverse("kappa", kappa, 1.0, lambda alpha: alpha ** (1.0 / self.n))


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

    def snr_inverse(self, snr: Tensor) -> Tensor:
        # ratio / sqrt(1 + ratio^2), but not nan where the ratio is infinite
        return _inverse("snr", snr, math.inf, lambda ratio: torch.sin(torch.atan(ratio)))


def _inverse(name: str, value: Tensor, limit: float, formula: Callable[[Tensor], Tensor]) -> Tensor:
    """The formula at values in [0, limit], in float64; of value's dtype."""
    _checks.tensor(name, value)
    _checks.floating(name, value)
    if _modes.values_readable(value) and bool(((value < 0.0) | (value > limit)).any()):
        bounds = "must not be negative" if limit == math.inf else f"must lie in [0, {limit:g}]"
        raise ValueError(f"{name} {bounds}, got values from {float(value.min())} to {float(value.max())}")
    return formula(value.double()).to(value.dtype)
