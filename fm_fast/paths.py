"""Gaussian probability paths: x_t = alpha(t) x1 + sigma(t) x0, from noise at t = 0 to data at t = 1.

A path is a frozen value object. The schedules take and return float64 tensors [N]; everything that needs a number of a path asks it here.
Any object with the methods ``alpha``, ``sigma``, ``d_alpha``, ``d_sigma`` is a path too (see :class:`Path`). Optional attributes:
``t_min``, ``t_max`` (default 0 and 1) limit its times; ``prior_scale`` (default 1) is the standard deviation of x_t at t = 0;
``starts_at_noise`` and ``ends_at_data`` (default True) say whether alpha is 0 at t_min and sigma is 0 at t_max, so that quantities
which divide by them stay a little inside.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from fm_fast import _checks
from fm_fast._codes import PathCode

EDGE = 1e-5  # how far from a singular end a quantity is evaluated; the paper's eps (appendix E.1)


def _require_numbers(**values: object) -> None:
    """Parameters of built-in paths are constants; a path with trainable parameters is a custom one."""
    for name, value in values.items():
        if not _checks.is_number(value):
            raise TypeError(f"{name} must be a number, got {type(value).__name__}; write a path object of your own to train it")
        if not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")


@runtime_checkable
class Path(Protocol):
    """What every path offers: the schedules and their derivatives at float64 times t [N], as tensors [N] or numbers.

    ``fm_fast.testing.check_path`` finds the usual mistakes in one of your own.
    """

    def alpha(self, t: Tensor, /) -> Tensor | float: ...

    def sigma(self, t: Tensor, /) -> Tensor | float: ...

    def d_alpha(self, t: Tensor, /) -> Tensor | float: ...

    def d_sigma(self, t: Tensor, /) -> Tensor | float: ...


@dataclass(frozen=True)
class OT:
    """Optimal-transport path: alpha = t, sigma = 1 - (1 - sigma_min) t (equation 20)."""

    sigma_min: float = 0.0
    t_min: ClassVar[float] = 0.0
    t_max: ClassVar[float] = 1.0
    prior_scale: ClassVar[float] = 1.0
    starts_at_noise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _require_numbers(sigma_min=self.sigma_min)
        if not 0.0 <= self.sigma_min < 1.0:
            raise ValueError(f"sigma_min must lie in [0, 1), got {self.sigma_min}")

    @property
    def ends_at_data(self) -> bool:
        return self.sigma_min == 0.0

    def alpha(self, t: Tensor) -> Tensor:
        return t

    def sigma(self, t: Tensor) -> Tensor:
        return 1.0 - (1.0 - self.sigma_min) * t

    def d_alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return torch.full_like(t, self.sigma_min - 1.0)


@dataclass(frozen=True)
class VP:
    """Variance-preserving diffusion path (equation 18 and appendix E.1), beta(s) = beta_min + s (beta_max - beta_min), s = 1 - t."""

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min: ClassVar[float] = 0.0
    t_max: ClassVar[float] = 1.0 - EDGE
    prior_scale: ClassVar[float] = 1.0
    starts_at_noise: ClassVar[bool] = False
    ends_at_data: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _require_numbers(beta_min=self.beta_min, beta_max=self.beta_max)
        if not 0.0 < self.beta_min <= self.beta_max:
            raise ValueError(f"beta_min and beta_max must satisfy 0 < beta_min <= beta_max, got {self.beta_min} and {self.beta_max}")

    def _integral(self, t: Tensor) -> Tensor:
        s = 1.0 - t
        return self.beta_min * s + 0.5 * (self.beta_max - self.beta_min) * s * s

    def _beta(self, t: Tensor) -> Tensor:
        return self.beta_min + (self.beta_max - self.beta_min) * (1.0 - t)

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(-0.5 * self._integral(t))

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(-torch.expm1(-self._integral(t)))

    def d_alpha(self, t: Tensor) -> Tensor:
        return 0.5 * self._beta(t) * self.alpha(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return -self.alpha(t) * self.d_alpha(t) / self.sigma(t)


@dataclass(frozen=True)
class VE:
    """Variance-exploding diffusion path (equation 16): alpha = 1, sigma = sigma_min (sigma_max / sigma_min)^(1 - t).

    The paper leaves the schedule open; the geometric one is used. Its prior is N(x1, sigma_max^2), so ``prior_scale`` is sigma_max.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0
    t_min: ClassVar[float] = 0.0
    t_max: ClassVar[float] = 1.0
    starts_at_noise: ClassVar[bool] = False
    ends_at_data: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _require_numbers(sigma_min=self.sigma_min, sigma_max=self.sigma_max)
        if not 0.0 < self.sigma_min < self.sigma_max:
            raise ValueError(f"sigma_min and sigma_max must satisfy 0 < sigma_min < sigma_max, got {self.sigma_min} and {self.sigma_max}")

    @property
    def prior_scale(self) -> float:
        return self.sigma_max

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_min * torch.exp((1.0 - t) * math.log(self.sigma_max / self.sigma_min))

    def d_alpha(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return -math.log(self.sigma_max / self.sigma_min) * self.sigma(t)


@dataclass(frozen=True)
class Cosine:
    """Trigonometric path: alpha = sin(pi t / 2), sigma = cos(pi t / 2). Not in the paper; variance preserving without a schedule."""

    t_min: ClassVar[float] = 0.0
    t_max: ClassVar[float] = 1.0
    prior_scale: ClassVar[float] = 1.0
    starts_at_noise: ClassVar[bool] = True
    ends_at_data: ClassVar[bool] = True

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sin(0.5 * math.pi * t)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sin(0.5 * math.pi * (1.0 - t))  # which near t = 1 is exact, unlike the cosine

    def d_alpha(self, t: Tensor) -> Tensor:
        return 0.5 * math.pi * self.sigma(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return -0.5 * math.pi * self.alpha(t)


BUILT_IN = (OT, VP, VE, Cosine)
NAMED: dict[str, Path] = {"ot": OT(), "vp": VP(), "ve": VE(), "cosine": Cosine()}


def as_path(path: "str | Path") -> Path:
    """The path that a name or an object stands for; anything else is an error that lists the names."""
    if isinstance(path, str) and path in NAMED:
        return NAMED[path]
    if type(path) in BUILT_IN:  # to look for the methods of a protocol takes as long as a small kernel
        return path  # type: ignore[return-value]
    if not isinstance(path, (str, type)) and isinstance(path, Path):
        _check_limits(path)
        return path
    raise ValueError(f"path must be one of {', '.join(NAMED)} or an object with alpha, sigma, d_alpha and d_sigma, got {path!r}")


def time_limits(path: str | Path) -> tuple[float, float]:
    """(t_min, t_max) of the path."""
    return _limits(as_path(path))


def _limits(path: Path) -> tuple[float, float]:
    return getattr(path, "t_min", 0.0), getattr(path, "t_max", 1.0)


def _check_limits(path: Path) -> None:
    low, high = _limits(path)
    _checks.finite_number("t_min of a path", low)
    _checks.finite_number("t_max of a path", high)
    if not 0.0 <= low < high <= 1.0:
        raise ValueError(f"t_min and t_max of a path must satisfy 0 <= t_min < t_max <= 1, got {low} and {high}")


def prior_scale(path: str | Path) -> float | Tensor:
    """Standard deviation of the noise that a solve starts from; a tensor where a path of the user's own says so."""
    return getattr(as_path(path), "prior_scale", 1.0)


def kernel_form(path: Path) -> tuple[int, float, float]:
    """(code, a, b) with which the fused kernels evaluate a built-in path themselves; others are evaluated in Python."""
    if type(path) is OT:
        return PathCode.ot.value, path.sigma_min, 0.0
    if type(path) is VP:
        return PathCode.vp.value, path.beta_min, path.beta_max
    if type(path) is VE:
        return PathCode.ve.value, path.sigma_min, path.sigma_max
    return PathCode.cosine.value if type(path) is Cosine else PathCode.given.value, 0.0, 0.0
