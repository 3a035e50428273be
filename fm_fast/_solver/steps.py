"""Times and step lengths of each sample's own, which stay on the device."""

import operator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fm_fast import _ops, reference
from fm_fast._constants import constant
from fm_fast.solvers import EmbeddedRungeKutta


class Counts(NamedTuple):
    """How many samples are on their way to the end, and how many were given up and accepted by the last decision."""

    on_the_way: int
    given_up: int
    accepted: int


class Planned(NamedTuple):
    """Steps that are to be tried: where they begin, and their lengths; float64 [B]."""

    t: Tensor
    lengths: Tensor


class Steps:
    """Where all samples are and how they go on, as op ``step_control`` keeps it: its numbers and counts are those of
    :class:`fm_fast.reference.StepControl`.

    Attributes:
        accepted: bool [B], whose last step counts.
        times: float64 [S, B], of the evaluations of the steps that are planned.
        factors: [2, B] in the state's dtype, their lengths, and those over the lengths before.
    """

    def __init__(self, y: Tensor, stops: Tensor, method: EmbeddedRungeKutta, backend: str) -> None:
        self._control, self._order, self._stops, self._dtype = _ops.step_control(backend), method.order, stops, y.dtype
        self._nodes = constant(np.array(method.table.c), torch.float64, y.device)
        self._totals, self._totals_before = stops.new_zeros(3, dtype=torch.int64), [0, 0, 0]
        self._numbers, self._counts = stops.new_ones(3, len(y)), stops.new_ones(3, len(y), dtype=torch.int64)
        self._numbers[0] = stops[0]  # and slopes begin as they are: times a length of 1
        self._counts[2] = reference.ON_THE_WAY

    @property
    def t(self) -> Tensor:
        """float64 [B]"""
        return self._numbers[0]

    @property
    def next_stop(self) -> Tensor:
        """int64 [B]"""
        return self._counts[0]

    @property
    def evaluations(self) -> Tensor:
        """int64 [B], so far."""
        return self._counts[1]

    @property
    def on_the_way(self) -> Tensor:
        return self._counts[2] == reference.ON_THE_WAY

    @property
    def at_the_end(self) -> Tensor:
        return self._counts[2] == reference.AT_THE_END

    def planned(self) -> Planned:
        """In memory of its own, which the next decision does not change."""
        t, _, lengths = self._numbers.clone().unbind()
        return Planned(t, lengths)

    def begin(self, lengths: Tensor, evaluations: int) -> Counts:
        """Plan first steps of these lengths [B], which took some evaluations to find. Waits for the device."""
        self._numbers[1], self._counts[1] = lengths, evaluations
        return self.go_on(self._stops.new_empty(0, len(lengths)), 0)

    @torch.no_grad()
    def go_on(self, mean_squares: Tensor, evaluations: int) -> Counts:
        """Judge steps by the mean squares [parts, B] of their errors, and plan the next ones. Waits for the device."""
        batch = mean_squares.shape[1]
        # In new memory: a graph of the solve may hold the last step's.
        accepted, self.factors = mean_squares.new_empty(batch, dtype=torch.uint8), mean_squares.new_empty(2, batch, dtype=self._dtype)
        self.accepted, self.times = accepted.view(torch.bool), mean_squares.new_empty(len(self._nodes), batch)
        state = (self._numbers, self._counts, self._totals, accepted, self.times, self.factors)
        self._control(*state, mean_squares, self._stops, self._nodes, self._order, evaluations)
        before, self._totals_before = self._totals_before, self._totals.tolist()
        return Counts(*map(operator.sub, self._totals_before, before))

    def narrow(self, samples: Tensor) -> None:
        """Go on with some samples alone, whose steps are planned."""
        self._numbers, self._counts = self._numbers[:, samples], self._counts[:, samples]
        self.times, self.factors = self.times[:, samples], self.factors[:, samples]
