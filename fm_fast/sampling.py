"""Solving the flow's ODE dx/dt = v(x, t): from noise to samples, and from data back to noise.

A fixed-step method costs one fused op an evaluation beside the network, nothing on the host that waits, and memory for the state and one
input. What the network predicts does not matter: the velocity p(t) x + r(t) o is folded into the solver's coefficients.
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fm_fast import _checks, _modes
from fm_fast._results import Result
from fm_fast._solver.churn import churn_key
from fm_fast._solver.field import Field, Model, make_field
from fm_fast._solver.guidance import Guidance
from fm_fast._solver.prior import warn_if_not_of_the_prior
from fm_fast._solver.recording import warn_unless_recorded
from fm_fast._solver.sampler import Callback, solve
from fm_fast._solver.settings import NONFINITE, PerSample, Save, Settings, check_finite, make_settings
from fm_fast.grids import Grid
from fm_fast.objectives import Objective
from fm_fast.paths import Path
from fm_fast.random import Whole
from fm_fast.solvers import Method

__all__ = ["Guidance", "Sample", "encode", "sample"]


@dataclass(frozen=True, eq=False, repr=False)
class Sample(Result):
    """The result of a solve.

    Attributes:
        x: [B, ...], the state at the end; float32 (float64 for float64 noise).
        nfe: calls of the model.
        saved: [S, B, ...], the states that were asked for, or None.
        saved_t: their S times, or None.
        finite: bool [B], whether the sample is finite.
        nfe_of_each: int64 [B], calls of the model before the sample was at its end, where ``per_sample`` was asked for, else None.
    """

    x: Tensor
    nfe: int
    saved: Tensor | None
    saved_t: tuple[float, ...] | None
    finite: Tensor
    nfe_of_each: Tensor | None = None


def sample(
    model: Model,
    noise: Tensor,
    *,
    cond: Mapping[str, Any] | None = None,
    path: str | Path = "ot",
    objective: str | Objective = "velocity",
    method: Method = "midpoint",
    steps: int | None = None,
    grid: str | Grid | Sequence[float] = "uniform",
    t0: float = 0.0,
    t1: float = 1.0,
    guidance: Guidance | None = None,
    save: Save = None,
    callback: Callback | None = None,
    progress: bool = False,
    rtol: float | None = None,
    atol: float | None = None,
    max_steps: int | None = None,
    per_sample: PerSample = False,
    churn: float = 0.0,
    seed: Whole | None = None,
    step: Whole | None = None,
    sample_ids: Whole | None = None,
    dtype: torch.dtype | None = None,
    grad: str = "none",
    on_nonfinite: str = "raise",
    backend: str | None = None,
) -> Sample:
    """Samples of a trained model: the flow's ODE solved from noise at t0 to data at t1 (equation 1).

    Args:
        model: called as ``model(x, t, **cond)`` with x [B, ...] and t [B]; returns a tensor of x's shape. It must not keep or change
            x, a buffer that the next step overwrites, or change t.
        noise: [B, ...]: ``fm.noise(shape, seed=2, step=0)``, of another seed than the training's; for VE, times
            ``fm.paths.prior_scale(path)``.
        cond: keyword arguments passed on to the model untouched, but for ``guidance`` and ``per_sample="shrink"``, which take every tensor
            whose first size is the batch's to have one entry a sample (see ``Guidance.shared``).
        path, objective: those of training. Models trained to predict noise, score or data sample like any other.
        method: fixed-step: "euler", "midpoint", "heun2", "ralston", "rk4", "rk4_38", "ab2", "ab3" or a table of ``fm_fast.solvers``;
            adaptive: "dopri5", "tsit5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun" or an ``EmbeddedRungeKutta``.
        steps: number of steps of a fixed-step method (required); None for an adaptive one.
        grid: where the steps are: "uniform", "karras", "shift", "cosine", an object of ``fm_fast.grids``, or increasing times.
        t0, t1: ends of the solve, kept inside the range in which the path's velocity is finite (VP ends at 1 - 1e-5).
        guidance: a :class:`Guidance`; evaluated on one doubled batch.
        save: None, "steps" (the first state and that after every step that counts, in the order of the solve; not with ``per_sample``),
            or times in [t0, t1]. A fixed step that contains such a time is split there, and so are the steps of dopri8. Other adaptive
            methods give states within their steps without an evaluation, by polynomials of an order less than the step's (4 for dopri5
            and tsit5): errors may be tens of times larger there.
        callback: called as ``callback(step, t, x)`` after each step that counts, with a copy of the state; not with ``per_sample``.
        progress: show a progress bar (needs tqdm; fixed-step methods).
        rtol, atol, max_steps: of adaptive methods, by default 1e-5, 1e-5 and 10_000; None for a fixed-step one. The error's norm is over
            the whole batch, so a sample depends on its neighbours there, unless ``per_sample``; max_steps counts the steps of a solve,
            those in vain too. An error is estimated, not known: fehlberg2's estimate is tens to hundreds of times too small.
        per_sample: an adaptive method chooses the steps of each sample by itself: each has the accuracy asked for, whatever else is in the
            batch. The model is called with times that differ, until the last sample is at its end. With ``on_nonfinite="mark"``, samples
            whose solve fails become NaN instead of an error. Guidance is evaluated outside of its interval too, with a scale of 1.
            "shrink": the same, and samples at their ends leave the batch, so that the model computes less. It must find what belongs to a
            sample in ``cond`` alone, where every tensor whose first size is the batch's is taken to have one entry a sample, but for those
            that ``guidance`` names as shared.
        churn: stochastic sampling, by Runge-Kutta methods of fixed steps: a step from t to t' first takes the state back by churn (t' - t),
            with fresh noise of the path's own, and is longer by as much. At every time the distribution stays that of the path, and errors
            made before fade; 0 is the ODE. As steps get short this is the SDE whose squared diffusion is
            2 churn sigma (alpha' sigma - alpha sigma') / alpha. Source: Karras et al. (2022), algorithm 2, here for any Gaussian path.
        seed, step, sample_ids: what that noise is a function of (see ``fm_fast.random``), besides the number of the solver's step (without
            a seed, one is drawn from torch's generator; step is 0). Only with ``churn``.
        dtype: of the model's input; by default the noise's. The state is float32 (float64 for float64 noise) throughout, so a bfloat16
            model loses no accuracy to the solver.
        grad: "none" (nothing is recorded; refused under ``torch.func.grad``, which would find zero), "direct" (the whole graph is, with
            the path's own parameters), "checkpoint" (the model runs again in backward; not under torch.func transforms). With
            ``per_sample`` the graph holds the steps in vain too, and where the velocity is not finite there, gradients are not either.
        on_nonfinite: "raise" a FloatingPointError if a sample is not finite at the end, or "mark" it in the result. Inside torch.compile,
            torch.func transforms and the capture of a CUDA graph samples are only marked.
        backend: as in :func:`fm_fast.flow_matching_loss`, but plain PyTorch by default where ``torch.export`` records a program.

    Raises:
        ValueError, TypeError: for any argument out of range or of wrong shape or dtype, naming it.
        FloatingPointError: see ``on_nonfinite``. RuntimeError: an adaptive method failed, or ``backend`` cannot run here.

    Naive equivalent of the Euler method, for a model that predicts the velocity::

        x = noise
        for n in range(steps):
            x = x + model(x, torch.full((len(x),), n / steps)) / steps
    """
    _checks.state("noise", noise)
    settings = make_settings(
        noise, path=path, objective=objective, method=method, steps=steps, grid=grid, t0=t0, t1=t1, save=save, rtol=rtol, atol=atol,
        max_steps=max_steps, per_sample=per_sample, dtype=dtype, grad=grad, backend=backend, reverse=False, churn=churn,
        guidance=guidance,
    )  # fmt: skip
    warn_unless_recorded(grad != "none", "noise", noise, 'grad="direct"')
    field = make_field(model, settings.path, settings.objective, noise.shape[0], cond, guidance, settings.span)
    warn_if_not_of_the_prior(noise, settings.path, float(settings.nodes[0]))
    key = churn_key(settings.churn, seed, step, sample_ids, noise)
    return _solve(field, noise, settings, save, callback, progress, on_nonfinite, key)


def encode(
    model: Model,
    x1: Tensor,
    *,
    cond: Mapping[str, Any] | None = None,
    path: str | Path = "ot",
    objective: str | Objective = "velocity",
    method: Method = "midpoint",
    steps: int | None = None,
    grid: str | Grid | Sequence[float] = "uniform",
    t0: float = 0.0,
    t1: float = 1.0,
    guidance: Guidance | None = None,
    save: Save = None,
    callback: Callback | None = None,
    progress: bool = False,
    rtol: float | None = None,
    atol: float | None = None,
    max_steps: int | None = None,
    per_sample: PerSample = False,
    dtype: torch.dtype | None = None,
    grad: str = "none",
    on_nonfinite: str = "raise",
    backend: str | None = None,
) -> Sample:
    """The noise that data comes from: :func:`sample` backwards, from x1 [B, ...] at t1 to t0 through the same nodes.

    ``encode(sample(x).x)`` returns to x up to the method's error. Arguments and errors are those of :func:`sample`.

    Naive equivalent of the Euler method::

        x = x1
        for n in range(steps, 0, -1):
            x = x - model(x, torch.full((len(x),), n / steps)) / steps
    """
    _checks.state("x1", x1)
    settings = make_settings(
        x1, path=path, objective=objective, method=method, steps=steps, grid=grid, t0=t0, t1=t1, save=save, rtol=rtol, atol=atol,
        max_steps=max_steps, per_sample=per_sample, dtype=dtype, grad=grad, backend=backend, reverse=True, guidance=guidance,
    )  # fmt: skip
    warn_unless_recorded(grad != "none", "x1", x1, 'grad="direct"')
    field = make_field(model, settings.path, settings.objective, x1.shape[0], cond, guidance, settings.span)
    return _solve(field, x1, settings, save, callback, progress, on_nonfinite)


def _solve(
    field: Field, start: Tensor, settings: Settings, save: Save, callback: Callback | None, progress: bool, on_nonfinite: str,
    key: Tensor | None = None,
) -> Sample:  # fmt: skip
    _checks.one_of("on_nonfinite", on_nonfinite, NONFINITE)
    _check_callback(settings, callback, progress)
    _check_gradient(settings.grad)
    with torch.no_grad() if settings.grad == "none" else contextlib.nullcontext():
        solved = solve(field, start, settings, callback, progress, key, mark=on_nonfinite == "mark")
    finite = check_finite(solved.x, "samples", settings, on_nonfinite)
    if save is None:
        return Sample(solved.x, solved.nfe, None, None, finite, solved.nfe_of_each)
    saved = solved.x.new_empty(0, *solved.x.shape) if solved.saved is None else solved.saved
    return Sample(solved.x, solved.nfe, saved, solved.saved_t, finite, solved.nfe_of_each)


def _check_callback(settings: Settings, callback: Callback | None, progress: bool) -> None:
    if callback is not None and not callable(callback):
        raise TypeError(f"callback must be callable as callback(step, t, x), got {type(callback).__name__}")
    if settings.per_sample and callback is not None:
        raise ValueError("callback needs steps that are the same for all samples; it cannot be called with per_sample=True")
    if settings.adaptive is not None and progress:
        raise ValueError(f"progress needs a fixed-step method, got {settings.adaptive.name!r}")


def _check_gradient(grad: str) -> None:
    """ValueError where a ``torch.func`` transform asks for the gradient that is not recorded, which would be zero in silence."""
    if grad == "none" and _modes.gradient_transform_active():
        raise ValueError(
            'grad must be "direct" under torch.func.grad, vjp, jacrev and hessian, or the derivative would be zero, got "none"; draw '
            "samples that are to be constant outside the transform"
        )
