"""The arithmetic of an embedded Runge-Kutta step, in two kinds, whatever decides how long the step is.

`Fused` computes in private buffers, one op and the fewest memory passes an evaluation. `Plain` makes new tensors by plain PyTorch, which
gradients follow; the length of a step has none.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from fm_fast import _modes, _ops, reference
from fm_fast._solver.derivative import Moment, Parts, moment
from fm_fast.solvers import EmbeddedRungeKutta

FIRST_ROW, NO_GUIDANCE = 0, 1.0  # of op linear_step, which fixed-step solves share


class Tolerance(NamedTuple):
    """Errors up to atol + rtol |x| count as 1."""

    rtol: float
    atol: float

    def __str__(self) -> str:
        return f"rtol={self.rtol} and atol={self.atol}"


class Row(NamedTuple):
    """A row of a method's tableau without its zeros: h sum_j weights[j] slopes[stages[j]]."""

    stages: tuple[int, ...]
    weights: tuple[float, ...]

    def scaled(self, h: float) -> list[float]:
        return [h * weight for weight in self.weights]


class Tableau(NamedTuple):
    """What a step adds to y, and its error.

    updates: row i follows stage i. It leads to the input of the next stage, and the last one to the step's end, which with methods whose
    first stage is the last of the step before is the input of a stage, too.
    """

    updates: tuple[Row, ...]
    error: Row


def tableau_of(method: EmbeddedRungeKutta) -> Tableau:
    ends = [] if method.first_same_as_last else [method.table.b]
    return Tableau(tuple(_row(weights) for weights in (*method.table.a[1:], *ends)), _row(method.error))


def _row(weights: Sequence[float]) -> Row:
    stages = tuple(j for j, weight in enumerate(weights) if weight != 0.0) or (0,)
    return Row(stages, tuple(weights[j] for j in stages))


class Arithmetic(Protocol):
    """How combinations are computed, and where slopes are kept."""

    def begin(self, h: float, times: Sequence[float] = ()) -> Sequence[Moment]:
        """A step of this length; the times of its evaluations."""
        ...

    def keep(self, stage: int, slope: Parts, factors: Parts | None = None) -> Parts:
        """The slope of a stage, times the factors, as it can be kept until the step's end."""
        ...

    def combine(self, row: int, y: Parts, slopes: Sequence[Parts]) -> Parts:
        """y and the update of this row."""
        ...

    def extend(self, slopes: list[Parts], slope: Parts, y: Parts) -> Parts:
        """A stage's slope joins those before it; y and the update of the row that follows the stage."""
        ...

    def error_mean_squares(self, y: Parts, end: Parts, slopes: Sequence[Parts], tolerance: Tolerance) -> Tensor:
        """Of a step's error beside the tolerance, for each part and sample: float64 [parts, B]."""
        ...

    def mean_squares(self, values: Parts, y: Parts, tolerance: Tolerance) -> Tensor:
        """Of values beside the tolerance at y."""
        ...

    def interpolate(self, h: float, weights: Sequence[float], y: Parts, slopes: Sequence[Parts]) -> Parts:
        """y + h sum_j weights[j] slopes[j] in new memory."""
        ...

    def merge(self, chosen: Parts, new: Parts, old: Parts) -> Parts:
        """new where chosen, else old, whose memory may be the result's."""
        ...

    def accept(self) -> None:
        """The step's end becomes y, and where the method says so the last slope the first."""
        ...


class Plain:
    """New tensors by plain PyTorch."""

    def __init__(self, y: Parts, method: EmbeddedRungeKutta) -> None:
        self._tableau, self._h, self._like = tableau_of(method), 0.0, y[0]
        self._dtypes = [part.dtype for part in y]

    def begin(self, h: float, times: Sequence[float] = ()) -> Sequence[Moment]:
        self._h = h
        return [moment(t, self._like) for t in times]

    def keep(self, stage: int, slope: Parts, factors: Parts | None = None) -> Parts:
        if factors is not None:
            return tuple(part.to(dtype) * factor for part, factor, dtype in zip(slope, factors, self._dtypes, strict=True))
        return tuple(part.to(dtype, copy=True) for part, dtype in zip(slope, self._dtypes, strict=True))

    def combine(self, row: int, y: Parts, slopes: Sequence[Parts]) -> Parts:
        return self._combine(self._tableau.updates[row], self._h, y, slopes)

    def extend(self, slopes: list[Parts], slope: Parts, y: Parts) -> Parts:
        slopes.append(self.keep(len(slopes), slope))
        return self.combine(len(slopes) - 1, y, slopes)

    @staticmethod
    def _combine(row: Row, h: float, y: Parts, slopes: Sequence[Parts]) -> Parts:
        coefficients = [1.0, *row.scaled(h)]
        return tuple(reference.linear_step(part, [slopes[j][i] for j in row.stages], coefficients) for i, part in enumerate(y))

    def interpolate(self, h: float, weights: Sequence[float], y: Parts, slopes: Sequence[Parts]) -> Parts:
        return self._combine(_row(weights), h, y, slopes)

    def error_mean_squares(self, y: Parts, end: Parts, slopes: Sequence[Parts], tolerance: Tolerance) -> Tensor:
        row = self._tableau.error
        used, coefficients = [slopes[j] for j in row.stages], row.scaled(self._h)
        pairs = enumerate(zip(y, end, strict=True))
        return torch.stack([reference.step_error(a, b, [slope[i] for slope in used], coefficients, *tolerance) for i, (a, b) in pairs])

    def mean_squares(self, values: Parts, y: Parts, tolerance: Tolerance) -> Tensor:
        pairs = zip(values, y, strict=True)
        return torch.stack([reference.step_error(part, part, [value], [1.0], *tolerance) for value, part in pairs])

    def merge(self, chosen: Parts, new: Parts, old: Parts) -> Parts:
        return tuple(torch.where(*parts) for parts in zip(chosen, new, old, strict=True))

    def accept(self) -> None:
        pass


class Fused:
    """Buffers that op ``linear_step`` fills, and op ``step_error`` reads: y and the end in turn, one stage's input, a slope for each stage.

    The coefficients and times of a whole step go to the device in one copy, which nothing waits for: it is over when the error is read.
    """

    def __init__(self, y: Parts, method: EmbeddedRungeKutta, backend: str) -> None:
        self._tableau, self._linear_step, self._step_error = tableau_of(method), _ops.linear_step(backend), _ops.step_error(backend)
        self._first_same_as_last = method.first_same_as_last
        self._no_copy = y[0].new_empty(0)
        self._end, self._other_end, self._input = (_alike(y) for _ in range(3))
        self._slopes = [_alike(y) for _ in method.table.b]
        self._memory_of = _modes.memory_reader(y[0])
        self._target_memory = set(map(self._memory_of, (*self._end, *self._other_end, *self._input)))
        self._tables = _Tables(self._tableau.updates, self._tableau.error, len(method.table.c), y[0].device)
        self._dtype, self._batch = y[0].dtype, len(y[0])
        self._mean_squares = torch.empty(len(y), len(y[0]), dtype=torch.float64, device=y[0].device)
        self._mean_squares_of_parts = self._mean_squares.unbind()

    def begin(self, h: float, times: Sequence[float] = ()) -> Sequence[Moment]:
        self._tables.write(h, times)
        if not times:
            return ()
        # In new memory, since a model may keep what it is given.
        given = self._tables.times.to(self._dtype, copy=True).unsqueeze(1).expand(-1, self._batch).unbind()
        return list(map(Moment, times, given))

    def keep(self, stage: int, slope: Parts, factors: Parts | None = None) -> Parts:
        kept = self._slopes[stage]
        for i, (target, new) in enumerate(zip(kept, slope, strict=True)):
            target.copy_(new) if factors is None else torch.mul(new, factors[i], out=target)
        return kept

    def combine(self, row: int, y: Parts, slopes: Sequence[Parts]) -> Parts:
        return self._combine(self._tableau.updates[row].stages, self._tables.update(row), self._target(row), y, slopes)

    def _target(self, row: int) -> Parts:
        return self._end if row == len(self._tableau.updates) - 1 else self._input

    def _combine(self, stages: Sequence[int], table: Tensor, targets: Parts, y: Parts, slopes: Sequence[Parts]) -> Parts:
        for i, (target, part) in enumerate(zip(targets, y, strict=True)):
            self._linear_step(target, self._no_copy, part, [slopes[j][i] for j in stages], table, FIRST_ROW, NO_GUIDANCE)
        return targets

    def extend(self, slopes: list[Parts], slope: Parts, y: Parts) -> Parts:
        stage = len(slopes)
        *before, last = self._tableau.updates[stage].stages
        if last != stage or not all(map(self._can_keep, slope, y)):
            slopes.append(self.keep(stage, slope))
            return self.combine(stage, y, slopes)
        slopes.append(kept := self._slopes[stage])
        target, table = self._target(stage), self._tables.update(stage)
        for i, new in enumerate(slope):
            outputs = [*[slopes[j][i] for j in before], _ops.native_layout(new)]
            self._linear_step(target[i], self._no_copy, y[i], outputs, table, FIRST_ROW, NO_GUIDANCE, kept[i])
        return target

    def _can_keep(self, slope: Tensor, part: Tensor) -> bool:
        """Whether the op that reads a slope can keep it on the way: a GPU moves one dtype fastest, and views of a target change."""
        return slope.dtype == part.dtype and self._memory_of(slope) not in self._target_memory

    def interpolate(self, h: float, weights: Sequence[float], y: Parts, slopes: Sequence[Parts]) -> Parts:
        tables = _Tables([row := _row(weights)], None, 0, y[0].device)
        tables.write(h)
        return self._combine(row.stages, tables.update(0), _alike(y), y, slopes)

    def error_mean_squares(self, y: Parts, end: Parts, slopes: Sequence[Parts], tolerance: Tolerance) -> Tensor:
        used = [slopes[j] for j in self._tableau.error.stages]
        for i, out in enumerate(self._mean_squares_of_parts):
            self._step_error(out, y[i], end[i], [slope[i] for slope in used], self._tables.error, *tolerance)
        return self._mean_squares

    def mean_squares(self, values: Parts, y: Parts, tolerance: Tolerance) -> Tensor:
        found, one = torch.empty_like(self._mean_squares), self._mean_squares.new_ones(1)
        for out, value, part in zip(found.unbind(), values, y, strict=True):
            self._step_error(out, part, part, [value], one, *tolerance)
        return found

    def merge(self, chosen: Parts, new: Parts, old: Parts) -> Parts:
        for mask, one, other in zip(chosen, new, old, strict=True):
            torch.where(mask, one, other, out=other)
        return old

    def accept(self) -> None:
        self._end, self._other_end = self._other_end, self._end
        if self._first_same_as_last:
            self._slopes[0], self._slopes[-1] = self._slopes[-1], self._slopes[0]


class _Tables:
    """Coefficients of every row for steps of one length, and the times of its evaluations: views of one float64 tensor on the device."""

    def __init__(self, updates: Sequence[Row], error: Row | None, stages: int, device: torch.device) -> None:
        error_weights = () if error is None else error.weights
        # The coefficients are fixed + h weights: an update's begin with that of y, which is 1; the error has no y.
        self._fixed = np.concatenate([*([1.0, *[0.0] * len(row.weights)] for row in updates), [0.0] * len(error_weights)])
        self._weights = np.concatenate([*([0.0, *row.weights] for row in updates), error_weights])
        self._host = torch.empty(len(self._fixed) + stages, dtype=torch.float64, device="cpu", pin_memory=device.type == "cuda")
        self._device = self._host if device.type == "cpu" else torch.empty_like(self._host, device=device)
        lengths = [*(1 + len(row.weights) for row in updates), len(error_weights), stages]
        *rows, self.error, self.times = self._device.split(lengths)
        self._updates = [row.unsqueeze(0) for row in rows]

    def update(self, row: int) -> Tensor:
        """[1, 1 + slopes of the row], with the coefficient of y."""
        return self._updates[row]

    def write(self, h: float, times: Sequence[float] = ()) -> None:
        self._host.copy_(torch.from_numpy(np.concatenate([self._fixed + h * self._weights, times or [0.0] * len(self.times)])))
        if self._device is not self._host:
            self._device.copy_(self._host, non_blocking=True)


def _alike(y: Parts) -> Parts:
    return tuple(torch.empty_like(part) for part in y)
