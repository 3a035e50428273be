"""Steps of an embedded Runge-Kutta method of which each sample's has a length of its own.

Slopes are kept times their step's length, so that the coefficients of a step are the method's own, the same for all samples: the
arithmetic is that of steps of length 1.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fm_fast import reference
from fm_fast._solver.arithmetic import Arithmetic
from fm_fast._solver.derivative import Derivative, Moment, Parts, moment
from fm_fast._solver.rules import Rules


class Trials:
    """The accepted states of all samples, their slopes times the length of a step, and steps tried from there."""

    def __init__(self, derivative: Derivative, y: Parts, t: Tensor, rules: Rules) -> None:
        self._derivative, self._arithmetic, self._rules = derivative, _of_length_one(rules, y), rules
        self._first_same_as_last, self._has_slope = rules.method.first_same_as_last, True
        self.y = self._end = y
        self._slopes = [self._arithmetic.keep(0, derivative(moment(t, y[0]), y))]

    @property
    def slope(self) -> Parts:
        """The slope at y, before the first step."""
        return self._slopes[0]

    def norms(self, values: Parts) -> Tensor:
        """Of values beside the tolerance at y, float64 [B]: the largest root mean square of a part."""
        return self._arithmetic.mean_squares(values, self.y, self._rules.tolerance).amax(0).sqrt()

    def step(self, times: Tensor, factors: Tensor) -> Tensor:
        """Try a step of each sample, with its evaluations at times [S, B]; factors [2, B] of the new slopes and of one that is kept.

        Returns mean squares of the errors, float64 [parts, B].
        """
        length, ratio = (self._shaped(factor) for factor in factors.unbind())
        moments = self._moments(times)
        self._slopes = [self._first_slope(moments[0], length, ratio)]
        self._end = self._run_stages(moments, length, self._slopes)
        self._has_slope = self._first_same_as_last
        with torch.no_grad():
            return self._arithmetic.error_mean_squares(self.y, self._end, self._slopes, self._rules.tolerance)

    def _run_stages(self, moments: Sequence[Moment], length: Parts, slopes: list[Parts]) -> Parts:
        """The step's end; the slopes of all stages but the first join ``slopes``."""
        arithmetic, end = self._arithmetic, self.y
        for stage, now in enumerate(moments[1:], 1):
            end = arithmetic.combine(stage - 1, self.y, slopes)
            slopes.append(arithmetic.keep(stage, self._derivative(now, end), length))
        return end if self._first_same_as_last else arithmetic.combine(len(moments) - 1, self.y, slopes)

    def _moments(self, times: Tensor) -> list[Moment]:
        """In new memory, since a model may keep what it is given or write into it; each in its own where autograd counts writes."""
        if self._rules.plain:
            return [moment(t, self.y[0]) for t in times.unbind()]
        return list(map(Moment, times.unbind(), times.to(self.y[0].dtype, copy=True).unbind()))

    def _first_slope(self, now: Moment, length: Parts, ratio: Parts) -> Parts:
        if self._has_slope:
            return self._arithmetic.keep(0, self._slopes[0], ratio)
        return self._arithmetic.keep(0, self._derivative(now, self.y), length)

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
        if self._first_same_as_last:
            self._slopes[0] = self._slopes[-1]

    def accept(self, accepted: Tensor) -> None:
        """The accepted [B] samples do."""
        chosen = tuple(reference.per_sample(accepted, part) for part in self.y)
        self.y = self._arithmetic.merge(chosen, self._end, self.y)
        if self._first_same_as_last:
            self._slopes[0] = self._arithmetic.merge(chosen, self._slopes[-1], self._slopes[0])

    def narrow(self, samples: Tensor) -> None:
        """Go on with some samples alone."""
        self.y, slope = (tuple(part[samples] for part in parts) for parts in (self.y, self._slopes[0]))
        self._arithmetic = _of_length_one(self._rules, self.y)
        self._slopes = [self._arithmetic.keep(0, slope)]

    def _shaped(self, values: Tensor) -> Parts:
        return tuple(reference.per_sample(values, part) for part in self.y)


def _of_length_one(rules: Rules, y: Parts) -> Arithmetic:
    arithmetic = rules.arithmetic(y)
    arithmetic.begin(1.0)
    return arithmetic
