"""The checked arguments of a solve, which sampling and likelihoods share."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fm_fast import _backends, _checks, _modes
from fm_fast._codes import PathCode
from fm_fast._solver.conditioning import warn_if_ill_conditioned
from fm_fast._solver.guidance import ALWAYS, Guidance, guided_times
from fm_fast._solver.plan import Plan, make_plan
from fm_fast.grids import Grid, grid_nodes, with_times
from fm_fast.objectives import OBJECTIVES, Objective, as_objective, is_built_in, velocity_range
from fm_fast.paths import BUILT_IN, Path, as_path, kernel_form
from fm_fast.solvers import AdamsBashforth, EmbeddedRungeKutta, Method, RungeKutta, Table, as_method, is_adaptive

PerSample = bool | Literal["shrink"]
Save = None | str | Sequence[float]
GRADIENTS = ("none", "direct", "checkpoint")
NONFINITE = ("raise", "mark")
TOLERANCE, MAX_STEPS = 1e-5, 10_000  # of adaptive methods, where none are given
PLAIN = {str, int, float, bool, type(None), torch.dtype, *BUILT_IN}  # whose values are all there is to know of them


@dataclass(frozen=True)
class Settings:
    """What a solve is: names resolved, values checked.

    ``nodes`` run in the direction of the solve; ``saved`` are positions in them; ``guided`` are the times between which guidance applies;
    ``every_step``: the states after the steps that an adaptive method chooses are saved.
    """

    path: Path
    objective: Objective
    table: Table | None
    adaptive: EmbeddedRungeKutta | None
    nodes: np.ndarray
    saved: tuple[int, ...]
    rtol: float
    atol: float
    max_steps: int
    per_sample: PerSample
    dtype: torch.dtype
    grad: str
    backend: str
    churn: float = 0.0
    guided: tuple[float, float] = ALWAYS
    every_step: bool = False

    @property
    def saved_t(self) -> tuple[float, ...]:
        return tuple(float(self.nodes[position]) for position in self.saved)

    @property
    def span(self) -> tuple[float, float]:
        """The earliest and the latest time."""
        first, last = float(self.nodes[0]), float(self.nodes[-1])
        return min(first, last), max(first, last)

    @property
    def jumps(self) -> tuple[float, ...]:
        """The times within the solve at which the velocity jumps, in its order: where guidance begins and ends."""
        low, high = self.span
        return tuple(sorted({time for time in self.guided if low < time < high}, reverse=bool(self.nodes[-1] < self.nodes[0])))

    def plan(self, folded: bool = True) -> Plan:
        assert self.table is not None
        with _modes.host_arithmetic():
            changes = changes_within(self.nodes, self.guided) if isinstance(self.table, AdamsBashforth) else ()
            if _modes.plainly_eager() and kernel_form(self.path)[0] != PathCode.given and is_built_in(self.objective):
                return _known_plan(self.table, self.nodes.tobytes(), self.path, self.objective.name, folded, self.churn, changes)
            return make_plan(self.table, self.nodes, self.path, self.objective, folded, self.churn, changes)


def changes_within(nodes: np.ndarray, guided: tuple[float, float]) -> tuple[int, ...]:
    """Positions of the nodes between a step that is guided and one that is not, which their middles decide."""
    if guided == ALWAYS:
        return ()
    middles = 0.5 * (nodes[:-1] + nodes[1:])
    are_guided = (middles >= guided[0]) & (middles <= guided[1])
    return tuple((np.flatnonzero(are_guided[1:] != are_guided[:-1]) + 1).tolist())


@functools.lru_cache(maxsize=64)
def _known_plan(table: Table, nodes: bytes, path: Path, objective: str, folded: bool, churn: float, changes: tuple[int, ...]) -> Plan:
    """Plans of built-in paths and objectives are kept: of a policy's few steps, called again and again, they are half the cost."""
    return make_plan(table, np.frombuffer(nodes).copy(), path, OBJECTIVES[objective], folded, churn, changes)


def make_settings(
    start: Tensor, *, path: str | Path, objective: str | Objective, method: Method, steps: int | None,
    grid: str | Grid | Sequence[float], t0: float, t1: float, save: Save, rtol: float | None, atol: float | None,
    max_steps: int | None, per_sample: PerSample, dtype: torch.dtype | None, grad: str, backend: str | None, reverse: bool,
    churn: float = 0.0, guidance: Guidance | None = None,
) -> Settings:  # fmt: skip
    """The arguments of a solve, checked and with names resolved."""
    _checks.one_of("dtype", dtype, (None, *_checks.FLOATING))
    _checks.one_of("grad", grad, GRADIENTS)
    check_setting(start, method, grad)
    arguments = (
        path, objective, method, steps, grid, t0, t1, save, rtol, atol, max_steps, per_sample,
        dtype or start.dtype, grad, _backend(start.device, backend), reverse, churn,
    )  # fmt: skip
    resolve = _known_settings if set(map(type, arguments)) <= PLAIN and _modes.plainly_eager() else _resolved
    settings = resolve(*arguments, guided_times(guidance))
    warn_if_ill_conditioned(settings.path, settings.objective, settings.table, settings.nodes, settings.churn)
    return settings


def _resolved(
    path: str | Path, objective: str | Objective, method: Method, steps: int | None, grid: str | Grid | Sequence[float], t0: float,
    t1: float, save: Save, rtol: float | None, atol: float | None, max_steps: int | None, per_sample: PerSample, dtype: torch.dtype,
    grad: str, backend: str, reverse: bool, churn: float, guided: tuple[float, float],
) -> Settings:  # fmt: skip
    t0, t1 = float(_checks.finite_number("t0", t0)), float(_checks.finite_number("t1", t1))
    chosen_path, chosen_objective = as_path(path), as_objective(objective)
    chosen = as_method(method)
    table, adaptive = (None, chosen) if isinstance(chosen, EmbeddedRungeKutta) else (chosen, None)
    accuracy = _accuracy(method, adaptive, rtol, atol, max_steps)
    _check_per_sample(per_sample, method, adaptive)
    _check_churn(churn, method, table)
    interval = (t0, t1, chosen_path, velocity_range(chosen_path, chosen_objective))
    nodes = _fixed_nodes(grid, steps, *interval) if adaptive is None else _adaptive_nodes(adaptive.name, steps, grid, *interval)
    nodes, saved = _with_saved(nodes, save, adaptive is not None)
    every_step = isinstance(save, str) and adaptive is not None
    if every_step and per_sample:
        raise ValueError('save="steps" needs steps that are the same for all samples; give times with per_sample')
    if reverse:
        nodes = nodes[::-1].copy()
        saved = saved if isinstance(save, str) else tuple(len(nodes) - 1 - position for position in saved)
    return Settings(
        chosen_path, chosen_objective, table, adaptive, nodes, saved, *accuracy, per_sample, dtype, grad, backend, float(churn), guided,
        every_step,
    )  # fmt: skip


# Of a policy's few steps, called again and again, what is made of the arguments would be half the cost. typed: 1 is not True.
_known_settings = functools.lru_cache(maxsize=64, typed=True)(_resolved)


def _backend(device: torch.device, requested: str | None) -> str:
    """Of a solve's ops. A program that is exported runs without fm_fast, unless a backend was asked for."""
    if requested is None and _backends.ENVIRONMENT_BACKEND is None and _modes.is_exporting():
        return "reference"
    return _backends.resolve("linear_step", device, requested)


def _accuracy(
    method: object, adaptive: EmbeddedRungeKutta | None, rtol: float | None, atol: float | None, max_steps: int | None
) -> tuple[float, float, int]:
    """The tolerances and the limit of an adaptive method; ValueError if a fixed-step one was given any, which would be in vain."""
    given = {"rtol": rtol, "atol": atol, "max_steps": max_steps}
    for name, value in given.items():
        if value is not None and adaptive is None:
            raise ValueError(f"{name} must be None for the fixed-step method {method!r}, whose accuracy is up to steps, got {value!r}")
    for name in ("rtol", "atol"):
        if given[name] is not None:
            _checks.positive_number(name, given[name])
    if max_steps is not None:
        _checks.count("max_steps", max_steps)
    return rtol or TOLERANCE, atol or TOLERANCE, max_steps or MAX_STEPS


def _check_per_sample(per_sample: object, method: object, adaptive: EmbeddedRungeKutta | None) -> None:
    if not isinstance(per_sample, bool) and per_sample != "shrink":
        raise ValueError(f'per_sample must be True, False or "shrink", got {per_sample!r}')
    if per_sample and adaptive is None:
        raise ValueError(f"per_sample needs an adaptive method, whose steps may differ from sample to sample, got {method!r}")


def _check_churn(churn: float, method: object, table: Table | None) -> None:
    if _checks.finite_number("churn", churn) < 0.0:
        raise ValueError(f"churn must not be negative, got {churn}")
    if churn > 0.0 and not isinstance(table, RungeKutta):
        raise ValueError(f"churn must be 0 for methods other than fixed-step Runge-Kutta ones, got {churn} for {method!r}")


def check_setting(start: Tensor, method: object, grad: str) -> None:
    """What cannot be done under torch's transforms or without values, told before torch says it in its own words."""
    if is_adaptive(method) and _modes.transforms_active():
        raise ValueError(
            "method must be a fixed-step one under torch.func transforms and forward-mode differentiation, which hide the error that an "
            f"adaptive one looks at, got {_shown(method)}"
        )
    if is_adaptive(method) and not _modes.has_values(start):
        raise ValueError(f"method must be a fixed-step one for meta and fake tensors, which have no error to look at, got {_shown(method)}")
    if grad == "checkpoint" and _modes.function_transforms_active():
        raise ValueError('grad must be "none" or "direct" under torch.func transforms, which do not support checkpoints, got "checkpoint"')


def _shown(method: object) -> str:
    """A name, and not the numbers of a table."""
    return repr(method.name if isinstance(method, EmbeddedRungeKutta) else method)


def _fixed_nodes(
    grid: str | Grid | Sequence[float], steps: int | None, t0: float, t1: float, path: Path, limits: tuple[float, float]
) -> np.ndarray:
    with _modes.host_arithmetic():
        return grid_nodes(grid, steps, t0, t1, path, limits)


def _adaptive_nodes(
    method: str, steps: int | None, grid: object, t0: float, t1: float, path: Path, limits: tuple[float, float]
) -> np.ndarray:
    if steps is not None:
        raise ValueError(f"steps must be None for the adaptive method {method!r}, which chooses its own (see rtol and atol), got {steps}")
    if not isinstance(grid, str) or grid != "uniform":
        raise ValueError(f"grid must be left out for the adaptive method {method!r}; use save=<times> to get states on the way")
    return grid_nodes("uniform", 1, t0, t1, path, limits)


def _with_saved(nodes: np.ndarray, save: Save, adaptive: bool) -> tuple[np.ndarray, tuple[int, ...]]:
    """The nodes, with the times to save among them, and which of them are saved."""
    if save is None:
        return nodes, ()
    if not isinstance(save, str):
        merged, positions = with_times(nodes, save)
        return merged, tuple(positions)
    if save != "steps":
        raise ValueError(f'save must be None, "steps" or a sequence of times, got {save!r}')
    return nodes, () if adaptive else tuple(range(len(nodes)))  # an adaptive method finds its nodes on the way


def check_finite(values: Tensor, what: str, settings: Settings, on_nonfinite: str) -> Tensor:
    """bool [B], which samples are finite at the end of the solve; the only look at values, after the loop.

    Raises FloatingPointError if one is not and ``on_nonfinite`` is "raise", where values can be read: not inside torch.compile, torch.func
    transforms or the capture of a CUDA graph.
    """
    values, looks = values.detach(), on_nonfinite == "raise" and _modes.worth_a_wait(values)
    if looks and math.isfinite(values.sum()):  # as nearly always: finite numbers alone have a finite sum, unless it is too large
        return values.new_ones(values.shape[:1], dtype=torch.bool)
    zeros = values * 0.0  # and NaN where they are not finite; torch.isfinite takes a CPU as long as a few steps
    finite = (zeros.flatten(1).sum(1) if zeros.dim() > 1 else zeros) == 0.0
    if looks and not bool(finite.all()):
        raise FloatingPointError(
            f"{int((~finite).sum())} of {len(finite)} {what} are not finite after the solve to t = {settings.nodes[-1]}; take more steps "
            'or check the model (on_nonfinite="mark" returns them)'
        )
    return finite
