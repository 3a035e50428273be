"""Adaptive solves in which each sample has times and step lengths of its own, so that its accuracy does not depend on the batch.

The rules are those of ``adaptive.py``, for every sample by itself. All samples are evaluated together, each at its own time, until the
last one is at its end; those that are there take steps of length 0, or leave the batch. Times and lengths stay on the device: the host
reads two numbers for a step that is tried. Slopes are kept times the step's length, so that its coefficients are the same for all samples.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fm_fast import _ops, reference
from fm_fast._solver.adaptive import LONGEST, SAFETY, SHORTEST, Counted
from fm_fast._solver.trial import Arithmetic, Fused, Parts, Plain, Tolerance, norm_of_each
from fm_fast.solvers import EmbeddedRungeKutta

# (t float64 [B], parts of the state) -> their derivatives, as those of `trial.Derivative`
Derivative = Callable[[Tensor, Parts], Parts]
# The derivative of some samples [n] of the batch
Narrowed = Callable[[Tensor], Derivative]
MOST_RUNNING = 0.75  # of a batch that is narrowed to the samples that are not at their ends


class Rules(NamedTuple):
    """What a solve keeps to. mark: samples that cannot go on become NaN, and are no error. backend: of the arithmetic, None for plain
    PyTorch, which gradients follow.
    """

    method: EmbeddedRungeKutta
    tolerance: Tolerance
    max_steps: int
    mark: bool
    backend: str | None

    def arithmetic(self, y: Parts) -> Arithmetic:
        chosen = Plain(y, self.method) if self.backend is None else Fused(y, self.method, self.backend)
        chosen.begin(1.0)
        return chosen


class Solved(NamedTuple):
    """The state at each time; how often the model was called; int64 [B], how often before the sample was at its end."""

    states: list[Parts]
    nfe: int
    nfe_of_each: Tensor


def solve_per_sample(
    derivative: Derivative, start: Parts, times: Sequence[float], rules: Rules, narrowed: Narrowed | None = None
) -> Solved:
    """As :func:`fm_fast._solver.adaptive.solve_adaptive`, for parts [B, ...] and at least two times.

    narrowed: samples that are at their ends leave the batch, when they are a quarter of it.

    Raises RuntimeError unless ``rules.mark``: a sample's field is not finite, its step becomes too short to be one, or ``max_steps``
    steps that were tried do not bring it to the end.
    """
    if start[0].numel() == 0:
        return Solved([start for _ in times], 0, torch.zeros(len(start[0]), dtype=torch.int64, device=start[0].device))
    # The model is not to be given what is the caller's.
    begin = start if rules.backend is None else tuple(_ops.native_layout(part).clone() for part in start)
    low, high = min(times), max(times)
    counted = Counted(derivative, lambda t: t.clamp(low, high))
    passed = _Passed(begin, times, rules.method)
    end, nfe_of_each = _Control(counted, begin, passed, rules, narrowed).to_the_end()
    return Solved([start, *passed.states(), end], counted.evaluations, nfe_of_each)


class _Trials:
    """The accepted states of all samples, their slopes times the length of a step, and steps tried from there."""

    def __init__(self, derivative: Derivative, y: Parts, t: Tensor, rules: Rules) -> None:
        self._derivative, self._arithmetic, self._rules = derivative, rules.arithmetic(y), rules
        self._goes_on, self._known = rules.method.first_same_as_last, True
        self.y = self._end = y
        self._h, self._slopes = torch.ones_like(t), [self._arithmetic.keep(0, derivative(t, y))]
        self._c = torch.tensor(rules.method.table.c, dtype=torch.float64, device=t.device).unsqueeze(1)

    @property
    def slope(self) -> Parts:
        """The slope at y, before the first step."""
        return self._slopes[0]

    def size(self, values: Parts) -> Tensor:
        """The norms of values beside the tolerance at y, float64 [B]."""
        return norm_of_each(self._arithmetic.size(values, self.y, self._rules.tolerance))

    def step(self, t: Tensor, h: Tensor) -> Tensor:
        """Try a step of each sample; their errors float64 [B], of which up to 1 is tolerated."""
        arithmetic, factors, times = self._arithmetic, self._shaped(h), torch.addcmul(t, self._c, h).unbind()
        end, slopes = self.y, [self._first_slope(times[0], h, factors)]
        for stage in range(1, len(times)):
            end = arithmetic.combine(stage - 1, self.y, slopes)
            slopes.append(arithmetic.keep(stage, self._derivative(times[stage], end), factors))
        if not self._goes_on:
            end = arithmetic.combine(len(times) - 1, self.y, slopes)
        self._end, self._slopes, self._h, self._known = end, slopes, h, self._goes_on
        with torch.no_grad():
            return norm_of_each(arithmetic.error(self.y, end, slopes, self._rules.tolerance))

    def _first_slope(self, t: Tensor, h: Tensor, factors: Parts) -> Parts:
        if not self._known:
            return self._arithmetic.keep(0, self._derivative(t, self.y), factors)
        ratio = (h / self._h).nan_to_num_(0.0)  # 0 / 0 of those that are at their ends
        return self._arithmetic.keep(0, self._slopes[0], self._shaped(ratio))

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

    def accept(self, accepted: Tensor) -> None:
        """The accepted [B] samples go on from the end of the step that was tried."""
        chosen = tuple(reference.per_sample(accepted, part) for part in self.y)
        self.y = self._arithmetic.merge(chosen, self._end, self.y)
        if self._goes_on:
            self._slopes[0] = self._arithmetic.merge(chosen, self._slopes[-1], self._slopes[0])

    def narrow(self, samples: Tensor) -> None:
        """Go on with some samples alone."""
        self.y, slope = (tuple(part[samples] for part in parts) for parts in (self.y, self._slopes[0]))
        self._arithmetic, self._h = self._rules.arithmetic(self.y), self._h[samples]
        self._slopes = [self._arithmetic.keep(0, slope)]

    def _shaped(self, values: Tensor) -> Parts:
        return tuple(reference.per_sample(values.to(part.dtype), part) for part in self.y)


class _Passed:
    """States at the times between the first and the last, of each sample where it comes by; NaN until then.

    Methods that interpolate pass these times within a step. The steps of others stop there.
    """

    def __init__(self, start: Parts, times: Sequence[float], method: EmbeddedRungeKutta) -> None:
        inner, batch, device = len(times) - 2, len(start[0]), start[0].device
        self.times = torch.tensor(times, dtype=torch.float64, device=device)
        self.forward, self._interpolates = times[-1] > times[0], method.interpolates
        self._states = [torch.full((inner, *part.shape), torch.nan, dtype=part.dtype, device=device) for part in start] if inner else []
        self._next = torch.ones(batch, dtype=torch.int64, device=device)
        self.numbers = torch.arange(batch, device=device)  # in the whole batch

    def narrow(self, samples: Tensor) -> None:
        """Go on with some samples alone."""
        self._next, self.numbers = self._next[samples], self.numbers[samples]

    def stops(self) -> Tensor:
        """[B], where each sample's steps have to end next."""
        return self.times[-1].expand(len(self._next)) if self._interpolates else self.times[self._next]

    def within(self, accepted: Tensor, t: Tensor, reached: Tensor, h: Tensor, trials: _Trials) -> None:
        """Notes the states inside of accepted steps of length h from t."""
        while self._states and self._interpolates:
            due, last = self.times[self._next], len(self.times) - 1
            come = reached >= due if self.forward else reached <= due
            samples = (accepted & (self._next < last) & come).nonzero().squeeze(1)
            if len(samples) == 0:
                return
            self._note(samples, trials.within(samples, (due[samples] - t[samples]) / h[samples]))

    def at_stops(self, arrived: Tensor, y: Parts) -> Tensor:
        """Notes the states of samples that have arrived at their stops; bool [B], which of them are at the end."""
        if self._interpolates or not self._states:
            return arrived
        samples = (arrived & (self._next < len(self.times) - 1)).nonzero().squeeze(1)
        ended = arrived & (self._next == len(self.times) - 1)
        self._note(samples, tuple(part[samples] for part in y))
        return ended

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
    """The length of every sample's steps, whose sign is the direction of the solve."""

    def __init__(self, derivative: Counted[Tensor], start: Parts, passed: _Passed, rules: Rules, narrowed: Narrowed | None) -> None:
        self._derivative, self._passed, self._rules, self._narrowed = derivative, passed, rules, narrowed
        self._exponent, self._tried, self._batch = -1.0 / rules.method.order, 0, len(start[0])
        self._t = passed.times[0].repeat(len(start[0]))
        self._running, self._zero = torch.ones_like(self._t, dtype=torch.bool), torch.zeros_like(self._t)
        self._trials = _Trials(derivative, start, self._t, rules)
        self._h = self._first_step()
        self._nfe = torch.full_like(self._running, derivative.evaluations, dtype=torch.int64)
        self._left = list[_Ends]()

    def to_the_end(self) -> tuple[Parts, Tensor]:
        """The states at the end, NaN where a sample has not come there, and the evaluations of each sample."""
        while self._goes_on():
            before = self._derivative.evaluations
            running = self._running
            self._attempt()
            self._nfe.add_(running, alpha=self._derivative.evaluations - before)
        if not self._left:
            last = self._ends(slice(None))
            return last.y, last.nfe
        ends = [*self._left, self._ends(slice(None))]
        order = torch.cat([each.numbers for each in ends]).argsort()
        parts = zip(*(each.y for each in ends), strict=True)
        return tuple(torch.cat(part)[order] for part in parts), torch.cat([each.nfe for each in ends])[order]

    def _ends(self, samples: Tensor | slice) -> "_Ends":
        """The results of samples that are not on their way any more."""
        y, there = tuple(part[samples] for part in self._trials.y), self._t[samples] == self._passed.times[-1]
        if self._rules.mark:
            y = tuple(torch.where(reference.per_sample(there, part), part, torch.nan) for part in y)
        return _Ends(self._passed.numbers[samples], y, self._nfe[samples])

    def _narrow(self, narrowed: Narrowed) -> None:
        """Go on with those that are on their way."""
        self._left.append(self._ends((~self._running).nonzero().squeeze(1)))
        samples = self._running.nonzero().squeeze(1)
        numbers = (self._t, self._h, self._running, self._zero, self._nfe)
        self._t, self._h, self._running, self._zero, self._nfe = (values[samples] for values in numbers)
        self._trials.narrow(samples)
        self._passed.narrow(samples)
        self._derivative.change(narrowed(self._passed.numbers))

    def _goes_on(self) -> bool:
        """Whether a sample is not yet at its end, once those whose steps are too short to be one are given up. Waits for the device."""
        lost = self._running & (self._t + self._h == self._t)
        self._running = self._running ^ lost
        running, failed = torch.stack([self._running, lost]).sum(1).tolist()
        if failed and not self._rules.mark:
            raise RuntimeError(self._sentence("failed", failed, "; their velocity is not finite, or too rough for rtol={} and atol={}"))
        exhausted = running > 0 and self._tried == self._rules.max_steps
        if exhausted and not self._rules.mark:
            steps = f"did not reach the end of the solve in max_steps={self._tried} steps"
            raise RuntimeError(self._sentence(steps, running, "; raise max_steps, or rtol={} and atol={}"))
        if self._narrowed is not None and 0 < running <= MOST_RUNNING * len(self._t) and not exhausted:
            self._narrow(self._narrowed)
        return running > 0 and not exhausted

    def _sentence(self, what: str, count: int, why: str) -> str:
        tolerance = self._rules.tolerance
        return f"{self._rules.method.name} {what} for {count} of {self._batch} samples{why.format(tolerance.rtol, tolerance.atol)}"

    def _attempt(self) -> None:
        self._tried += 1
        t, stops = self._t, self._passed.stops()
        left = stops - t
        cut = self._h >= left if self._passed.forward else self._h <= left
        h = torch.where(self._running, torch.where(cut, left, self._h), self._zero)
        error = self._trials.step(t, h)
        accepted, reached = self._running & (error <= 1.0), torch.where(cut, stops, t + h)
        self._passed.within(accepted, t, reached, h, self._trials)
        self._trials.accept(accepted)
        arrived = accepted & cut
        self._t, self._h = torch.where(accepted, reached, t), self._next_length(h, error, arrived)
        self._running = self._running ^ self._passed.at_stops(arrived, self._trials.y)

    def _next_length(self, h: Tensor, error: Tensor, arrived: Tensor) -> Tensor:
        """A step that was cut at a stop does not shorten the one that follows."""
        factor = (error.nan_to_num(torch.inf) ** self._exponent).mul_(SAFETY).clamp_(SHORTEST, LONGEST)
        longer = h * torch.where(error < 1.0, factor.clamp(min=1.0), factor)
        furthest = torch.maximum if self._passed.forward else torch.minimum
        return torch.where(arrived, furthest(self._h, longer), longer)

    @torch.no_grad()
    def _first_step(self) -> Tensor:
        """Steps whose errors are about a hundredth of the tolerance, by the size of the slopes and of their change; 0 if not finite."""
        y, slope, direction = self._trials.y, self._trials.slope, 1.0 if self._passed.forward else -1.0
        state, speed = self._trials.size(y), self._trials.size(slope)
        finite = state.isfinite() & speed.isfinite()
        h = torch.where((state < 1e-5) | (speed < 1e-5), 1e-6, torch.where(finite, 0.01 * state / speed, self._zero))
        ahead = tuple(part + reference.per_sample((direction * h).to(part.dtype), part) * k for part, k in zip(y, slope, strict=True))
        slopes = self._derivative(self._t + direction * h, ahead)
        change = self._trials.size(tuple(a.to(b.dtype) - b for a, b in zip(slopes, slope, strict=True))) / h
        steepest = torch.maximum(speed, change)
        guess = torch.where(~change.isfinite() | (steepest <= 1e-15), (h * 1e-3).clamp(min=1e-6), (0.01 / steepest) ** -self._exponent)
        return direction * torch.where(finite, torch.minimum(100.0 * h, guess), self._zero)
