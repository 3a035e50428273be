"""One step of an embedded Runge-Kutta method, and how large its error is beside what is tolerated.

The state is a tuple of tensors, its parts: the samples, and for likelihoods the integral beside them. Two kinds of arithmetic share the
step. `Fused` computes in private buffers, one op and the fewest memory passes an evaluation. `Plain` makes new tensors by plain
PyTorch, which gradients follow; the length of a step has none.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from fm_fast import _modes, _ops, reference
from fm_fast.solvers import EmbeddedRungeKutta

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


class Tolerance(NamedTuple):
    """Errors up to atol + rtol |x| count as 1."""

    rtol: float
    atol: float


class Row(NamedTuple):
    """h sum_j weights[j] slopes[used[j]], beside y or alone."""

    used: tuple[int, ...]
    weights: tuple[float, ...]

    def steps(self, h: float) -> list[float]:
        return [h * weight for weight in self.weights]


class Rows(NamedTuple):
    """What a step adds to y, and its error.

    updates: in order for the inputs of all stages but the first, and for the end unless it is the last of these.
    """

    updates: tuple[Row, ...]
    error: Row


def rows_of(method: EmbeddedRungeKutta) -> Rows:
    """The combinations of a step of this method."""
    ends = [] if method.first_same_as_last else [method.table.b]
    return Rows(tuple(_row(weights) for weights in (*method.table.a[1:], *ends)), _row(method.error))


def _row(weights: Sequence[float]) -> Row:
    used = tuple(j for j, weight in enumerate(weights) if weight != 0.0) or (0,)
    return Row(used, tuple(weights[j] for j in used))


class Arithmetic(Protocol):
    """How combinations are computed, and where slopes are kept."""

    def begin(self, h: float, times: Sequence[float] = ()) -> Sequence[Moment]:
        """A step of this length; the times of its evaluations."""
        ...

    def keep(self, number: int, slope: Parts, factors: Parts | None = None) -> Parts:
        """The slope of stage ``number``, times the factors, as it can be kept until the step's end."""
        ...

    def combine(self, row: int, y: Parts, slopes: Sequence[Parts]) -> Parts:
        """y and the row's update; that of the last is the step's end."""
        ...

    def extend(self, slopes: list[Parts], slope: Parts, y: Parts) -> Parts:
        """A stage's slope joins those before it; y and the update of the row that follows the stage."""
        ...

    def error(self, y: Parts, end: Parts, slopes: Sequence[Parts], tolerance: Tolerance) -> Tensor:
        """Mean squares of the error of a step beside the tolerance, of each part and sample: float64 [parts, B]."""
        ...

    def size(self, values: Parts, y: Parts, tolerance: Tolerance) -> Tensor:
        """The same of values beside the tolerance at y."""
        ...

    def interpolate(self, h: float, weights: Sequence[float], y: Parts, slopes: Sequence[Parts]) -> Parts:
        """y + h sum_j weights[j] slopes[j] in new memory."""
        ...

    def merge(self, chosen: Parts, new: Parts, old: Parts) -> Parts:
        """new where chosen, else old, whose memory may be the result's."""
        ...

    def accept(self) -> None:
        """The step's end becomes y, and the last slope the first where the method says so."""
        ...


class Trial:
    """The accepted state y and its slope, and steps tried from there."""

    def __init__(self, derivative: Derivative, y: Parts, t: float, method: EmbeddedRungeKutta, arithmetic: Arithmetic) -> None:
        self._derivative, self._arithmetic = derivative, arithmetic
        self._goes_on, self._method = method.first_same_as_last, method
        self.y = self._end = y
        self.slope: Parts | None = arithmetic.keep(0, derivative(moment(t, y[0]), y))
        self._slopes, self._h = [self.slope], 0.0

    def size(self, values: Parts, tolerance: Tolerance) -> float:
        """The norm of values beside the tolerance at y."""
        return norm(self._arithmetic.size(values, self.y, tolerance))

    def step(self, h: float, times: Sequence[float], tolerance: Tolerance) -> float:
        """Try a step of length h with evaluations at these times; its error, of which up to 1 is tolerated. Waits for the device."""
        arithmetic = self._arithmetic
        moments = arithmetic.begin(h, times)
        if self.slope is None:
            self.slope = arithmetic.keep(0, self._derivative(moments[0], self.y))
        slopes = [self.slope]
        end = arithmetic.combine(0, self.y, slopes)
        for stage, now in enumerate(moments[1:], 1):
            # No name for the slope: its memory is free for the next evaluation.
            if self._goes_on and stage == len(moments) - 1:
                slopes.append(arithmetic.keep(stage, self._derivative(now, end)))
            else:
                end = arithmetic.extend(slopes, self._derivative(now, end), self.y)
        self._end, self._slopes, self._h = end, slopes, h
        with torch.no_grad():
            return norm(arithmetic.error(self.y, end, slopes, tolerance))

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
        self.y, self.slope = self._end, self._slopes[-1] if self._goes_on else None


class Plain:
    """New tensors by plain PyTorch."""

    def __init__(self, y: Parts, method: EmbeddedRungeKutta) -> None:
        self._rows, self._h, self._like = rows_of(method), 0.0, y[0]
        self._dtypes = [part.dtype for part in y]

    def begin(self, h: float, times: Sequence[float] = ()) -> Sequence[Moment]:
        self._h = h
        return [moment(t, self._like) for t in times]

    def keep(self, number: int, slope: Parts, factors: Parts | None = None) -> Parts:
        if factors is not None:
            return tuple(part.to(dtype) * factor for part, factor, dtype in zip(slope, factors, self._dtypes, strict=True))
        return tuple(part.to(dtype, copy=True) for part, dtype in zip(slope, self._dtypes, strict=True))

    def combine(self, row: int, y: Parts, slopes: Sequence[Parts]) -> Parts:
        return self._combine(self._rows.updates[row], self._h, y, slopes)

    def extend(self, slopes: list[Parts], slope: Parts, y: Parts) -> Parts:
        slopes.append(self.keep(len(slopes), slope))
        return self.combine(len(slopes) - 1, y, slopes)

    @staticmethod
    def _combine(row: Row, h: float, y: Parts, slopes: Sequence[Parts]) -> Parts:
        coefficients = [1.0, *row.steps(h)]
        return tuple(reference.linear_step(part, [slopes[j][i] for j in row.used], coefficients) for i, part in enumerate(y))

    def interpolate(self, h: float, weights: Sequence[float], y: Parts, slopes: Sequence[Parts]) -> Parts:
        return self._combine(_row(weights), h, y, slopes)

    def error(self, y: Parts, end: Parts, slopes: Sequence[Parts], tolerance: Tolerance) -> Tensor:
        row = self._rows.error
        steps, used = row.steps(self._h), [slopes[j] for j in row.used]
        pairs = enumerate(zip(y, end, strict=True))
        return torch.stack([reference.step_error(a, b, [slope[i] for slope in used], steps, *tolerance) for i, (a, b) in pairs])

    def size(self, values: Parts, y: Parts, tolerance: Tolerance) -> Tensor:
        pairs = zip(values, y, strict=True)
        return torch.stack([reference.step_error(part, part, [value], [1.0], *tolerance) for value, part in pairs])

    def merge(self, chosen: Parts, new: Parts, old: Parts) -> Parts:
        return tuple(torch.where(*parts) for parts in zip(chosen, new, old, strict=True))

    def accept(self) -> None:
        pass


class Fused:
    """Buffers that op ``linear_step`` fills: y and the end in turn, one stage's input, and a slope for each stage. Op ``step_error``
    reads them.

    The coefficients and times of a whole step go to the device in one copy, which nothing waits for: it is over when the error is read.
    """

    def __init__(self, y: Parts, method: EmbeddedRungeKutta, backend: str) -> None:
        self._rows, self._step, self._step_error = rows_of(method), _ops.linear_step(backend), _ops.step_error(backend)
        self._swaps = method.first_same_as_last
        self._none = y[0].new_empty(0)
        self._end, self._other_end, self._input = (_alike(y) for _ in range(3))
        self._slopes = [_alike(y) for _ in method.table.b]
        self._memory_of = _modes.memory_reader(y[0])
        self._targets = set(map(self._memory_of, (*self._end, *self._other_end, *self._input)))
        self._tables = _Tables(self._rows.updates, self._rows.error, len(method.table.c), y[0].device)
        self._dtype, self._batch = y[0].dtype, len(y[0])
        self._means = torch.empty(len(y), len(y[0]), dtype=torch.float64, device=y[0].device)
        self._means_of_parts = self._means.unbind()

    def begin(self, h: float, times: Sequence[float] = ()) -> Sequence[Moment]:
        self._tables.write(h, times)
        if not times:
            return ()
        # In new memory, since a model may keep what it is given.
        given = self._tables.times.to(self._dtype, copy=True).unsqueeze(1).expand(-1, self._batch).unbind()
        return list(map(Moment, times, given))

    def keep(self, number: int, slope: Parts, factors: Parts | None = None) -> Parts:
        kept = self._slopes[number]
        for i, (target, new) in enumerate(zip(kept, slope, strict=True)):
            target.copy_(new) if factors is None else torch.mul(new, factors[i], out=target)
        return kept

    def combine(self, row: int, y: Parts, slopes: Sequence[Parts]) -> Parts:
        return self._combine(self._rows.updates[row].used, self._tables.update(row), self._target(row), y, slopes)

    def _target(self, row: int) -> Parts:
        return self._end if row == len(self._rows.updates) - 1 else self._input

    def _combine(self, used: Sequence[int], table: Tensor, targets: Parts, y: Parts, slopes: Sequence[Parts]) -> Parts:
        for i, (target, part) in enumerate(zip(targets, y, strict=True)):
            self._step(target, self._none, part, [slopes[j][i] for j in used], table, 0, 1.0)
        return targets

    def extend(self, slopes: list[Parts], slope: Parts, y: Parts) -> Parts:
        stage = len(slopes)
        *before, last = self._rows.updates[stage].used
        if last != stage or not all(map(self._can_keep, slope, y)):
            slopes.append(self.keep(stage, slope))
            return self.combine(stage, y, slopes)
        slopes.append(kept := self._slopes[stage])
        target, table = self._target(stage), self._tables.update(stage)
        for i, new in enumerate(slope):
            outputs = [*[slopes[j][i] for j in before], _ops.native_layout(new)]
            self._step(target[i], self._none, y[i], outputs, table, 0, 1.0, kept[i])
        return target

    def _can_keep(self, slope: Tensor, part: Tensor) -> bool:
        """Whether the op that reads a slope can keep it on the way: a GPU moves one dtype fastest, and views of a target change."""
        return slope.dtype == part.dtype and self._memory_of(slope) not in self._targets

    def interpolate(self, h: float, weights: Sequence[float], y: Parts, slopes: Sequence[Parts]) -> Parts:
        tables = _Tables([row := _row(weights)], None, 0, y[0].device)
        tables.write(h)
        return self._combine(row.used, tables.update(0), _alike(y), y, slopes)

    def error(self, y: Parts, end: Parts, slopes: Sequence[Parts], tolerance: Tolerance) -> Tensor:
        used = [slopes[j] for j in self._rows.error.used]
        for i, means in enumerate(self._means_of_parts):
            self._step_error(means, y[i], end[i], [slope[i] for slope in used], self._tables.error, *tolerance)
        return self._means

    def size(self, values: Parts, y: Parts, tolerance: Tolerance) -> Tensor:
        means, one = torch.empty_like(self._means), self._means.new_ones(1)
        for row, value, part in zip(means.unbind(), values, y, strict=True):
            self._step_error(row, part, part, [value], one, *tolerance)
        return means

    def merge(self, chosen: Parts, new: Parts, old: Parts) -> Parts:
        for mask, one, other in zip(chosen, new, old, strict=True):
            torch.where(mask, one, other, out=other)
        return old

    def accept(self) -> None:
        self._end, self._other_end = self._other_end, self._end
        if self._swaps:
            self._slopes[0], self._slopes[-1] = self._slopes[-1], self._slopes[0]


class _Tables:
    """Coefficients of every row for steps of one length, and the times of its evaluations: views of one float64 tensor on the device."""

    def __init__(self, updates: Sequence[Row], error: Row | None, stages: int, device: torch.device) -> None:
        alone = () if error is None else error.weights
        self._fixed = np.concatenate([*([1.0, *[0.0] * len(row.weights)] for row in updates), [0.0] * len(alone)])
        self._weights = np.concatenate([*([0.0, *row.weights] for row in updates), alone])
        self._host = torch.empty(len(self._fixed) + stages, dtype=torch.float64, device="cpu", pin_memory=device.type == "cuda")
        self._device = self._host if device.type == "cpu" else torch.empty_like(self._host, device=device)
        *self._updates, self.error, self.times = self._device.split([*(1 + len(row.weights) for row in updates), len(alone), stages])
        self._updates = [view.unsqueeze(0) for view in self._updates]

    def update(self, row: int) -> Tensor:
        """[1, 1 + slopes of the row], with the coefficient of y."""
        return self._updates[row]

    def write(self, h: float, times: Sequence[float] = ()) -> None:
        self._host.copy_(torch.from_numpy(np.concatenate([self._fixed + h * self._weights, times or [0.0] * len(self.times)])))
        if self._device is not self._host:
            self._device.copy_(self._host, non_blocking=True)


def _alike(y: Parts) -> Parts:
    return tuple(torch.empty_like(part) for part in y)


def norm(means: Tensor) -> float:
    """The largest root mean square of a part, over all samples. Waits for the device, for which it is one kernel where one part is all."""
    sums = means.sum(1)
    return math.sqrt(float(sums.amax() if len(sums) > 1 else sums) / means.shape[1])


def norm_of_each(means: Tensor) -> Tensor:
    """The same of each sample, float64 [B]."""
    return means.amax(0).sqrt()
