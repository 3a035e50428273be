"""Times and step lengths of each sample's own, which stay on the device."""

import numpy as np
import torch
from torch import Tensor

from fm_fast import _ops, reference
from fm_fast._constants import constant
from fm_fast.solvers import EmbeddedRungeKutta


class Steps:
    """Where all samples are and how they go on, as op ``step_control`` keeps it.

    Attributes:
        numbers, counts: as in :class:`fm_fast.reference.StepControl`.
        accepted: bool [B], whose last step counts.
        times: float64 [S, B], of the evaluations of the steps that are planned.
        factors: [2, B] in the state's dtype, their lengths, and those over the lengths before.
    """

    def __init__(self, y: Tensor, stops: Tensor, method: EmbeddedRungeKutta, backend: str) -> None:
        self._control, self._order, self._stops, self._dtype = _ops.step_control(backend), method.order, stops, y.dtype
        self._nodes = constant(np.array(method.table.c), torch.float64, y.device)
        self._totals, self._read = stops.new_zeros(3, dtype=torch.int64), [0, 0, 0]
        self.numbers, self.counts = stops.new_ones(3, len(y)), stops.new_ones(3, len(y), dtype=torch.int64)
        self.numbers[0] = stops[0]  # and slopes begin as they are: times a length of 1
        self.counts[2] = reference.ON_THE_WAY

    @property
    def on_the_way(self) -> Tensor:
        return self.counts[2] == reference.ON_THE_WAY

    @property
    def at_the_end(self) -> Tensor:
        return self.counts[2] == reference.AT_THE_END

    def begin(self, lengths: Tensor, evaluations: int) -> list[int]:
        """Plan first steps of these lengths [B], which took some evaluations to find; returns what :meth:`go_on` does."""
        self.numbers[1], self.counts[1] = lengths, evaluations
        return self.go_on(self._stops.new_empty(0, len(lengths)), 0)

    @torch.no_grad()
    def go_on(self, means: Tensor, evaluations: int) -> list[int]:
        """Judge steps by the mean squares of their errors, and plan the next ones.

        Returns how many samples are on their way, were given up now, and were accepted now: waits for the device.
        """
        batch = means.shape[1]
        # In new memory: a graph of the solve may hold the last step's.
        accepted, self.factors = means.new_empty(batch, dtype=torch.uint8), means.new_empty(2, batch, dtype=self._dtype)
        self.accepted, self.times = accepted.view(torch.bool), means.new_empty(len(self._nodes), batch)
        state = (self.numbers, self.counts, self._totals, accepted, self.times, self.factors)
        self._control(*state, means, self._stops, self._nodes, self._order, evaluations)
        before, self._read = self._read, self._totals.tolist()
        return [now - then for now, then in zip(self._read, before, strict=True)]

    def narrow(self, samples: Tensor) -> None:
        """Go on with some samples alone, whose steps are planned."""
        self.numbers, self.counts = self.numbers[:, samples], self.counts[:, samples]
        self.times, self.factors = self.times[:, samples], self.factors[:, samples]
