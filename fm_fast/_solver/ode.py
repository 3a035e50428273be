"""dy/dt = f(t, y) of any field through any times: the solvers of :mod:`fm_fast.sampling` without a path, for ``fm_fast.compat``."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fm_fast import _backends, _ops, reference
from fm_fast._solver.adaptive import solve_adaptive
from fm_fast._solver.arithmetic import Tolerance
from fm_fast._solver.derivative import Moment, Parts
from fm_fast._solver.evaluate import check_each, time_tensor
from fm_fast._solver.field import check_output
from fm_fast._solver.loop import run
from fm_fast._solver.plan import ode_plan
from fm_fast._solver.rules import Rules
from fm_fast._solver.settings import check_setting
from fm_fast._solver.state import Layout, make_state
from fm_fast.solvers import EmbeddedRungeKutta, Table

# (t without dimensions, y) -> dy/dt, both in y's dtype
OdeField = Callable[[Tensor, Tensor], Tensor]
# The same of a state in parts
PartsField = Callable[[Tensor, Parts], Parts]


@dataclass(frozen=True)
class Stops:
    """The nodes of a solve, float64 and strictly monotone, and the positions in them of the states that are wanted."""

    nodes: np.ndarray
    wanted: Sequence[int]


@dataclass(frozen=True)
class Accuracy:
    """What holds for adaptive methods alone."""

    tolerance: Tolerance
    max_steps: int


def solve_ode(
    field: OdeField, y0: Tensor, stops: Stops, method: Table | EmbeddedRungeKutta, accuracy: Accuracy, name: str = "model"
) -> Tensor:
    """[T, *y0.shape], the wanted states in y0's dtype; between them the state is float32 (float64 for float64).

    Where gradients are enabled they are recorded, by plain PyTorch; else an evaluation costs one op and a copy of y, which the field may
    keep and write to. name: what errors call the field.
    """
    check_setting(y0, method, "direct")
    start = y0 if y0.dim() else y0.reshape(1)
    shaped = field if y0.dim() else _of_one_number(field)
    if isinstance(method, EmbeddedRungeKutta):
        states = [state for (state,) in _adaptive(lambda t, parts: (shaped(t, parts[0]),), (start,), stops, method, accuracy, name)]
    else:
        states = _fixed(shaped, start, stops, method, name)
    return torch.stack([state.to(y0.dtype) for state in states]).reshape(len(states), *y0.shape)


def _of_one_number(field: OdeField) -> OdeField:
    """The field of a state without dimensions, on states [1]."""

    def shaped(t: Tensor, y: Tensor) -> Tensor:
        slope = field(t, y.reshape(()))
        return slope.reshape(1) if isinstance(slope, Tensor) and slope.dim() == 0 else slope

    return shaped


def solve_ode_in_parts(
    field: PartsField, y0: Parts, stops: Stops, method: Table | EmbeddedRungeKutta, accuracy: Accuracy, name: str = "model"
) -> Parts:
    """As :func:`solve_ode` for a state of several tensors [...] of one dtype; of their errors the largest norm counts."""
    check_setting(y0[0], method, "direct")
    rows, counts = tuple(part.reshape(1, -1) for part in y0), [part.numel() for part in y0]

    def of_rows(t: Tensor, parts: Parts) -> Parts:
        slopes = field(t, tuple(part.reshape(like.shape) for part, like in zip(parts, y0, strict=True)))
        return tuple(slope.reshape(1, -1) for slope in slopes)

    if isinstance(method, EmbeddedRungeKutta):
        states = _adaptive(of_rows, rows, stops, method, accuracy, name)
    else:
        together = _fixed(lambda t, y: torch.cat(of_rows(t, y.split(counts, 1)), 1), torch.cat(rows, 1), stops, method, name)
        states = [state.split(counts, 1) for state in together]
    by_part = zip(y0, zip(*states, strict=True), strict=True)
    return tuple(torch.cat(part).to(like.dtype).reshape(len(part), *like.shape) for like, part in by_part)


def _fixed(field: OdeField, y0: Tensor, stops: Stops, table: Table, name: str) -> list[Tensor]:
    plan = ode_plan(table, stops.nodes.tobytes())
    times, states, wanted = time_tensor(plan, y0).to(y0.dtype).unbind(), {0: y0}, frozenset(stops.wanted)
    copies = not torch.is_grad_enabled()

    def evaluate(y: Tensor, number: int) -> Tensor:
        slope = field(times[number], y.clone() if copies else y)
        check_each(slope, y, y.shape, number, name)
        return _ops.native_layout(slope)

    def keep(step: int, y: Tensor) -> None:
        if step in wanted:
            states[step] = y.clone()

    backend = _backends.resolve("linear_step", y0.device, None)
    state = make_state(y0, plan, Layout(y0.dtype), backend, plain=torch.is_grad_enabled())
    run(plan, state, evaluate, keep, name)
    return [states[position] for position in stops.wanted]


def _adaptive(field: PartsField, y0: Parts, stops: Stops, method: EmbeddedRungeKutta, accuracy: Accuracy, name: str) -> list[Parts]:
    like, copies = y0[0], not torch.is_grad_enabled()

    def derivative(now: Moment, parts: Parts) -> Parts:
        y = tuple(part.to(like.dtype, copy=copies) for part in parts)
        slopes = field(now.given[0].to(like.dtype), y)
        for slope, part in zip(slopes, y, strict=True):
            check_output(slope, part, name)
        return tuple(_ops.native_layout(slope) for slope in slopes)

    start = tuple(part.to(reference.accumulation_dtype(part)) for part in y0)
    times = [float(stops.nodes[position]) for position in stops.wanted]
    backend = _backends.resolve("linear_step", like.device, None)
    rules = Rules(method, accuracy.tolerance, accuracy.max_steps, backend, plain=torch.is_grad_enabled())
    return solve_adaptive(derivative, start, times, rules, name=name).states
