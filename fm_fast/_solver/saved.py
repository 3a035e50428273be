"""States at the times that are asked for between the first and the last, of samples whose steps differ."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fm_fast._constants import constant
from fm_fast._solver.derivative import Parts
from fm_fast._solver.steps import Planned, Steps
from fm_fast._solver.trials import Trials
from fm_fast.solvers import EmbeddedRungeKutta

BESIDE_A_JUMP = 2.0**-40  # long enough a step for float64


class SavedStates:
    """The state of each sample at each of these times, NaN until it comes by.

    Methods that interpolate pass these times within a step. The steps of others stop there. All stop on both sides of a jump.

    Attributes:
        stops: float64, the first time and those at which steps have to end.
        indices: of the samples in the whole batch.
    """

    def __init__(self, start: Parts, times: Sequence[float], jumps: Sequence[float], method: EmbeddedRungeKutta) -> None:
        inner, batch, device = len(times) - 2, len(start[0]), start[0].device
        self._times = constant(np.array(times), torch.float64, device)
        self._forward, self._interpolates = times[-1] > times[0], method.interpolates
        self._states = [torch.full((inner, *part.shape), torch.nan, dtype=part.dtype, device=device) for part in start] if inner else []
        self._next = torch.ones(batch, dtype=torch.int64, device=device)
        self.indices = torch.arange(batch, device=device)
        stops = _stops(times, jumps, method.interpolates)
        self.stops = constant(np.array(stops), torch.float64, device)
        # Of each stop: how many times, the first included, have come by there.
        self._times_until = constant(np.cumsum(np.isin(stops, times[:-1]), dtype=np.int64), torch.int64, device)

    @property
    def lie_within_steps(self) -> bool:
        return bool(self._states) and self._interpolates

    def narrow(self, samples: Tensor) -> None:
        """Go on with some samples alone."""
        self._next, self.indices = self._next[samples], self.indices[samples]

    def note_within(self, tried: Planned, steps: Steps, trials: Trials) -> None:
        """Notes the states inside of the steps that were tried, where they count."""
        last = len(self._times) - 1
        while True:
            due = self._times[self._next]
            passed = steps.t >= due if self._forward else steps.t <= due
            samples = (steps.accepted & (self._next < last) & passed).nonzero().squeeze(1)
            if len(samples) == 0:
                return
            theta = (due[samples] - tried.t[samples]) / tried.lengths[samples]
            self._note(samples, trials.within(samples, theta))

    def note_at_stops(self, steps: Steps, y: Parts) -> None:
        """Notes the states of samples that have arrived at a stop, and have another before them."""
        if not self._states or self._interpolates:
            return
        samples = (self._times_until[steps.next_stop - 1] > self._next).nonzero().squeeze(1)
        self._note(samples, tuple(part[samples] for part in y))

    def _note(self, samples: Tensor, states: Parts) -> None:
        for kept, state in zip(self._states, states, strict=True):
            kept[self._next[samples] - 1, self.indices[samples]] = state
        self._next[samples] += 1

    def states(self) -> list[Parts]:
        return list(zip(*self._states, strict=True))


def _stops(times: Sequence[float], jumps: Sequence[float], interpolates: bool) -> list[float]:
    """The first time, and those at which steps have to end."""
    beside = [jump + side for jump in jumps for side in (-BESIDE_A_JUMP, BESIDE_A_JUMP)]
    inner = {*beside, *(() if interpolates else times[1:-1])}
    low, high = sorted((times[0], times[-1]))
    stops = sorted((stop for stop in inner if low < stop < high), reverse=times[-1] < times[0])
    return [times[0], *stops, times[-1]]
