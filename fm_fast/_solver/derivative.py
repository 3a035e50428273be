"""What an adaptive method integrates: the derivative of a state in parts, at one time of the whole batch or at one of each sample's own.

The parts of a state are tensors [B, ...]: the samples, and for likelihoods the integral beside them.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fm_fast._solver.loop import counts_writes, unwritten

Parts = tuple[Tensor, ...]


class Moment(NamedTuple):
    """The time of an evaluation: a number for the whole batch, or float64 [B]; and as a model is given it, [B] in the state's dtype."""

    exact: float | Tensor
    given: Tensor


# (time, parts of the state) -> their derivatives, in any dtype, and in memory that may be used again
Derivative = Callable[[Moment, Parts], Parts]


def moment(t: float | Tensor, y: Tensor) -> Moment:
    """A time that no step has prepared, in memory of its own."""
    if isinstance(t, Tensor):
        return Moment(t, t.to(y.dtype, copy=True))
    return Moment(t, torch.full((1,), t, dtype=y.dtype, device=y.device).expand(len(y)))


class Counted:
    """The derivative, whose evaluations are counted, and which must not write into the state."""

    def __init__(self, derivative: Derivative, start: Parts, name: str = "model") -> None:
        self._derivative, self._watches, self._name = derivative, counts_writes(start[0]), name
        self.evaluations = 0

    def change(self, derivative: Derivative) -> None:
        """Go on with another derivative."""
        self._derivative = derivative

    def __call__(self, now: Moment, y: Parts) -> Parts:
        self.evaluations += 1
        return unwritten(y[0], lambda: self._derivative(now, y), self._name) if self._watches else self._derivative(now, y)
