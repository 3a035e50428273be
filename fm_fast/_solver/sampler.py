"""A solve for samples: fixed steps, adaptive ones or those of each sample's own, with the states that are saved on the way."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fm_fast import _modes, reference
from fm_fast._solver.adaptive import solve_adaptive
from fm_fast._solver.churn import with_noise
from fm_fast._solver.derivative import Derivative, Moment, Parts
from fm_fast._solver.evaluate import make_evaluate, make_mixed
from fm_fast._solver.field import Field, combined
from fm_fast._solver.learned import plan_and_factors, velocities
from fm_fast._solver.loop import AfterStep, run
from fm_fast._solver.per_sample import solve_per_sample
from fm_fast._solver.progress import step_counter
from fm_fast._solver.rules import rules_of
from fm_fast._solver.settings import Settings
from fm_fast._solver.state import Layout, make_state
from fm_fast._solver.trajectory import StepsTaken, Trajectory

Callback = Callable[[int, float, Tensor], None]


@dataclass(frozen=True, eq=False)
class Solution:
    """x [B, ...] at the end; calls of the model; saved [S, B, ...], or None of no times; those times; calls until each sample's own end."""

    x: Tensor
    nfe: int
    saved: Tensor | None
    saved_t: tuple[float, ...]
    nfe_of_each: Tensor | None = None


def solve(
    field: Field, start: Tensor, settings: Settings, callback: Callback | None, progress: bool, key: Tensor | None, mark: bool
) -> Solution:
    """key: of the noise that is added on the way. mark: samples whose own steps fail become NaN."""
    if settings.per_sample:
        return _per_sample(field, start, settings, mark)
    if settings.adaptive is not None:
        return _adaptive(field, start, settings, callback)
    return _fixed(field, start, settings, callback, progress, key)


def _is_recorded(settings: Settings) -> bool:
    """Whether gradients follow the solve, whose arithmetic is plain PyTorch then."""
    return settings.grad != "none" and torch.is_grad_enabled()


# Fixed steps


def _fixed(field: Field, start: Tensor, settings: Settings, callback: Callback | None, progress: bool, key: Tensor | None) -> Solution:
    plan, factors = plan_and_factors(settings, start.device)
    rerun = settings.grad == "checkpoint" and torch.is_grad_enabled()
    scale = field.guidance.scale if field.guidance else 1.0
    if factors is not None:
        evaluate = velocities(factors, make_mixed(field, plan, start, rerun), settings.dtype)
        layout = Layout(reference.accumulation_dtype(start))
    elif isinstance(scale, Tensor):
        evaluate, layout = make_mixed(field, plan, start, rerun), Layout(settings.dtype)
    else:
        evaluate, layout = make_evaluate(field, plan, start, rerun), Layout(settings.dtype, field.doubled is not None, scale)
    if key is not None:
        _require_numbers(factors)
        evaluate = with_noise(evaluate, plan, key, start.shape, reference.accumulation_dtype(start), settings.backend)
    watched = _is_recorded(settings) or not _modes.plainly_eager() or _modes.transforms_active()
    trajectory = Trajectory(settings.saved, at_once=not watched)
    with step_counter(len(plan.nodes) - 1, progress) as count:
        after = _after_step(trajectory, settings, callback, count if progress else None)
        state = make_state(start, plan, layout, settings.backend, plain=_is_recorded(settings))
        x = run(plan, state, evaluate, after)
    x = x.clone() if layout.doubled else x  # not half of a larger buffer
    trajectory.note(0, start.to(x.dtype))
    return Solution(x, plan.evaluations, trajectory.tensor(), settings.saved_t)


def _require_numbers(factors: object) -> None:
    if factors is not None:
        raise ValueError(
            "churn must be 0 where gradients of the path's own parameters are recorded, which the added noise would leave out, and with a"
            " path or objective of one's own under torch.func or forward-mode differentiation, which hide whether they are"
        )


def _after_step(
    trajectory: Trajectory, settings: Settings, callback: Callback | None, count: Callable[[], None] | None
) -> AfterStep | None:
    """What happens after a step; None where nothing does, which keeps the loop free of it. States are copied: the buffer is reused."""
    if not settings.saved and callback is None and count is None:
        return None
    nodes = settings.nodes.tolist()

    def after(step: int, x: Tensor) -> None:
        trajectory.note(step, x)
        if callback is not None:
            callback(step, nodes[step], x.clone())
        if count is not None:
            count()

    return after


# Adaptive steps


def _adaptive(field: Field, start: Tensor, settings: Settings, callback: Callback | None) -> Solution:
    velocity, rules = _velocity(field, settings), rules_of(settings, _is_recorded(settings))
    x0, times = start.to(reference.accumulation_dtype(start)), settings.nodes.tolist()
    taken = StepsTaken(times[0], x0) if settings.every_step else None
    after = _after_accepted(callback, taken)
    solved = solve_adaptive(lambda now, parts: (velocity(parts[0], now),), (x0,), times, rules, after, settings.jumps)
    saved, saved_t = (_saved(solved.states, settings), settings.saved_t) if taken is None else (taken.tensor(), taken.times)
    return Solution(solved.states[-1][0], solved.nfe, saved, saved_t)


def _after_accepted(callback: Callback | None, taken: StepsTaken | None) -> Callable[[int, float, Parts], None] | None:
    if callback is None and taken is None:
        return None

    def after(step: int, t: float, parts: Parts) -> None:
        if taken is not None:
            taken.note(t, parts[0])
        if callback is not None:
            callback(step, t, parts[0].clone())

    return after


def _per_sample(field: Field, start: Tensor, settings: Settings, mark: bool) -> Solution:
    rules = rules_of(settings, _is_recorded(settings), mark)

    def derivative(of: Field) -> Derivative:
        velocity = _velocity(of, settings)
        return lambda now, parts: (velocity(parts[0], now),)

    narrowed = (lambda samples: derivative(field.of(samples))) if settings.per_sample == "shrink" else None
    x0, times = start.to(reference.accumulation_dtype(start)), settings.nodes.tolist()
    solved = solve_per_sample(derivative(field), (x0,), times, rules, narrowed, settings.jumps)
    return Solution(solved.states[-1][0], solved.nfe, _saved(solved.states, settings), settings.saved_t, solved.nfe_of_each)


def _saved(states: Sequence[Parts], settings: Settings) -> Tensor | None:
    return torch.stack([states[position][0] for position in settings.saved]) if settings.saved else None


def _velocity(field: Field, settings: Settings) -> Callable[[Tensor, Moment], Tensor]:
    """The velocity at x [B, ...] and a time, in x's dtype."""

    def velocity(x: Tensor, now: Moment) -> Tensor:
        output = field.checked_output_at(x.to(settings.dtype), now.given, field.scale_at(now.exact))
        return combined(x, output, field.factors_at(now.exact, x.device))

    if settings.grad == "checkpoint" and torch.is_grad_enabled():
        # A model may write into its times, which the second evaluation needs as they were.
        own = lambda x, now: velocity(x, now._replace(given=now.given.clone()))  # noqa: E731
        return lambda x, now: checkpoint(own, x, now, use_reentrant=False)  # type: ignore[return-value]
    return velocity
