"""Adaptive solves: each step as long as the tolerance allows. The host reads one number a step that is tried, and three before the first.

With the error's largest root mean square e beside the tolerance, a step counts where e <= 1, and the next one is longer by the factor
0.9 e^(-1/order), between 0.2 and 10 (not below 1 where e < 1). The first step is Hairer's guess. Error norm, factors and
guess are torchdiffeq's too, so both take the same steps with methods whose last stage is the next step's first. States within a step come
from its slopes, without an evaluation. The same rules, for each sample by itself and without the host's numbers, are those of
:func:`fm_fast.reference.step_control`.

Source: Hairer, Nørsett and Wanner, Solving Ordinary Differential Equations I, chapters II.4 and II.6.
"""

import itertools
import math
from collections.abc import Callable, Sequence

import torch

from fm_fast._solver.derivative import Counted, Derivative, Parts, moment
from fm_fast._solver.first_step import difference, euler_length, first_length
from fm_fast._solver.rules import Rules, Solved
from fm_fast._solver.trial import Trial
from fm_fast.reference import LONGEST, SAFETY, SHORTEST

# (number of the finished step, t, state)
AfterStep = Callable[[int, float, Parts], None]


def solve_adaptive(
    derivative: Derivative,
    start: Parts,
    times: Sequence[float],
    rules: Rules,
    after_step: AfterStep | None = None,
    jumps: Sequence[float] = (),
    name: str = "model",
) -> Solved:
    """The state at each of ``times``, by evaluations none of which is outside of them.

    A method that interpolates passes the times between the first and the last; the steps of others end there.

    jumps: times between the first and the last at which the derivative jumps, in the order of the solve. Steps end there: they would feel
    their way over a jump, or pass it unnoticed.

    name: what errors call the network.

    Raises RuntimeError if the field is not finite, a step becomes too short to be one, or ``rules.max_steps`` steps that were tried,
    whether they counted or not, do not reach the end.
    """
    if start[0].numel() == 0:
        return Solved([start for _ in times], 0)
    counted = Counted(derivative, start, name)
    begin = rules.beginning(start)
    trial = Trial(counted, begin, times[0], rules.method, rules.arithmetic(begin))
    states = _Control(trial, counted, rules, after_step).through(times, jumps)
    return Solved(states, counted.evaluations)


class _Control:
    """The length of the steps, whose sign is the direction of the solve."""

    def __init__(self, trial: Trial, derivative: Counted, rules: Rules, after_step: AfterStep | None) -> None:
        self._trial, self._derivative, self._rules, self._after_step = trial, derivative, rules, after_step
        self._nodes, self._interpolates = rules.method.table.c, rules.method.interpolates
        self._h, self._low, self._high = 0.0, 0.0, 0.0
        self._tried, self._finished, self._not_finite = 0, 0, 0

    def through(self, times: Sequence[float], jumps: Sequence[float]) -> list[Parts]:
        """The state at each of times; copies, since the next steps overwrite it."""
        states, due = [self._trial.y], list(times[1:])
        pieces = itertools.pairwise((times[0], *jumps, times[-1]))
        for begin, end in pieces if due else ():
            self._enter(begin, end, times)
            stops = () if self._interpolates else [time for time in due if abs(time - begin) < abs(end - begin)]
            for t, stop in itertools.pairwise((begin, *stops, end)):
                states += self._advance(t, stop, due)
        return states

    def _enter(self, begin: float, end: float, times: Sequence[float]) -> None:
        """A piece without a jump, which evaluations do not leave: those at a jump take place beside it."""
        first, last = (begin, end) if begin == times[0] else (math.nextafter(begin, end), end)
        last = last if end == times[-1] else math.nextafter(end, begin)
        self._low, self._high = min(first, last), max(first, last)
        if begin == times[0]:
            self._h = self._first_step(begin, math.copysign(1.0, end - begin))
        else:
            self._trial.forget_slope()

    def _advance(self, t: float, end: float, passed: list[float]) -> list[Parts]:
        """From t to end; the states at the times that are passed. A step that is cut at the end does not shorten the one that follows."""
        states: list[Parts] = []
        while t != end:
            cut = abs(self._h) >= abs(end - t)
            h = end - t if cut else self._h
            if t + h == t:
                raise self._failure(f"a step of {h:.3g} at t = {t:.6g} is too short to be one")
            error = self._try(t, h)
            if error <= 1.0:
                reached = end if cut else t + h
                states += self._within(t, reached, passed)
                t = reached
                self._accept(t)
                longer = h * self._growth(error)
                self._h = max(self._h, longer, key=abs) if cut else longer
            else:
                self._h = h * self._growth(error)
        return states

    def _within(self, t: float, reached: float, passed: list[float]) -> list[Parts]:
        """The states at the times of ``passed`` that the step from t has come to, which leave it."""
        states: list[Parts] = []
        while passed and (theta := (passed[0] - t) / (reached - t)) <= 1.0:
            states.append(self._trial.within(theta))
            passed.pop(0)
        return states

    def _accept(self, t: float) -> None:
        self._trial.accept()
        self._finished += 1
        if self._after_step is not None:
            self._after_step(self._finished, t, self._trial.y)

    def _try(self, t: float, h: float) -> float:
        if self._tried == self._rules.max_steps:
            raise self._exhaustion()
        self._tried += 1
        error = self._trial.step(h, [self._inside(t + c * h) for c in self._nodes], self._rules.tolerance)
        self._not_finite += not math.isfinite(error)
        return error

    def _inside(self, t: float) -> float:
        """Within the times of the solve: rounding, and the guess of the first step, would else look outside."""
        return min(max(t, self._low), self._high)

    def _growth(self, error: float) -> float:
        """How much longer the next step is."""
        if error == 0.0 or not math.isfinite(error):
            return SHORTEST if error else LONGEST
        least = 1.0 if error < 1.0 else SHORTEST
        return min(LONGEST, max(SAFETY * error ** (-1.0 / self._rules.method.order), least))

    @torch.no_grad()
    def _first_step(self, t: float, direction: float) -> float:
        y, slope, tolerance = self._trial.y, self._trial.slope, self._rules.tolerance
        assert slope is not None
        state, speed = self._trial.norm(y, tolerance), self._trial.norm(slope, tolerance)
        if not math.isfinite(state) or not math.isfinite(speed):
            raise self._failure(f"the state or its slope, or its size beside the tolerance, is not finite at t = {t:.6g}")
        h = euler_length(state, speed)
        there = moment(self._inside(t + direction * h), y[0])
        ahead = self._derivative(there, tuple(part + direction * h * k for part, k in zip(y, slope, strict=True)))
        change = self._trial.norm(difference(ahead, slope), tolerance) / h
        return direction * first_length(h, speed, change, self._rules.method.order)

    def _failure(self, reason: str) -> RuntimeError:
        name, tolerance = self._rules.method.name, self._rules.tolerance
        return RuntimeError(f"{name} failed ({reason}): the model's velocity is not finite, or too rough for {tolerance}")

    def _exhaustion(self) -> RuntimeError:
        steps = f"did not reach the end of the solve in max_steps={self._tried} steps"
        wall = f", of which {self._not_finite} led to values that are not finite" if self._not_finite else ""
        return RuntimeError(f"{self._rules.method.name} {steps}{wall}; raise max_steps, or {self._rules.tolerance}")
