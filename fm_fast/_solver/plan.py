"""The host's part of a fixed-step solve: every time, coefficient and weight as float64 numbers before the first step.

The velocity is p(t) x + r(t) o for the network's output o, so each stage of a Runge-Kutta step is a combination of the state and the
outputs so far, whatever the objective: A x + sum_l C_l o_l. The tables built here hold those coefficients, one row a step, and the
loop only looks them up. The log-density is a quadrature along the same trajectory: its weights are the method's own, and evaluations
of weight 0 (midpoint's first stage) need no divergence.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from fm_fast.objectives import Objective, schedule, velocity_coefficients, velocity_range
from fm_fast.paths import Path
from fm_fast.solvers import AdamsBashforth, RungeKutta, Table

Array = np.ndarray
LARGEST_GROWTH = 1e5


@dataclass(frozen=True, eq=False)
class Stage:
    """One evaluation of the network and the update that follows it.

    lags: which outputs enter, counted back from the newest (0). coefficients: float64 [steps, 1 + len(lags)], of x and of those outputs.
    ends_step: the update yields the next state, not the next stage's input. velocity: float64 [steps, 2], (p, r), where the output is
    turned into a velocity before it is kept.
    """

    lags: tuple[int, ...]
    coefficients: Array
    ends_step: bool
    velocity: Array | None = None

    @functools.cached_property
    def additions(self) -> list[float] | None:
        """The factors of the newest output, where the update is to add it to x and nothing else."""
        if self.lags != (0,) or self.velocity is not None or not bool((self.coefficients[:, 0] == 1.0).all()):
            return None
        return self.coefficients[:, 1].tolist()


class Segment(NamedTuple):
    """Consecutive steps of the same stages. renoises: the first one adds noise, which takes the place of the network's output."""

    steps: int
    stages: tuple[Stage, ...]
    renoises: bool = False

    @property
    def evaluations(self) -> int:
        """Of the network in each step."""
        return len(self.stages) - 1 if self.renoises else len(self.stages)


@dataclass(frozen=True)
class Plan:
    """A whole solve. Of the E evaluations in their order: times, weights of the divergence in the integral of div v dt, and (p, r)."""

    nodes: Array
    segments: tuple[Segment, ...]
    times: Array
    weights: Array
    x_factors: Array
    output_factors: Array

    @property
    def evaluations(self) -> int:
        return len(self.times)

    @functools.cached_property
    def stages(self) -> tuple[Stage, ...]:
        """Those of all segments, each once."""
        return tuple(stage for segment in self.segments for stage in segment.stages)

    @functools.cached_property
    def longest_lag(self) -> int:
        return max(lag for stage in self.stages for lag in stage.lags)

    @functools.cached_property
    def has_inner_stages(self) -> bool:
        """Whether some stage's input is not a state."""
        return any(not stage.ends_step for stage in self.stages)

    @functools.cached_property
    def updates_in_place(self) -> bool:
        """Whether the output for a state as the input is what that state is overwritten by."""
        return any(segment.stages[0].ends_step for segment in self.segments)

    def middles(self) -> list[float]:
        """The middle of the step that each evaluation belongs to."""
        halfway = (0.5 * (self.nodes[:-1] + self.nodes[1:])).tolist()
        return [halfway[step] for step, _ in self.places()]

    def places(self) -> list[tuple[int, int]]:
        """(step, stage within it) of each evaluation."""
        evaluations = [segment.evaluations for segment in self.segments for _ in range(segment.steps)]
        return [(step, stage) for step, count in enumerate(evaluations) for stage in range(count)]


class Factors(NamedTuple):
    """(p, r) of the velocity p x + r o, each of the times' shape."""

    p: Array
    r: Array

    def table(self) -> Array | None:
        """(p, r) of each time, float64 [times, 2]; None where every output is the velocity."""
        if np.all(self.p == 0.0) and np.all(self.r == 1.0):
            return None
        return np.stack([self.p, self.r], axis=1)


class Velocity(NamedTuple):
    """What a plan needs of the velocity: the range of times where it is finite, and its factors at times of any shape in there."""

    limits: tuple[float, float]
    factors: Callable[[Array], Factors]


def make_plan(
    table: Table, nodes: Array, path: Path, objective: Objective, folded: bool = True, churn: float = 0.0, changes: Sequence[int] = ()
) -> Plan:
    """The plan of a solve through these nodes, float64 [N + 1], rising or falling.

    folded: p and r are part of it; else its evaluations are to return velocities, p = 0 and r = 1. churn: see `_churned`. changes:
    positions of the nodes at which another velocity begins, rising; no step uses evaluations of both sides of one.

    Raises ValueError where the path and the objective give no finite velocity.
    """
    velocity = Velocity(velocity_range(path, objective), _factors_on(path, objective) if folded else _trivial_factors)
    if churn > 0.0 and isinstance(table, RungeKutta):
        return _churned(table, nodes, path, velocity, churn)
    return _plan(table, nodes, velocity, changes)


@functools.lru_cache(maxsize=64)
def ode_plan(table: Table, nodes: bytes) -> Plan:
    """The plan of dy/dt = f(t, y) through any times, rising or falling; nodes as ``tobytes`` gives them."""
    return _plan(table, np.frombuffer(nodes).copy(), Velocity((-np.inf, np.inf), _trivial_factors))


def _plan(table: Table, nodes: Array, velocity: Velocity, changes: Sequence[int] = ()) -> Plan:
    if isinstance(table, RungeKutta):
        return _runge_kutta(table, nodes, velocity)
    ends = (0, *changes, len(nodes) - 1)
    return _joined(nodes, [_adams_bashforth(table, nodes[begin : end + 1], velocity) for begin, end in itertools.pairwise(ends)])


def _joined(nodes: Array, plans: Sequence[Plan]) -> Plan:
    """One plan after the other, as one through all nodes."""
    if len(plans) == 1:
        return plans[0]
    segments = tuple(segment for plan in plans for segment in plan.segments)
    parts = zip(*((plan.times, plan.weights, plan.x_factors, plan.output_factors) for plan in plans), strict=True)
    return Plan(nodes, segments, *map(np.concatenate, parts))


def _factors_on(path: Path, objective: Objective) -> Callable[[Array], Factors]:
    def factors(times: Array) -> Factors:
        p, r = velocity_coefficients(path, objective, torch.from_numpy(times))
        return Factors(p.numpy(), r.numpy())

    return factors


def _trivial_factors(times: Array) -> Factors:
    return Factors(np.zeros_like(times), np.ones_like(times))


# Runge-Kutta methods


def _runge_kutta(table: RungeKutta, nodes: Array, velocity: Velocity, begins: Array | None = None) -> Plan:
    """Steps to the nodes, from the nodes before or from earlier times."""
    begins = nodes[:-1] if begins is None else begins
    widths = nodes[1:] - begins
    times = np.clip(begins[:, None] + np.array(table.c) * widths[:, None], *velocity.limits)
    factors = velocity.factors(times)
    segment = Segment(len(widths), _folded_stages(table, widths, factors))
    weights = widths[:, None] * np.array(table.b)
    return Plan(nodes, (segment,), times.ravel(), weights.ravel(), factors.p.ravel(), factors.r.ravel())


def _folded_stages(table: RungeKutta, widths: Array, factors: Factors) -> tuple[Stage, ...]:
    """The updates of a Runge-Kutta step with p and r multiplied out; factors [steps, stages].

    The stages' inputs are X_i = x + h sum_j a_ij v_j and the step's end is x + h sum_j b_j v_j, with the velocities
    v_j = p_j X_j + r_j o_j. Each is a combination of (x, o_0, o_1, ...), float64 [steps, 1 + stages].
    """
    rows = [*table.a[1:], table.b]
    x = np.zeros((len(widths), 1 + table.stages))
    x[:, 0] = 1.0
    stages, velocities, combination = list[Stage](), list[Array](), x
    for i, row in enumerate(rows):
        velocity = factors.p[:, i, None] * combination
        velocity[:, 1 + i] += factors.r[:, i]
        velocities.append(velocity)
        combination = x + widths[:, None] * _weighted_sum(row, velocities)
        stages.append(_stage(combination, i, ends_step=i == len(rows) - 1))
    return tuple(stages)


def _weighted_sum(weights: Sequence[float], values: Sequence[Array]) -> Array:
    return sum((weight * value for weight, value in zip(weights, values, strict=True) if weight != 0.0), np.zeros_like(values[0]))


def _stage(combination: Array, newest: int, ends_step: bool) -> Stage:
    """The combination without the outputs that no step uses, which are then not read."""
    used = [i for i in range(newest + 1) if np.any(combination[:, 1 + i] != 0.0)] or [newest]
    columns = [0, *(1 + i for i in used)]
    return Stage(tuple(newest - i for i in used), np.ascontiguousarray(combination[:, columns]), ends_step)


def _churned(table: RungeKutta, nodes: Array, path: Path, velocity: Velocity, churn: float) -> Plan:
    """Runge-Kutta steps from t to t' that begin at s = t - churn (t' - t), where the state is taken by noise of the path's own.

    x_s = a x_t + b z with a = alpha_s / alpha_t and b^2 = sigma_s^2 - a^2 sigma_t^2 has the path's distribution at s where x_t has that
    at t. Where alpha_t is 0 the state is noise already. Source: Karras et al. (2022), algorithm 2, there for alpha = 1.
    """
    begins = churned_begins(path, nodes, churn, velocity.limits[0])
    (alpha_t, sigma_t), (alpha_s, sigma_s) = _alpha_and_sigma(path, nodes[:-1]), _alpha_and_sigma(path, begins)
    has_data = alpha_t > 0.0
    a = np.divide(alpha_s, alpha_t, out=np.ones_like(alpha_s), where=has_data)
    b = np.where(has_data, np.sqrt(np.maximum(sigma_s**2 - (a * sigma_t) ** 2, 0.0)), 0.0)
    renoise = Stage((0,), np.stack([a, b], axis=1), ends_step=True)
    plan = _runge_kutta(table, nodes, velocity, begins)
    (segment,) = plan.segments
    return replace(plan, segments=(Segment(segment.steps, (renoise, *segment.stages), renoises=True),))


def churned_begins(path: Path, nodes: Array, churn: float, lowest: float) -> Array:
    """Where the steps between the nodes begin."""
    earlier = np.clip(nodes[:-1] - churn * np.diff(nodes), lowest, nodes[:-1])
    return np.where(_alpha_and_sigma(path, nodes[:-1])[0] > 0.0, earlier, nodes[:-1])


def _alpha_and_sigma(path: Path, times: Array) -> tuple[Array, Array]:
    with torch.no_grad():
        point = schedule(path, torch.from_numpy(times))
    return point.a.numpy(), point.s.numpy()


# Multistep methods


def _adams_bashforth(table: AdamsBashforth, nodes: Array, velocity: Velocity) -> Plan:
    """The starting steps, then those of one evaluation each, which combine the velocities at the last nodes."""
    _check_widths(nodes)
    started, times = min(table.history - 1, len(nodes) - 1), np.clip(nodes[:-1], *velocity.limits)
    at_nodes = velocity.factors(times)
    first, start = _starting_steps(table.start, nodes[: started + 1], velocity, at_nodes)
    if started == len(times):
        return replace(start, segments=(first,))
    history, rest = _history(table, nodes, started), slice(started, None)
    weights = np.concatenate([start.weights, np.zeros(len(times) - started)])
    np.add.at(weights, history.evaluations, history.weights)
    return Plan(
        nodes, (first, *_history_segments(history, at_nodes, started)), np.concatenate([start.times, times[rest]]), weights,
        np.concatenate([start.x_factors, at_nodes.p[rest]]), np.concatenate([start.output_factors, at_nodes.r[rest]]),
    )  # fmt: skip


def _check_widths(nodes: Array) -> None:
    """A step much longer than the one before would multiply rounding errors by their ratio."""
    widths = np.diff(nodes)
    ratio = float(np.max(widths[1:] / widths[:-1], initial=1.0))
    if ratio > LARGEST_GROWTH:
        raise ValueError(
            f"grid and save must not lengthen a step more than {LARGEST_GROWTH:g} times for a multistep method, got {ratio:.3g} times"
        )


def _starting_steps(start: RungeKutta, nodes: Array, velocity: Velocity, at_nodes: Factors) -> tuple[Segment, Plan]:
    """Runge-Kutta steps whose first stage keeps its velocity for the history, and the plan that these steps alone would be."""
    plan, table = _runge_kutta(start, nodes, velocity), at_nodes.table()
    if table is None:
        return plan.segments[0], plan
    shape = (len(nodes) - 1, start.stages)
    p, r = plan.x_factors.reshape(shape).copy(), plan.output_factors.reshape(shape).copy()
    p[:, 0], r[:, 0] = 0.0, 1.0  # of the velocity, which is kept in place of the output
    first, *others = _folded_stages(start, np.diff(nodes), Factors(p, r))
    return Segment(len(nodes) - 1, (replace(first, velocity=table[: len(nodes) - 1]), *others)), plan


class _History(NamedTuple):
    """The velocities that each step combines, newest first: the numbers of their evaluations, and their weights; [steps, history]."""

    evaluations: Array
    weights: Array


def _history(table: AdamsBashforth, nodes: Array, started: int) -> _History:
    """Of the steps from ``started`` on."""
    steps = np.arange(started, len(nodes) - 1)
    behind = steps[:, None] - np.arange(table.history)
    evaluations = behind + (table.start.stages - 1) * np.minimum(behind, started)  # a starting step has one for each stage
    return _History(evaluations, table.weights(nodes[behind], nodes[steps + 1]))


def _history_segments(history: _History, at_nodes: Factors, started: int) -> list[Segment]:
    """One for each step that still reaches back into the starting steps, whose velocities lie further apart, and one for all others."""
    lags = history.evaluations[:, :1] - history.evaluations
    coefficients = np.concatenate([np.ones((len(lags), 1)), history.weights], axis=1)
    table, changes = at_nodes.table(), np.flatnonzero((lags[1:] != lags[:-1]).any(axis=1)) + 1
    segments = []
    for begin, end in itertools.pairwise((0, *changes.tolist(), len(lags))):
        velocity = None if table is None else table[started + begin : started + end]
        segments.append(Segment(end - begin, (Stage(tuple(lags[begin].tolist()), coefficients[begin:end], True, velocity),)))
    return segments
