"""A solve that carries the integral of the divergence along: what likelihoods are made of."""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fm_fast import _ops, reference
from fm_fast._solver.adaptive import solve_adaptive
from fm_fast._solver.estimator import Estimator, frozen
from fm_fast._solver.evaluate import time_views
from fm_fast._solver.field import Field, check_output
from fm_fast._solver.loop import Evaluate, Layout, make_state, run
from fm_fast._solver.plan import Plan, make_plan
from fm_fast._solver.probes import Probes
from fm_fast._solver.progress import step_counter
from fm_fast._solver.settings import Settings
from fm_fast.objectives import velocity_factors

# Of an evaluation: (first draw, share of the weight) for each set of probes that measures its divergence.
Draws = list[tuple[int, float]]


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

    def estimator(self) -> Estimator:
        batch = self.field.batch
        return Estimator(self.probes, self.key, batch, self.mode, self.memory_budget, self.create_graph, self.settings.backend)


@dataclass(frozen=True, eq=False)
class Integral:
    """x [B, ...] at the last node; the integral of div v dt over the nodes, float64 [B], and its variance from the probes.

    The variance is None where the probes cannot tell.
    """

    x: Tensor
    value: Tensor
    variance: Tensor | None
    nfe: int
    nvjp: int


def integrate(task: Task, start: Tensor) -> Integral:
    """Solve from start [B, ...] through the nodes of the task's settings."""
    with _recording_mode(task):
        if task.settings.adaptive is not None:
            if task.progress:
                raise ValueError(f"progress needs a fixed-step method, got {task.settings.adaptive!r}")
            return _adaptive(task, start)
        plan = task.settings.plan()
        return _fixed(task, start, plan, own_draws(plan, task.probes))


@contextlib.contextmanager
def _recording_mode(task: Task) -> Iterator[None]:
    """Gradients beyond single evaluations only where asked for; tensors made here can be differentiated whatever the caller's mode."""
    with torch.inference_mode(False), torch.set_grad_enabled(task.create_graph), frozen(task.field.model, not task.create_graph):
        yield


def integrate_coarsely(task: Task, start: Tensor) -> Integral:
    """The same over every second node, each step with the probes of the two steps that it replaces.

    What differs from :func:`integrate` is then the discretisation, not the draws.
    """
    settings = task.settings
    assert settings.table is not None
    plan = make_plan(settings.table, settings.nodes[::2].copy(), settings.path, settings.objective)
    with _recording_mode(task):
        return _fixed(task, start, plan, shared_draws(plan, settings.plan(), task.probes))


# Fixed steps


def own_draws(plan: Plan, probes: Probes) -> list[Draws]:
    """New probes for every evaluation."""
    return [[(number * probes.groups, 1.0)] for number in range(plan.evaluations)]


def shared_draws(coarse: Plan, fine: Plan, probes: Probes) -> list[Draws]:
    """For stage i of coarse step m the probes of stage i of the fine steps 2m and 2m + 1, as far as these have such a stage."""
    if probes.exact:
        return own_draws(coarse, probes)
    number_of = {place: number for number, place in enumerate(fine.places())}
    draws = []
    for number, (step, stage) in enumerate(coarse.places()):
        twins = [number_of[place] for place in ((2 * step, stage), (2 * step + 1, stage)) if place in number_of]
        twins = twins or [fine.evaluations + number]
        draws.append([(twin * probes.groups, 1.0 / len(twins)) for twin in twins])
    return draws


def _fixed(task: Task, start: Tensor, plan: Plan, draws: list[Draws]) -> Integral:
    estimator = task.estimator()
    evaluate = _measured(task, plan, start, estimator, draws)
    layout = Layout(task.settings.dtype)
    with step_counter(len(plan.nodes) - 1, task.progress) as count:
        state = make_state(start, plan, layout, task.settings.backend, plain=task.create_graph)
        x = run(plan, state, evaluate, (lambda step, x: count()) if task.progress else None)
    value, variance = estimator.sums
    return Integral(x, value, variance if task.probes.known_variance else None, plan.evaluations, estimator.products)


def _measured(task: Task, plan: Plan, start: Tensor, estimator: Estimator, draws: list[Draws]) -> Evaluate:
    """The model at the plan's times; where the divergence has a weight, it is measured from the same forward pass."""
    field, size = task.field, math.prod(start.shape[1:])
    views = time_views(torch.from_numpy(plan.times).to(start.device, reference.accumulation_dtype(start)), field.batch)
    guided = [field.guided_at(t) for t in plan.times.tolist()]
    weights = plan.weights.tolist()
    biases, factors = (plan.weights * plan.x_factors * size).tolist(), (plan.weights * plan.output_factors).tolist()

    def evaluate(x: Tensor, number: int) -> Tensor:
        if weights[number] == 0.0:
            return _checked(field.output_at(x, views[number], guided[number]), x, number)
        with estimator.recording():
            x = leaf(x)
            output = _checked(field.output_at(x, views[number], guided[number]), x, number)
        for index, share in draws[number]:
            last = index == draws[number][-1][0]
            estimator.add(output, x, index, share * biases[number], share * factors[number], last)
        return output if task.create_graph else output.detach()

    return evaluate


def _checked(output: Tensor, x: Tensor, number: int) -> Tensor:
    if number == 0:
        check_output(output, x)
    return _ops.native_layout(output)


def leaf(x: Tensor) -> Tensor:
    """x where it belongs to a graph already, else the same values as a new leaf."""
    if x.requires_grad:
        return x
    return (x.clone() if x.is_inference() else x.detach()).requires_grad_()


# Adaptive steps


def _adaptive(task: Task, start: Tensor) -> Integral:
    """x and the integral by each group of probes together; the probes are held, since fresh ones would enter the error control."""
    x0, estimator = start.to(reference.accumulation_dtype(start)), task.estimator()
    integrals = x0.new_zeros(estimator.group_count, len(start))
    settings = task.settings
    assert settings.adaptive is not None
    derivative = _derivative(task, estimator)
    (states, paths), nfe = solve_adaptive(
        derivative, (x0, integrals), settings.nodes.tolist(), settings.adaptive, settings.rtol, settings.atol, settings.max_steps
    )
    value, variance = reference.group_statistics(paths[-1].to(torch.float64), estimator.group_count)
    return Integral(states[-1], value, variance if task.probes.known_variance else None, nfe, estimator.products)


def _derivative(task: Task, estimator: Estimator) -> Callable[[Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    field, settings = task.field, task.settings

    def derivative(t: Tensor, parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, times = parts[0], t.to(parts[0].dtype).expand(field.batch)
        with estimator.recording():
            given = leaf(x.to(settings.dtype))
            output = field.output_at(given, times, field.guided_at(t))
            check_output(output, given)
        estimator.add(output, given, 0, 0.0, 1.0)
        output = output if task.create_graph else output.detach()
        p, r = velocity_factors(field.path, field.objective, t)
        growth = p * math.prod(x.shape[1:]) + r * estimator.group_means()
        return field.velocity(x, times, output), growth.to(x.dtype)

    return derivative
