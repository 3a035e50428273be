"""A solve that carries the integral of the divergence along: what likelihoods are made of.

With the velocity v = p x + r o of the network's output o and x of D numbers, div v = p D + r div o, of which probes estimate div o.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fm_fast import _checks, _modes, _philox, random, reference
from fm_fast._solver.adaptive import solve_adaptive
from fm_fast._solver.derivative import Derivative, Moment, Parts
from fm_fast._solver.estimator import Estimator
from fm_fast._solver.evaluate import make_mixed
from fm_fast._solver.field import Field, Model, combined, make_field
from fm_fast._solver.guidance import Guidance
from fm_fast._solver.learned import LearnedFactors, plan_and_factors, velocities
from fm_fast._solver.loop import Evaluate, run
from fm_fast._solver.per_sample import solve_per_sample
from fm_fast._solver.plan import Plan
from fm_fast._solver.probes import Probes, make_probes, single_probe
from fm_fast._solver.progress import step_counter
from fm_fast._solver.recording import check_gradient, solving
from fm_fast._solver.rules import Solved, rules_of
from fm_fast._solver.settings import NONFINITE, Settings
from fm_fast._solver.state import Layout, make_state
from fm_fast.random import Whole
from fm_fast.solvers import RungeKutta


@dataclass(frozen=True, eq=False)
class Task:
    """The checked arguments of a solve with its divergence."""

    field: Field
    settings: Settings
    probes: Probes
    key: Tensor
    mode: str
    memory_budget: int | None
    create_graph: bool
    progress: bool
    mark: bool = False

    def of(self, samples: Tensor) -> "Task":
        """The task of some samples [n] of the batch."""
        ids = _philox.sample_ids(self.key, self.field.batch)
        return replace(self, field=self.field.of(samples), key=torch.cat([self.key[:2], ids[samples]]))

    def estimator(self) -> Estimator:
        batch = self.field.batch
        return Estimator(self.probes, self.key, batch, self.mode, self.memory_budget, self.create_graph, self.settings.backend)


@dataclass(frozen=True, eq=False)
class Measure:
    """One estimate of the integral: the sums, and the number of the first draw of each evaluation's probes."""

    estimator: Estimator
    draws: list[int]


@dataclass(frozen=True, eq=False)
class Integral:
    """x [B, ...] at the last node; the integral of div v dt over the nodes, float64 [B], and its variance, None where probes cannot tell.

    control: the same integral by the last measure's probes. nfe_of_each: as that of :class:`fm_fast.Sample`.
    """

    x: Tensor
    value: Tensor
    variance: Tensor | None
    nfe: int
    nvjp: int
    control: Tensor
    nfe_of_each: Tensor | None = None

    @property
    def std_err(self) -> Tensor | None:
        """[B], of the value; without a gradient."""
        return None if self.variance is None else self.variance.detach().sqrt()


def make_task(
    model: Model, start: Tensor, settings: Settings, *, cond: Mapping[str, Any] | None, guidance: Guidance | None, kind: str, probes: int,
    replicates: int, seed: Whole | None, step: Whole, sample_ids: Whole | None, mode: str, memory_budget: int | None, create_graph: bool,
    progress: bool, on_nonfinite: str,
) -> Task:  # fmt: skip
    """The task of a call's arguments, checked. Raises TypeError or ValueError naming the one that does not fit."""
    _checks.one_of("on_nonfinite", on_nonfinite, NONFINITE)
    chosen, batch, device = make_probes(kind, probes, replicates, tuple(start.shape), start.device), start.shape[0], start.device
    field = make_field(model, settings.path, settings.objective, batch, cond, guidance, settings.span).recordable()
    key = random.make_key(seed, step, sample_ids, batch, device, not chosen.exact)
    return Task(field, settings, chosen, key, mode, memory_budget, create_graph, progress, mark=on_nonfinite == "mark")


def integrate(task: Task, start: Tensor, controlled: bool = False) -> Integral:
    """Solve from start [B, ...] through the nodes of the task's settings.

    controlled: measure the integral with the probes of :func:`control_draws` too, for comparison with :func:`integrate_coarsely`.
    """
    check_gradient(task.create_graph)
    with solving(task.field.model, task.create_graph):
        if task.settings.adaptive is not None:
            if task.progress:
                raise ValueError(f"progress needs a fixed-step method, got {task.settings.adaptive.name!r}")
            return _adaptive(task, start)
        plan, factors = plan_and_factors(task.settings, start.device)
        measures = [Measure(task.estimator(), [number * task.probes.groups for number in range(plan.evaluations)])]
        if controlled:
            measures.append(Measure(_control(task).estimator(), control_draws(task, plan, steps_a_draw=2)))
        return _fixed(task, start, plan, measures, factors)


def integrate_coarsely(task: Task, start: Tensor) -> Integral:
    """The control's integral over every second node.

    Its probes are held over the two fine steps that a coarse step replaces, so what differs from :func:`integrate`'s is the
    discretisation of one and the same integrand. With probes that change between stages their noise differs too, by O(h^1.5), which
    hides the error of any method of order 2 or more.
    """
    settings, control = replace(task.settings, nodes=task.settings.nodes[::2].copy()), _control(task)
    with solving(control.field.model, control.create_graph):
        plan, factors = plan_and_factors(settings, start.device)
        return _fixed(control, start, plan, [Measure(control.estimator(), control_draws(task, plan, steps_a_draw=1))], factors)


def _control(task: Task) -> Task:
    """The same solve with one Rademacher probe (or exactly, if it was exact) and no graph."""
    return replace(task, probes=task.probes if task.probes.exact else single_probe(task.probes), create_graph=False)


def control_draws(task: Task, plan: Plan, steps_a_draw: int) -> list[int]:
    """First draws of the control's evaluations, behind those of the task itself.

    A Runge-Kutta step is an integral of its own, so its probe may differ from the next one's. Multistep methods combine evaluations of
    many steps and need one probe for all of them.
    """
    first = task.settings.plan(folded=False).evaluations * task.probes.groups
    held = not isinstance(task.settings.table, RungeKutta)
    return [first + (0 if held else step // steps_a_draw) for step, _ in plan.places()]


# Fixed steps


def _fixed(task: Task, start: Tensor, plan: Plan, measures: list[Measure], factors: LearnedFactors | None) -> Integral:
    evaluate = _measured(task, plan, start, measures, factors)
    layout = Layout(task.settings.dtype)
    if factors is not None:
        evaluate, layout = velocities(factors, evaluate, task.settings.dtype), Layout(reference.accumulation_dtype(start))
    with step_counter(len(plan.nodes) - 1, task.progress) as count:
        state = make_state(start, plan, layout, task.settings.backend, plain=task.create_graph)
        x = run(plan, state, evaluate, (lambda step, x: count()) if task.progress else None)
    estimators = [measure.estimator for measure in measures]
    value, variance = estimators[0].sums
    products, known = sum(estimator.products for estimator in estimators), task.probes.known_variance
    return Integral(x, value, variance if known else None, plan.evaluations, products, estimators[-1].sums[0])


def _measured(task: Task, plan: Plan, start: Tensor, measures: list[Measure], factors: LearnedFactors | None) -> Evaluate:
    """The model at the plan's times; where the divergence has a weight, it is measured from the same forward pass."""
    network, size = make_mixed(task.field, plan, start), math.prod(start.shape[1:])
    weights, keep = plan.weights.tolist(), task.create_graph or _modes.transforms_active()
    p, r = (plan.x_factors.tolist(), plan.output_factors.tolist()) if factors is None else (factors.p, factors.r)

    def evaluate(x: Tensor, number: int) -> Tensor:
        weight = weights[number]
        if weight == 0.0:
            return network(x, number)
        recorded = measures[0].estimator.record(lambda given: network(given, number), x)
        bias, factor = weight * p[number] * size, weight * r[number]
        for measure in measures:
            last = measure is measures[-1] and not task.create_graph
            measure.estimator.add(recorded, measure.draws[number], bias, factor, last)
        return recorded.output if keep else recorded.output.detach()

    return evaluate


# Adaptive steps


def _adaptive(task: Task, start: Tensor) -> Integral:
    """x and the integral by each group of probes together; the probes are held, since fresh ones would enter the error control."""
    estimators, x0 = [task.estimator()], start.to(reference.accumulation_dtype(start))
    groups = task.probes.groups
    solve = _per_sample if task.settings.per_sample else _together
    solved = solve(task, (x0, x0.new_zeros(start.shape[0], groups)), estimators)
    x, integrals = solved.states[-1]
    value, variance = reference.group_statistics(integrals.T.to(torch.float64), groups)
    nvjp = sum(estimator.products for estimator in estimators)
    return Integral(x, value, variance if task.probes.known_variance else None, solved.nfe, nvjp, value, solved.nfe_of_each)


def _together(task: Task, start: Parts, estimators: list[Estimator]) -> Solved:
    settings, rules = task.settings, rules_of(task.settings, task.create_graph)
    return solve_adaptive(_derivative(task, estimators[0]), start, settings.nodes.tolist(), rules, jumps=settings.jumps)


def _per_sample(task: Task, start: Parts, estimators: list[Estimator]) -> Solved:
    """estimators: that of the whole batch, which those of narrowed ones join."""
    settings, rules = task.settings, rules_of(task.settings, task.create_graph, task.mark)

    def narrowed(samples: Tensor) -> Derivative:
        part = task.of(samples)
        estimators.append(part.estimator())
        return _derivative(part, estimators[-1])

    shrinks, times = settings.per_sample == "shrink", settings.nodes.tolist()
    return solve_per_sample(_derivative(task, estimators[0]), start, times, rules, narrowed if shrinks else None, settings.jumps)


def _derivative(task: Task, estimator: Estimator) -> Derivative:
    field, settings = task.field, task.settings

    def derivative(now: Moment, parts: Parts) -> Parts:
        x, scale = parts[0], field.scale_at(now.exact)
        recorded = estimator.record(lambda given: field.checked_output_at(given, now.given, scale), x.to(settings.dtype))
        estimator.add(recorded, 0, 0.0, 1.0)
        output = recorded.output if task.create_graph else recorded.output.detach()
        factors, growth = field.factors_at(now.exact, x.device), estimator.group_means()
        if factors is not None:
            growth = factors[0] * math.prod(x.shape[1:]) + factors[1] * growth
        return combined(x, output, factors), growth.T

    return derivative
