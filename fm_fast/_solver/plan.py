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
    def longest_lag(self) -> int:
        return max(lag for segment in self.segments for stage in segment.stages for lag in stage.lags)

    @functools.cached_property
    def has_inner_stages(self) -> bool:
        """Whether some stage's input is not a state."""
        return any(not stage.ends_step for segment in self.segments for stage in segment.stages)

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
        shapes = [range(len(stages) - renoises) for steps, stages, renoises in self.segments for _ in range(steps)]
        return [(step, stage) for step, stages in enumerate(shapes) for stage in stages]


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


def _plan(table: Table, nodes: Array, velocity: "Velocity", changes: Sequence[int] = ()) -> Plan:
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


class Factors(NamedTuple):
    """(p, r) of the velocity p x + r o, each of the times' shape."""

    p: Array
    r: Array

    @property
    def trivial(self) -> bool:
        """Whether the output is the velocity."""
        return bool(np.all(self.p == 0.0) and np.all(self.r == 1.0))


class Velocity(NamedTuple):
    """What a plan needs of the velocity: the range of times where it is finite, and its factors at times of any shape in there."""

    limits: tuple[float, float]
    factors: Callable[[Array], Factors]


def _factors_on(path: Path, objective: Objective) -> Callable[[Array], Factors]:
    def factors(times: Array) -> Factors:
        p, r = velocity_coefficients(path, objective, torch.from_numpy(times))
        return Factors(p.numpy(), r.numpy())

    return factors


def _trivial_factors(times: Array) -> Factors:
    return Factors(np.zeros_like(times), np.ones_like(times))


def _churned(table: RungeKutta, nodes: Array, path: Path, velocity: Velocity, churn: float) -> Plan:
    """Runge-Kutta steps from t to t' that begin at s = t - churn (t' - t), where the state is taken by noise of the path's own.

    x_s = a x_t + b z with a = alpha_s / alpha_t and b^2 = sigma_s^2 - a^2 sigma_t^2 has the path's distribution at s where x_t has that
    at t. Where alpha_t is 0 the state is noise already. Source: Karras et al. (2022), algorithm 2, there for alpha = 1.
    """
    at_nodes = _alpha_and_sigma(path, nodes[:-1])
    can, begins = at_nodes[0] > 0.0, churned_begins(path, nodes, churn, velocity.limits[0])
    alpha, sigma = _alpha_and_sigma(path, begins)
    a = np.divide(alpha, at_nodes[0], out=np.ones_like(alpha), where=can)
    b = np.sqrt(np.maximum(sigma**2 - (a * at_nodes[1]) ** 2, 0.0))
    plan = _runge_kutta(table, nodes, velocity, begins)
    renoise = Stage((0,), np.stack([a, np.where(can, b, 0.0)], axis=1), ends_step=True)
    return replace(plan, segments=tuple(Segment(steps, (renoise, *stages), renoises=True) for steps, stages, _ in plan.segments))


def churned_begins(path: Path, nodes: Array, churn: float, lowest: float) -> Array:
    """Where the steps between the nodes begin."""
    earlier = np.clip(nodes[:-1] - churn * np.diff(nodes), lowest, nodes[:-1])
    return np.where(_alpha_and_sigma(path, nodes[:-1])[0] > 0.0, earlier, nodes[:-1])


def _alpha_and_sigma(path: Path, times: Array) -> tuple[Array, Array]:
    with torch.no_grad():
        point = schedule(path, torch.from_numpy(times))
    return point.a.numpy(), point.s.numpy()


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
    """The updates of a Runge-Kutta step with p and r multiplied out; factors [steps, stages]."""
    rows = [*table.a[1:], table.b]
    steps, velocities = len(widths), []
    # X = [A, C_0, C_1, ...]: the stage's input as a combination of (x, o_0, o_1, ...), float64 [steps, 1 + stages].
    x = np.zeros((steps, 1 + table.stages))
    x[:, 0] = 1.0
    stages = []
    for i, row in enumerate(rows):
        velocity = factors.p[:, i, None] * x
        velocity[:, 1 + i] += factors.r[:, i]
        velocities.append(velocity)
        x = widths[:, None] * sum((weight * k for weight, k in zip(row, velocities, strict=True) if weight != 0.0), np.zeros_like(x))
        x[:, 0] += 1.0
        stages.append(_stage(x, i, ends_step=i == len(rows) - 1))
    return tuple(stages)


def _stage(combination: Array, newest: int, ends_step: bool) -> Stage:
    """The combination without the outputs that no step uses, which are then not read."""
    used = [i for i in range(newest + 1) if np.any(combination[:, 1 + i] != 0.0)] or [newest]
    columns = [0, *(1 + i for i in used)]
    return Stage(tuple(newest - i for i in used), np.ascontiguousarray(combination[:, columns]), ends_step)


def _adams_bashforth(table: AdamsBashforth, nodes: Array, velocity: Velocity) -> Plan:
    """The starting steps, then one segment for each step that still reaches back into them, then the rest."""
    _check_widths(nodes)
    started = min(table.history - 1, len(nodes) - 1)
    times = np.clip(nodes[:-1], *velocity.limits)
    factors = velocity.factors(times)
    first, evaluations = _starting_steps(table.start, nodes[: started + 1], velocity, factors)
    node_evaluations = [*range(0, started * table.start.stages, table.start.stages)]
    node_evaluations += range(evaluations.times.size, evaluations.times.size + len(nodes) - 1 - started)
    weights = np.concatenate([evaluations.weights, np.zeros(len(nodes) - 1 - started)])
    segments = [first]
    if len(nodes) - 1 > started:
        segments += _history_segments(table, nodes, started, node_evaluations, factors, weights)
    later = slice(started, None)
    return Plan(
        nodes, tuple(segments), np.concatenate([evaluations.times, times[later]]), weights,
        np.concatenate([evaluations.x_factors, factors.p[later]]), np.concatenate([evaluations.output_factors, factors.r[later]]),
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
    plan = _runge_kutta(start, nodes, velocity)
    if at_nodes.trivial:
        return plan.segments[0], plan
    shape = (len(nodes) - 1, start.stages)
    p, r = plan.x_factors.reshape(shape).copy(), plan.output_factors.reshape(shape).copy()
    p[:, 0], r[:, 0] = 0.0, 1.0
    first, *others = _folded_stages(start, np.diff(nodes), Factors(p, r))
    kept = replace(first, velocity=_velocity_table(at_nodes, 0, len(nodes) - 1))
    return Segment(len(nodes) - 1, (kept, *others)), plan


def _velocity_table(factors: Factors, begin: int, end: int) -> Array:
    return np.stack([factors.p[begin:end], factors.r[begin:end]], axis=1)


def _history_segments(
    table: AdamsBashforth, nodes: Array, started: int, evaluation_of: list[int], factors: Factors, weights: Array
) -> list[Segment]:
    """Segments of the steps from ``started`` on; adds their quadrature weights to ``weights``."""
    steps = np.arange(started, len(nodes) - 1)
    behind = steps[:, None] - np.arange(table.history)
    rule = table.weights(nodes[behind], nodes[steps + 1])
    sources = np.array(evaluation_of)[behind]
    np.add.at(weights, sources, rule)
    lags = sources[:, :1] - sources
    coefficients = np.concatenate([np.ones((len(steps), 1)), rule], axis=1)
    irregular = min(table.history - 1, len(steps))
    cuts = [*range(irregular), *([irregular] if irregular < len(steps) else []), len(steps)]
    return [_history_segment(cuts[i], cuts[i + 1], started, lags, coefficients, factors) for i in range(len(cuts) - 1)]


def _history_segment(begin: int, end: int, started: int, lags: Array, coefficients: Array, factors: Factors) -> Segment:
    velocity = None if factors.trivial else _velocity_table(factors, started + begin, started + end)
    stage = Stage(tuple(lags[begin].tolist()), np.ascontiguousarray(coefficients[begin:end]), True, velocity)
    return Segment(end - begin, (stage,))
