"""Hairer's guess of a first step: one whose error is about a hundredth of the tolerance.

With the norms of the state, d0, and of its slope, d1, an Euler step of length h0 = 0.01 d0 / d1 leads to a second slope, and d2 is the norm
of the difference of the two over h0. The guess is (0.01 / max(d1, d2))^(1/order), at most 100 h0. Norms are beside the tolerance.

The formulas stand here twice: for numbers, of a batch whose steps are the same, and for tensors [B], which stay on the device.

Source: Hairer, Nørsett and Wanner, Solving Ordinary Differential Equations I, chapter II.4.
"""

import math

import torch
from torch import Tensor

from fm_fast._solver.derivative import Parts

SMALL_NORM, SMALL_LENGTH = 1e-5, 1e-6  # below that norm a quotient says nothing, and the Euler step has that length
NO_SLOPE = 1e-15


def euler_length(state: float, speed: float) -> float:
    """h0 of finite norms d0 and d1."""
    return SMALL_LENGTH if state < SMALL_NORM or speed < SMALL_NORM else 0.01 * state / speed


def first_length(euler: float, speed: float, change: float, order: int) -> float:
    """The guess from h0, d1 and d2."""
    steepest = max(speed, change)
    flat = not math.isfinite(change) or steepest <= NO_SLOPE
    guess = max(euler * 1e-3, SMALL_LENGTH) if flat else (0.01 / steepest) ** (1.0 / order)
    return min(100.0 * euler, guess)


def euler_lengths(state: Tensor, speed: Tensor) -> Tensor:
    """h0 of each sample; 0 where its norms are not finite."""
    lengths = torch.where((state < SMALL_NORM) | (speed < SMALL_NORM), SMALL_LENGTH, 0.01 * state / speed)
    return torch.where(state.isfinite() & speed.isfinite(), lengths, 0.0)


def first_lengths(euler: Tensor, speed: Tensor, change: Tensor, order: int) -> Tensor:
    """The guess for each sample; 0 where h0 is."""
    steepest = torch.maximum(speed, change)
    flat = ~change.isfinite() | (steepest <= NO_SLOPE)
    guess = torch.where(flat, (euler * 1e-3).clamp(min=SMALL_LENGTH), (0.01 / steepest) ** (1.0 / order))
    return torch.minimum(100.0 * euler, guess)


def difference(ahead: Parts, slope: Parts) -> Parts:
    """Of the two slopes, in the dtype of the first."""
    return tuple(a.to(b.dtype) - b for a, b in zip(ahead, slope, strict=True))
