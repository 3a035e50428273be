"""Adaptive solves in which each sample has times and step lengths of its own, so that its accuracy does not depend on the batch.

The rules are those of ``adaptive.py``, for every sample by itself. All samples are evaluated together, each at its own time, until the
last one is at its end; those that are there take steps of length 0, or leave the batch. Times and lengths stay on the device, where op
``step_control`` turns the errors of a step into the next one: the host reads three numbers for a step that is tried.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fm_fast import reference
from fm_fast._solver.derivative import Counted, Derivative, Parts, moment
from fm_fast._solver.first_step import difference, euler_lengths, first_lengths
from fm_fast._solver.rules import Rules, Solved
from fm_fast._solver.saved import SavedStates
from fm_fast._solver.steps import Steps
from fm_fast._solver.trials import Trials

# The derivative of some samples [n] of the batch
Narrowed = Callable[[Tensor], Derivative]
MOST_RUNNING = 0.75  # of a batch that is narrowed to the samples that are not at their ends


def solve_per_sample(
    derivative: Derivative,
    start: Parts,
    times: Sequence[float],
    rules: Rules,
    narrowed: Narrowed | None = None,
    jumps: Sequence[float] = (),
) -> Solved:
    """As :func:`fm_fast._solver.adaptive.solve_adaptive`, for parts [B, ...] and at least two times.

    narrowed: samples that are at their ends leave the batch, when they are a quarter of it.

    jumps: as there; a step of next to no length leads over each.

    Raises RuntimeError unless ``rules.mark``: a sample's field is not finite, its step becomes too short to be one, or ``max_steps``
    steps that were tried do not bring it to the end.
    """
    if start[0].numel() == 0:
        return Solved([start for _ in times], 0, torch.zeros(len(start[0]), dtype=torch.int64, device=start[0].device))
    begin = rules.beginning(start)
    counted = Counted(derivative, start)
    saved = SavedStates(begin, times, jumps, rules.method)
    end, nfe_of_each = _Control(counted, begin, saved, rules, narrowed).to_the_end()
    return Solved([start, *saved.states(), end], counted.evaluations, nfe_of_each)


class _Results(NamedTuple):
    """Of some samples: their indices in the batch, their states, NaN where one has not come to its end, and their evaluations."""

    indices: Tensor
    y: Parts
    nfe: Tensor


class _Control:
    """The way of all samples to their ends, in steps whose lengths have the sign of the solve's direction."""

    def __init__(self, derivative: Counted, start: Parts, saved: SavedStates, rules: Rules, narrowed: Narrowed | None) -> None:
        self._derivative, self._saved, self._rules, self._narrowed = derivative, saved, rules, narrowed
        self._tried, self._batch = 0, len(start[0])
        self._steps = Steps(start[0], saved.stops, rules.method, rules.backend)
        t = saved.stops[0].repeat(self._batch)
        self._trials = Trials(derivative, start, t, rules)
        lengths = _first_steps(self._trials, derivative, t, saved.stops, rules.method.order)
        self._counts = self._steps.begin(lengths, derivative.evaluations)
        self._gone = list[_Results]()

    def to_the_end(self) -> tuple[Parts, Tensor]:
        """The states at the end, NaN where a sample has not come there, and the evaluations of each sample."""
        while self._goes_on():
            self._narrow_if_worth_it()
            self._attempt()
        last = self._results(slice(None))
        return (last.y, last.nfe) if not self._gone else _in_order([*self._gone, last])

    def _goes_on(self) -> bool:
        """Whether a sample is on its way and may try a step. One whose step is too short to be one is given up."""
        exhausted = self._tried == self._rules.max_steps
        if not self._rules.mark:
            self._require_success(exhausted)
        return self._counts.on_the_way > 0 and not exhausted

    def _require_success(self, exhausted: bool) -> None:
        name, tolerance = self._rules.method.name, self._rules.tolerance
        if self._counts.given_up:
            failed = f"{name} failed for {self._counts.given_up} of {self._batch} samples"
            raise RuntimeError(f"{failed}; their velocity is not finite, or too rough for {tolerance}")
        if self._counts.on_the_way and exhausted:
            steps = f"{name} did not reach the end of the solve in max_steps={self._tried} steps"
            raise RuntimeError(f"{steps} for {self._counts.on_the_way} of {self._batch} samples; raise max_steps, or {tolerance}")

    def _narrow_if_worth_it(self) -> None:
        """Go on with those that are on their way."""
        if self._narrowed is None or self._counts.on_the_way > MOST_RUNNING * len(self._trials.y[0]):
            return
        on_the_way = self._steps.on_the_way
        self._gone.append(self._results((~on_the_way).nonzero().squeeze(1)))
        samples = on_the_way.nonzero().squeeze(1)
        for part in (self._steps, self._trials, self._saved):
            part.narrow(samples)
        self._derivative.change(self._narrowed(self._saved.indices))

    def _attempt(self) -> None:
        self._tried += 1
        steps, trials, before = self._steps, self._trials, self._derivative.evaluations
        mean_squares = trials.step(steps.times, steps.factors)
        tried = steps.planned() if self._saved.lie_within_steps else None
        self._counts = steps.go_on(mean_squares, self._derivative.evaluations - before)
        if tried is not None:
            self._saved.note_within(tried, steps, trials)
        if self._counts.accepted == len(trials.y[0]):
            trials.accept_all()
        elif self._counts.accepted:
            trials.accept(steps.accepted)
        self._saved.note_at_stops(steps, trials.y)

    def _results(self, samples: Tensor | slice) -> _Results:
        """Of samples that are not on their way any more, or never will be at their ends."""
        y, there = tuple(part[samples] for part in self._trials.y), self._steps.at_the_end[samples]
        if self._rules.mark:
            y = tuple(torch.where(reference.per_sample(there, part), part, torch.nan) for part in y)
        return _Results(self._saved.indices[samples], y, self._steps.evaluations[samples])


def _in_order(results: Sequence[_Results]) -> tuple[Parts, Tensor]:
    """The states and evaluations of all samples, in the order of the batch."""
    order = torch.cat([each.indices for each in results]).argsort()
    parts = zip(*(each.y for each in results), strict=True)
    return tuple(torch.cat(part)[order] for part in parts), torch.cat([each.nfe for each in results])[order]


@torch.no_grad()
def _first_steps(trials: Trials, derivative: Counted, t: Tensor, stops: Tensor, order: int) -> Tensor:
    """Hairer's guesses, with the sign of the solve's direction; 0 where the state or its slope is not finite."""
    y, slope, direction, span = trials.y, trials.slope, torch.sign(stops[-1] - stops[0]), (stops[-1] - stops[0]).abs()
    state, speed = trials.norms(y), trials.norms(slope)
    h = euler_lengths(state, speed)
    there = moment(torch.where(h > span, stops[-1], t + direction * h), y[0])
    ahead = derivative(there, tuple(_euler(part, direction * h, k) for part, k in zip(y, slope, strict=True)))
    change = trials.norms(difference(ahead, slope)) / h
    return direction * first_lengths(h, speed, change, order)


def _euler(y: Tensor, lengths: Tensor, slope: Tensor) -> Tensor:
    return y + reference.per_sample(lengths.to(y.dtype), y) * slope
