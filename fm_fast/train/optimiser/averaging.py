"""Moving averages of the weights: how fast they forget."""

import math
from dataclasses import dataclass

import numpy as np

from fm_fast import _checks

WIDEST = math.sqrt(1.0 / 12.0)  # the standard deviation, as a share of the run, of the even average of all weights


@dataclass(frozen=True)
class Averaging:
    """average = decay average + (1 - decay) weights after every update, with decay = min(limit, ((a + n) / (b + n))^exponent).

    n counts the updates before this one, so that skipped steps have no say. Made by the functions below.
    """

    limit: float
    a: float = 1.0
    b: float = 1.0
    exponent: float = 1.0

    def decay(self, n: int) -> float:
        """The decay of the update that follows n others."""
        return min(self.limit, ((self.a + n) / (self.b + n)) ** self.exponent)

    @property
    def row(self) -> tuple[float, float, float, float]:
        """The numbers as op ``adamw_ema`` reads them."""
        return self.limit, self.a, self.b, self.exponent


def fixed_decay(decay: float) -> Averaging:
    """The same decay after every update; the initial weights keep the share decay^n."""
    return Averaging(_in_unit_interval("decay", decay))


def warmed_up_decay(decay: float) -> Averaging:
    """min(decay, (1 + n) / (10 + n)): early averages forget the initial weights."""
    return Averaging(_in_unit_interval("decay", decay), 1.0, 10.0)


def power_function(gamma: float) -> Averaging:
    """Weights with a share that grows like (time)^gamma: decay = (1 - 1 / t)^(gamma + 1) at update t = 1, 2, ...

    Karras et al. 2024, "Analyzing and improving the training dynamics of diffusion models" (EDM2), section 3.1. It scales with the
    length of the run, and the first update replaces the initial weights.
    """
    if not (_checks.is_number(gamma) and gamma > -1.0):
        raise ValueError(f"gamma: expected more than -1, got {gamma!r}")
    return Averaging(1.0, 0.0, 1.0, gamma + 1.0)


def power_function_of_width(width: float) -> Averaging:
    """The power function whose standard deviation is this share of the run, e.g. 0.05 or 0.10 (sigma_rel of Karras et al. 2024)."""
    return power_function(gamma_of_width(width))


def gamma_of_width(width: float) -> float:
    """The exponent gamma with width^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)): the largest real root of that cubic.

    Raises ValueError for a width that no gamma >= 0 has, above WIDEST.
    """
    if not (_checks.is_number(width) and 0.0 < width <= WIDEST):
        raise ValueError(f"width: expected more than 0 and at most {WIDEST:.4f} (a share of the run), got {width!r}")
    precision = width**-2
    roots = np.roots([1.0, 7.0, 16.0 - precision, 12.0 - precision])
    return max(0.0, float(max(root.real for root in roots if abs(root.imag) < 1e-6)))


def _in_unit_interval(name: str, value: float) -> float:
    if not (_checks.is_number(value) and 0.0 <= value <= 1.0):
        raise ValueError(f"{name}: expected a number in [0, 1], got {value!r}")
    return value
