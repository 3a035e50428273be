"""Adaptive solves in which each sample has times and step lengths of its own, so that its accuracy does not depend on the batch.

The rules are those of ``adaptive.py``, for every sample by itself. All samples are evaluated together, each at its own time, until the
last one is at its end; those that are there take steps of length 0, or leave the batch. Times and lengths stay on the device, where op
``step_control`` turns the errors of a step into the next one: the host reads three numbers for a step that is tried. Slopes are kept times
the step's length, so that its coefficients are the same for all samples.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fm_fast import reference
from fm_fast._constants import constant
from fm_fast._solver.adaptive import Counted
from fm_fast._solver.rules import Rules
from fm_fast._solver.steps import Steps
from fm_fast._solver.trial import Arithmetic, Derivative, Moment, Parts, moment, norm_of_each
from fm_fast.solvers import EmbeddedRungeKutta

# The derivative of some samples [n] of the batch
Narrowed = Callable[[Tensor], Derivative]
BESIDE_A_JUMP = 2.0**-40  # long enough a step for float64
MOST_RUNNING = 0.75  # of a batch that is narrowed to the samples that are not at their ends


class Solved(NamedTuple):
    """The state at each time; how often the model was called; int64 [B], how often before the sample was at its end."""

    states: list[Parts]
    nfe: int
    nfe_of_each: Tensor


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
    passed = _Passed(begin, times, jumps, rules.method)
    end, nfe_of_each = _Control(counted, begin, passed, rules, narrowed).to_the_end()
    return Solved([start, *passed.states(), end], counted.evaluations, nfe_of_each)


def _of_length_one(rules: Rules, y: Parts) -> Arithmetic:
    """For slopes that are kept times the lengths of their steps."""
    arithmetic = rules.arithmetic(y)
    arithmetic.begin(1.0)
    return arithmetic


class _Trials:
    """The accepted states of all samples, their slopes times the length of a step, and steps tried from there."""

    def __init__(self, derivative: Derivative, y: Parts, t: Tensor, rules: Rules) -> None:
        self._derivative, self._arithmetic, self._rules = derivative, _of_length_one(rules, y), rules
        self._goes_on, self._known = rules.method.first_same_as_last, True
        self.y = self._end = y
        self._slopes = [self._arithmetic.keep(0, derivative(moment(t, y[0]), y))]

    @property
    def slope(self) -> Parts:
        """The slope at y, before the first step."""
        return self._slopes[0]

    def size(self, values: Parts) -> Tensor:
        """The norms of values beside the tolerance at y, float64 [B]."""
        return norm_of_each(self._arithmetic.size(values, self.y, self._rules.tolerance))

    def step(self, times: Tensor, factors: Tensor) -> Tensor:
        """Try a step of each sample, with its evaluations at times [S, B]; factors [2, B] of the new slopes and of one that is kept.

        Returns mean squares of the errors, float64 [parts, B].
        """
        arithmetic, (length, ratio) = self._arithmetic, map(self._shaped, factors.unbind())
        moments = self._moments(times)
        end, slopes = self.y, [self._first_slope(moments[0], length, ratio)]
        for stage in range(1, len(moments)):
            end = arithmetic.combine(stage - 1, self.y, slopes)
            slopes.append(arithmetic.keep(stage, self._derivative(moments[stage], end), length))
        if not self._goes_on:
            end = arithmetic.combine(len(moments) - 1, self.y, slopes)
        self._end, self._slopes, self._known = end, slopes, self._goes_on
        with torch.no_grad():
            return arithmetic.error(self.y, end, slopes, self._rules.tolerance)

    def _moments(self, times: Tensor) -> list[Moment]:
        """In new memory, since a model may keep what it is given or write into it; each in its own where autograd counts writes."""
        if self._rules.plain:
            return [moment(t, self.y[0]) for t in times.unbind()]
        return list(map(Moment, times.unbind(), times.to(self.y[0].dtype, copy=True).unbind()))

    def _first_slope(self, now: Moment, length: Parts, ratio: Parts) -> Parts:
        if not self._known:
            return self._arithmetic.keep(0, self._derivative(now, self.y), length)
        return self._arithmetic.keep(0, self._slopes[0], ratio)

    def within(self, samples: Tensor, theta: Tensor) -> Parts:
        """The states of some samples a part theta of the way through their steps, of a method that interpolates."""
        weights = self._rules.method.weights_within(theta)
        return tuple(self._within(part, [slope[i] for slope in self._slopes], samples, weights) for i, part in enumerate(self.y))

    @staticmethod
    def _within(y: Tensor, slopes: Sequence[Tensor], samples: Tensor, weights: Sequence[Tensor]) -> Tensor:
        state = y[samples]
        for slope, weight in zip(slopes, weights, strict=True):
            state = state + reference.per_sample(weight.to(y.dtype), state) * slope[samples]
        return state

    def accept_all(self) -> None:
        """All samples go on from the end of the step that was tried."""
        self._arithmetic.accept()
        self.y = self._end
        if self._goes_on:
            self._slopes[0] = self._slopes[-1]

    def accept(self, accepted: Tensor) -> None:
        """The accepted [B] samples do."""
        chosen = tuple(reference.per_sample(accepted, part) for part in self.y)
        self.y = self._arithmetic.merge(chosen, self._end, self.y)
        if self._goes_on:
            self._slopes[0] = self._arithmetic.merge(chosen, self._slopes[-1], self._slopes[0])

    def narrow(self, samples: Tensor) -> None:
        """Go on with some samples alone."""
        self.y, slope = (tuple(part[samples] for part in parts) for parts in (self.y, self._slopes[0]))
        self._arithmetic = _of_length_one(self._rules, self.y)
        self._slopes = [self._arithmetic.keep(0, slope)]

    def _shaped(self, values: Tensor) -> Parts:
        return tuple(reference.per_sample(values, part) for part in self.y)


def _stops(times: Sequence[float], jumps: Sequence[float], interpolates: bool) -> list[float]:
    """The first time, and those at which steps have to end."""
    beside = [jump + side for jump in jumps for side in (-BESIDE_A_JUMP, BESIDE_A_JUMP)]
    inner = {*beside, *(() if interpolates else times[1:-1])}
    low, high = sorted((times[0], times[-1]))
    stops = sorted((stop for stop in inner if low < stop < high), reverse=times[-1] < times[0])
    return [times[0], *stops, times[-1]]


class _Passed:
    """States at the times between the first and the last, of each sample where it comes by; NaN until then.

    Methods that interpolate pass these times within a step. The steps of others stop there. All stop on both sides of a jump.

    Attributes:
        stops: float64, the first time and those at which steps have to end.
        numbers: of the samples in the whole batch.
    """

    def __init__(self, start: Parts, times: Sequence[float], jumps: Sequence[float], method: EmbeddedRungeKutta) -> None:
        inner, batch, device = len(times) - 2, len(start[0]), start[0].device
        self._times = constant(np.array(times), torch.float64, device)
        self._forward, self._interpolates = times[-1] > times[0], method.interpolates
        self._states = [torch.full((inner, *part.shape), torch.nan, dtype=part.dtype, device=device) for part in start] if inner else []
        self._next = torch.ones(batch, dtype=torch.int64, device=device)
        self.numbers = torch.arange(batch, device=device)
        stops = _stops(times, jumps, method.interpolates)
        self.stops = constant(np.array(stops), torch.float64, device)
        # By the number of the next stop: how many times have come by.
        self._come = constant(np.cumsum(np.isin(stops, times[:-1]), dtype=np.int64), torch.int64, device)

    @property
    def look_within(self) -> bool:
        return bool(self._states) and self._interpolates

    def narrow(self, samples: Tensor) -> None:
        """Go on with some samples alone."""
        self._next, self.numbers = self._next[samples], self.numbers[samples]

    def within(self, before: Tensor, steps: Steps, trials: _Trials) -> None:
        """Notes the states inside of accepted steps from where the numbers of ``steps`` were before."""
        last = len(self._times) - 1
        while True:
            due, t, reached = self._times[self._next], before[0], steps.numbers[0]
            come = reached >= due if self._forward else reached <= due
            samples = (steps.accepted & (self._next < last) & come).nonzero().squeeze(1)
            if len(samples) == 0:
                return
            self._note(samples, trials.within(samples, (due[samples] - t[samples]) / before[2, samples]))

    def at_stops(self, steps: Steps, y: Parts) -> None:
        """Notes the states of samples that have arrived at a stop, and have another before them."""
        if not self._states or self._interpolates:
            return
        samples = (self._come[steps.counts[0] - 1] > self._next).nonzero().squeeze(1)
        self._note(samples, tuple(part[samples] for part in y))

    def _note(self, samples: Tensor, states: Parts) -> None:
        for kept, state in zip(self._states, states, strict=True):
            kept[self._next[samples] - 1, self.numbers[samples]] = state
        self._next[samples] += 1

    def states(self) -> list[Parts]:
        return list(zip(*self._states, strict=True))


class _Ends(NamedTuple):
    """Results of samples, by their numbers in the batch."""

    numbers: Tensor
    y: Parts
    nfe: Tensor


class _Control:
    """The way of all samples to their ends, in steps whose lengths have the sign of the solve's direction."""

    def __init__(self, derivative: Counted, start: Parts, passed: _Passed, rules: Rules, narrowed: Narrowed | None) -> None:
        self._derivative, self._passed, self._rules, self._narrowed = derivative, passed, rules, narrowed
        self._tried, self._batch, stops = 0, len(start[0]), passed.stops
        self._steps = Steps(start[0], stops, rules.method, rules.backend)
        t = stops[0].repeat(self._batch)
        self._trials = _Trials(derivative, start, t, rules)
        lengths = _first_lengths(self._trials, derivative, t, stops, rules.method.order)
        self._running, self._lost, _ = self._steps.begin(lengths, derivative.evaluations)
        self._left = list[_Ends]()

    def to_the_end(self) -> tuple[Parts, Tensor]:
        """The states at the end, NaN where a sample has not come there, and the evaluations of each sample."""
        while self._goes_on():
            self._attempt()
        if not self._left:
            last = self._ends(slice(None))
            return last.y, last.nfe
        ends = [*self._left, self._ends(slice(None))]
        order = torch.cat([each.numbers for each in ends]).argsort()
        parts = zip(*(each.y for each in ends), strict=True)
        return tuple(torch.cat(part)[order] for part in parts), torch.cat([each.nfe for each in ends])[order]

    def _ends(self, samples: Tensor | slice) -> "_Ends":
        """The results of samples that are not on their way any more."""
        y, there = tuple(part[samples] for part in self._trials.y), self._steps.at_the_end[samples]
        if self._rules.mark:
            y = tuple(torch.where(reference.per_sample(there, part), part, torch.nan) for part in y)
        return _Ends(self._passed.numbers[samples], y, self._steps.counts[1, samples])

    def _narrow(self, narrowed: Narrowed) -> None:
        """Go on with those that are on their way."""
        on_the_way = self._steps.on_the_way
        self._left.append(self._ends((~on_the_way).nonzero().squeeze(1)))
        samples = on_the_way.nonzero().squeeze(1)
        for part in (self._steps, self._trials, self._passed):
            part.narrow(samples)
        self._derivative.change(narrowed(self._passed.numbers))

    def _goes_on(self) -> bool:
        """Whether a sample is not yet at its end. A sample whose step is too short to be one is given up."""
        running, failed = self._running, self._lost
        if failed and not self._rules.mark:
            raise RuntimeError(self._sentence("failed", failed, "; their velocity is not finite, or too rough for rtol={} and atol={}"))
        exhausted = running > 0 and self._tried == self._rules.max_steps
        if exhausted and not self._rules.mark:
            steps = f"did not reach the end of the solve in max_steps={self._tried} steps"
            raise RuntimeError(self._sentence(steps, running, "; raise max_steps, or rtol={} and atol={}"))
        if self._narrowed is not None and 0 < running <= MOST_RUNNING * len(self._trials.y[0]) and not exhausted:
            self._narrow(self._narrowed)
        return running > 0 and not exhausted

    def _sentence(self, what: str, count: int, why: str) -> str:
        tolerance = self._rules.tolerance
        return f"{self._rules.method.name} {what} for {count} of {self._batch} samples{why.format(tolerance.rtol, tolerance.atol)}"

    def _attempt(self) -> None:
        self._tried += 1
        steps, trials, before = self._steps, self._trials, self._derivative.evaluations
        means = trials.step(steps.times, steps.factors)
        numbers = steps.numbers.clone() if self._passed.look_within else None
        self._running, self._lost, accepted = steps.go_on(means, self._derivative.evaluations - before)
        if numbers is not None:
            self._passed.within(numbers, steps, trials)
        if accepted == len(trials.y[0]):
            trials.accept_all()
        elif accepted:
            trials.accept(steps.accepted)
        self._passed.at_stops(steps, trials.y)


@torch.no_grad()
def _first_lengths(trials: _Trials, derivative: Counted, t: Tensor, stops: Tensor, order: int) -> Tensor:
    """Steps whose errors are about a hundredth of the tolerance, by the size of the slopes and of their change; 0 if not finite."""
    y, slope, direction = trials.y, trials.slope, torch.sign(stops[-1] - stops[0])
    state, speed = trials.size(y), trials.size(slope)
    finite = state.isfinite() & speed.isfinite()
    h = torch.where((state < 1e-5) | (speed < 1e-5), 1e-6, torch.where(finite, 0.01 * state / speed, 0.0))
    there = moment(torch.where(h > (stops[-1] - stops[0]).abs(), stops[-1], t + direction * h), y[0])
    ahead = derivative(
        there, tuple(part + reference.per_sample((direction * h).to(part.dtype), part) * k for part, k in zip(y, slope, strict=True))
    )
    change = trials.size(tuple(a.to(b.dtype) - b for a, b in zip(ahead, slope, strict=True))) / h
    steepest = torch.maximum(speed, change)
    guess = torch.where(~change.isfinite() | (steepest <= 1e-15), (h * 1e-3).clamp(min=1e-6), (0.01 / steepest) ** (1.0 / order))
    return direction * torch.where(finite, torch.minimum(100.0 * h, guess), 0.0)
