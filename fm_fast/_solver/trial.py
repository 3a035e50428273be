"""One step of an embedded Runge-Kutta method, of the same length for all samples, and its error beside what is tolerated."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fm_fast._solver.arithmetic import Arithmetic, Tolerance
from fm_fast._solver.derivative import Derivative, Moment, Parts, moment
from fm_fast.solvers import EmbeddedRungeKutta


class Trial:
    """The accepted state y and its slope, and steps tried from there."""

    def __init__(self, derivative: Derivative, y: Parts, t: float, method: EmbeddedRungeKutta, arithmetic: Arithmetic) -> None:
        self._derivative, self._arithmetic = derivative, arithmetic
        self._first_same_as_last, self._method = method.first_same_as_last, method
        self.y = self._end = y
        self.slope: Parts | None = arithmetic.keep(0, derivative(moment(t, y[0]), y))
        self._slopes, self._h = [self.slope], 0.0

    def norm(self, values: Parts, tolerance: Tolerance) -> float:
        """Of values beside the tolerance at y."""
        return _norm(self._arithmetic.mean_squares(values, self.y, tolerance))

    def step(self, h: float, times: Sequence[float], tolerance: Tolerance) -> float:
        """Try a step of length h with evaluations at these times; its error, of which up to 1 is tolerated. Waits for the device."""
        moments = self._arithmetic.begin(h, times)
        if self.slope is None:
            self.slope = self._arithmetic.keep(0, self._derivative(moments[0], self.y))
        self._h, self._slopes = h, [self.slope]
        self._end = self._run_stages(moments, self._slopes)
        with torch.no_grad():
            return _norm(self._arithmetic.error_mean_squares(self.y, self._end, self._slopes, tolerance))

    def _run_stages(self, moments: Sequence[Moment], slopes: list[Parts]) -> Parts:
        """The step's end; the slopes of all stages but the first join ``slopes``."""
        end = self._arithmetic.combine(0, self.y, slopes)
        for stage, now in enumerate(moments[1:], 1):
            # No name for the slope: its memory is free for the next evaluation.
            if self._first_same_as_last and stage == len(moments) - 1:
                slopes.append(self._arithmetic.keep(stage, self._derivative(now, end)))
            else:
                end = self._arithmetic.extend(slopes, self._derivative(now, end), self.y)
        return end

    def within(self, theta: float) -> Parts:
        """The state a part theta of the way through the step that was tried: its end, or within one of a method that interpolates."""
        if theta == 1.0:
            return tuple(part.clone() for part in self._end)
        return self._arithmetic.interpolate(self._h, self._method.weights_within(theta), self.y, self._slopes)

    def forget_slope(self) -> None:
        """Evaluate the slope at y anew: it is another one on this side of a jump."""
        self.slope = None

    def accept(self) -> None:
        """Go on from the end of the step that was tried."""
        self._arithmetic.accept()
        self.y, self.slope = self._end, self._slopes[-1] if self._first_same_as_last else None


def _norm(mean_squares: Tensor) -> float:
    """The largest root mean square of a part, over all samples. Waits for the device, for which it is one kernel where one part is all."""
    sums = mean_squares.sum(1)
    return math.sqrt(float(sums.amax() if len(sums) > 1 else sums) / mean_squares.shape[1])
