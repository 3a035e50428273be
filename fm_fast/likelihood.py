"""Likelihoods by the instantaneous change of variables: log p1(x1) = log p0(x0) - the integral of div v along the flow (appendix C).

The log-density is a quadrature along the trajectory with the solver's own weights, so an evaluation of weight 0 needs no divergence
(midpoint: one a step instead of two). Probes are drawn afresh at every evaluation of a fixed-step method: the mean is the same, and the
variance falls with the number of steps, because the errors of different steps are independent.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution

from fm_fast import _backends, _checks, _modes, random, reference
from fm_fast._results import Result
from fm_fast._solver.estimator import Estimator
from fm_fast._solver.field import Model, combined, make_field
from fm_fast._solver.guidance import Guidance
from fm_fast._solver.integrate import Integral, integrate, integrate_coarsely, make_task
from fm_fast._solver.prior import Prior, as_prior, log_prior, tried_prior, warn_if_not_of_the_prior, warn_of_another_start
from fm_fast._solver.probes import make_probes
from fm_fast._solver.recording import check_gradient, solving, warn_unless_recorded
from fm_fast._solver.settings import PerSample, Settings, check_finite, make_settings
from fm_fast.grids import KEPT_INSIDE, Grid
from fm_fast.objectives import Objective, as_objective, velocity_factors, velocity_range
from fm_fast.paths import Path, as_path
from fm_fast.random import Whole
from fm_fast.solvers import Method

__all__ = ["Divergence", "Likelihood", "SampleWithLogProb", "divergence", "log_likelihood", "sample_with_log_prob"]

LARGE_ERROR = 0.01  # bits a dimension: what published figures are rounded to


@dataclass(frozen=True, eq=False, repr=False)
class Divergence(Result):
    """The divergence of a velocity at one time.

    Attributes:
        v: [B, ...], the velocity.
        div: [B], its divergence in x.
        std_err: [B], standard error of div from the probes: 0 if exact; None where a single group of probes cannot tell.
    """

    v: Tensor
    div: Tensor
    std_err: Tensor | None


@dataclass(frozen=True, eq=False, repr=False)
class Likelihood(Result):
    """Log-densities of data.

    Attributes:
        logp: [B], nats, float64.
        std_err: [B], standard error of logp from the probes: 0 if exact; None where a single group of probes cannot tell.
        disc_err: [B], estimate of the error of logp from the finite number of steps, or None.
        x0: [B, ...], the noise that the data flows back to.
        nfe: calls of the model.
        nvjp: vector-Jacobian products.
        nfe_of_each: int64 [B], calls of the model before the sample was at its end, where ``per_sample`` was asked for, else None.
    """

    logp: Tensor
    std_err: Tensor | None
    disc_err: Tensor | None
    x0: Tensor
    nfe: int
    nvjp: int
    nfe_of_each: Tensor | None = None


@dataclass(frozen=True, eq=False, repr=False)
class SampleWithLogProb(Result):
    """Samples x [B, ...] with their log-densities; the other fields are those of :class:`Likelihood`."""

    x: Tensor
    logp: Tensor
    std_err: Tensor | None
    nfe: int
    nvjp: int
    nfe_of_each: Tensor | None = None


def divergence(
    model: Model,
    x: Tensor,
    t: Tensor | float,
    *,
    cond: Mapping[str, Any] | None = None,
    path: str | Path = "ot",
    objective: str | Objective = "velocity",
    guidance: Guidance | None = None,
    probes: int = 1,
    kind: str = "auto",
    mode: str = "auto",
    memory_budget: int | None = None,
    replicates: int = 1,
    seed: Whole | None = None,
    step: Whole = 0,
    sample_ids: Whole | None = None,
    create_graph: bool = False,
    backend: str | None = None,
) -> Divergence:
    """The velocity of a model and its divergence at time t, by Hutchinson's estimator or exactly (equation 34).

    Args:
        model, cond, path, objective, guidance: as in :func:`fm_fast.sample`. Unless ``create_graph``, the parameters of a module do not
            require gradients meanwhile, so another thread must not train the same module then: it would find no gradients.
        x: [B, ...], float64, float32, bfloat16 or float16: the model's input.
        t: a number in [0, 1], a scalar tensor or [B]; kept inside the range in which the velocity is finite, for the model too, as in a
            solve.
        probes: probe vectors a sample and replicate; neither number matters to an exact divergence.
        kind: "auto" (exact where a sample has at most max(4, probes) elements, else rademacher), "exact", "rademacher", "gaussian",
            "hadamard" or "coloured" (images; a power of two of probes, one for each colour); see ``fm_fast/_solver/probes.py``.
        mode: "loop" (one vector-Jacobian product after another: least memory), "batched" (all at once: fewest launches), or "auto":
            batches that keep the graph times their size within ``memory_budget``.
        memory_budget: bytes; by default 2 MiB on the CPU, about its cache, and 1 GiB elsewhere.
        replicates: independent repetitions of all probes; hadamard and coloured probes depend on each other, and two replicates or more
            give them a standard error.
        seed, step, sample_ids: what the probes are a function of (see ``fm_fast.random``); without a seed, one is drawn from torch's
            generator.
        create_graph: make the result differentiable, also in a path's own parameters; costs the memory of all graphs. Needed under
            ``torch.func.grad``.
        backend: as in :func:`fm_fast.flow_matching_loss`.

    Raises:
        ValueError, TypeError: for any argument out of range or of wrong shape or dtype, naming it.
        RuntimeError: the model's output does not depend on x, or not in a way that autograd sees.

    Naive equivalent with one probe::

        x.requires_grad_()
        v, z = model(x, t), torch.randint_like(x, 2) * 2 - 1
        div = (torch.autograd.grad(v, x, z)[0] * z).flatten(1).sum(1)
    """
    _checks.state("x", x)
    _checks.time(t, x, "x")
    chosen_path, chosen_objective = as_path(path), as_objective(objective)
    field = make_field(model, chosen_path, chosen_objective, x.shape[0], cond, guidance).recordable()
    chosen = make_probes(kind, probes, replicates, tuple(x.shape), x.device)
    key = random.make_key(seed, step, sample_ids, x.shape[0], x.device, not chosen.exact)
    resolved = _backends.resolve("divergence_step", x.device, backend)
    estimator = Estimator(chosen, key, x.shape[0], mode, memory_budget, create_graph, resolved)
    check_gradient(create_graph)
    warn_unless_recorded(create_graph, "x", x, "create_graph=True")
    with solving(model, create_graph):
        times, scale = _as_times(t, x, velocity_range(chosen_path, chosen_objective)), field.scale_at(t)
        recorded = estimator.record(lambda given: field.checked_output_at(given, times, scale), x)
        estimator.add(recorded, 0, 0.0, 1.0)
        output = recorded.output if create_graph or _modes.transforms_active() else recorded.output.detach()
        factors = velocity_factors(chosen_path, chosen_objective, times)
        return _divergence(estimator, combined(x.to(times.dtype), output, factors), factors)


def _as_times(t: Tensor | float, x: Tensor, limits: tuple[float, float]) -> Tensor:
    wide = reference.accumulation_dtype(x)
    times = t.to(wide) if isinstance(t, Tensor) else torch.full((), t, dtype=wide, device=x.device)
    return times.clamp(*limits).expand(x.shape[0]).clone()  # a model may write into them


def _divergence(estimator: Estimator, v: Tensor, factors: tuple[Tensor, Tensor]) -> Divergence:
    """div v = p D + r div o."""
    (p, r), size, dtype = factors, math.prod(v.shape[1:]), v.dtype
    mean, variance = estimator.sums
    error = (r.abs() * variance.sqrt()).to(dtype) if estimator.probes.known_variance else None
    return Divergence(v, (p * size + r * mean).to(dtype), error)


def log_likelihood(
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
    rtol: float | None = None,
    atol: float | None = None,
    max_steps: int | None = None,
    per_sample: PerSample = False,
    dtype: torch.dtype | None = None,
    probes: int = 1,
    kind: str = "auto",
    mode: str = "auto",
    memory_budget: int | None = None,
    replicates: int = 1,
    prior: Prior | Distribution | None = None,
    error_estimate: bool = False,
    seed: Whole | None = None,
    step: Whole = 0,
    sample_ids: Whole | None = None,
    create_graph: bool = False,
    on_nonfinite: str = "raise",
    progress: bool = False,
    backend: str | None = None,
) -> Likelihood:
    """Log-density of data under the model: back to the noise at t0, the divergence carried along (appendix C, equations 31-35).

    Args:
        model, cond, path, objective, method, steps, grid, t0, t1, guidance: as in :func:`fm_fast.sample`; the parameters of a module are
            frozen as in :func:`fm_fast.divergence`, for other threads too.
        rtol, atol, max_steps, per_sample, dtype, on_nonfinite, progress, backend: as in :func:`fm_fast.sample`.
        x1: data [B, ...] in the model's space.
        probes, kind, mode, memory_budget, replicates, seed, step, sample_ids, create_graph: as in :func:`fm_fast.divergence`. Fixed-step
            methods draw new probes at every evaluation that counts, adaptive ones hold theirs for the whole solve.
        prior: log-density [B] of the state at t0, as a function of it or a distribution of whole samples; by default that of
            N(0, prior_scale^2) of the path at t0 = 0: exact for OT and Cosine, and for VP and VE as near as their noise end is to pure
            noise; a later t0 than about 0.02 has another density, of which a UserWarning tells. It is tried on x1 before the solve.
        error_estimate: solve again with half the steps and report ``disc_err`` = |difference| / (2^order - 1). Both solves are compared
            by one more probe, held over the two steps that a coarse step replaces, so that the probes' noise does not enter; ``logp``
            stays as it is. Needs an even number of steps, and guidance that begins and ends where every second step does. Costs half as
            many calls of the model again, and one and a half vector-Jacobian products for every evaluation that counts (half if exact).
            Warns where the mean error exceeds 0.01 bits a dimension.

    Raises:
        ValueError, TypeError: for any argument out of range or of wrong shape or dtype, naming it.
        FloatingPointError: a result is not finite (see ``on_nonfinite``). RuntimeError: as in :func:`fm_fast.divergence`.

    Naive equivalent with Euler steps, for a model that predicts the velocity::

        x, integral = x1, 0.0
        for n in range(steps, 0, -1):
            d = fm_fast.divergence(model, x, n / steps)
            x, integral = x - d.v / steps, integral + d.div / steps
        logp = Normal(0, 1).log_prob(x).flatten(1).sum(1) - integral
    """
    _checks.state("x1", x1)
    settings = make_settings(
        x1, path=path, objective=objective, method=method, steps=steps, grid=grid, t0=t0, t1=t1, save=None, rtol=rtol, atol=atol,
        max_steps=max_steps, per_sample=per_sample, dtype=dtype, grad="none", backend=backend, reverse=True, guidance=guidance,
    )  # fmt: skip
    if error_estimate:
        _check_halving(settings)
    task = make_task(
        model, x1, settings, cond=cond, guidance=guidance, kind=kind, probes=probes, replicates=replicates, seed=seed, step=step,
        sample_ids=sample_ids, mode=mode, memory_budget=memory_budget, create_graph=create_graph, progress=progress,
        on_nonfinite=on_nonfinite,
    )  # fmt: skip
    warn_unless_recorded(create_graph, "x1", x1, "create_graph=True")
    density = tried_prior(prior, x1)
    if density is None:
        warn_of_another_start(settings.path, float(settings.nodes[-1]))
    fine = integrate(task, x1, controlled=error_estimate and not task.probes.exact)
    with torch.set_grad_enabled(create_graph):
        logp = log_prior(density, fine.x, settings.path) + fine.value
    check_finite(logp, "log-densities", settings, on_nonfinite)
    if not error_estimate:
        return Likelihood(logp, fine.std_err, None, fine.x, fine.nfe, fine.nvjp, fine.nfe_of_each)
    coarse = integrate_coarsely(task, x1.detach())
    error = _discretisation_error(fine, coarse, density, settings)
    if _modes.worth_a_wait(error):
        _warn_if_large(error, x1)
    return Likelihood(logp, fine.std_err, error, fine.x, fine.nfe + coarse.nfe, fine.nvjp + coarse.nvjp)


def _check_halving(settings: Settings) -> None:
    nodes, adaptive = settings.nodes, settings.adaptive
    if adaptive is not None:
        raise ValueError(f"error_estimate needs a fixed-step method, got {adaptive.name!r}, which controls its error by rtol and atol")
    if len(nodes) % 2 == 0:
        raise ValueError(f"steps must be even for error_estimate, which solves again with half of them, got {len(nodes) - 1}")
    for jump in settings.jumps:
        nearest = float(nodes[::2][np.abs(nodes[::2] - jump).argmin()])
        if abs(nearest - jump) > KEPT_INSIDE:
            raise ValueError(
                "guidance.interval must begin and end where every second step does for error_estimate, which does not see what a step costs"
                f" that is guided in part, got {jump!r}, and {nearest!r} nearest to it; choose another interval, steps or a grid of times"
            )


@torch.no_grad()
def _discretisation_error(fine: Integral, coarse: Integral, density: Prior | None, settings: Settings) -> Tensor:
    """|log p by all steps - log p by half of them| / (2^order - 1), Richardson's estimate of the former's error."""
    assert settings.table is not None
    one, other = (log_prior(density, solve.x, settings.path) + solve.control for solve in (fine, coarse))
    return (one - other).abs() / (2.0 ** settings.table.order() - 1.0)


def _warn_if_large(error: Tensor, x1: Tensor) -> None:
    size = math.prod(x1.shape[1:])
    bits = float(error.mean()) / (size * math.log(2.0)) if error.numel() and size else 0.0
    if bits > LARGE_ERROR:
        warnings.warn(f"the finite number of steps costs about {bits:.2g} bits a dimension; take more steps", stacklevel=3)


def sample_with_log_prob(
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
    rtol: float | None = None,
    atol: float | None = None,
    max_steps: int | None = None,
    per_sample: PerSample = False,
    dtype: torch.dtype | None = None,
    probes: int = 1,
    kind: str = "auto",
    mode: str = "auto",
    memory_budget: int | None = None,
    replicates: int = 1,
    prior: Prior | Distribution | None = None,
    seed: Whole | None = None,
    step: Whole = 0,
    sample_ids: Whole | None = None,
    create_graph: bool = False,
    on_nonfinite: str = "raise",
    progress: bool = False,
    backend: str | None = None,
) -> SampleWithLogProb:
    """Samples and their log-densities in one pass: from noise [B, ...] at t0 to data at t1 (equations 1 and 31).

    Arguments and errors are those of :func:`fm_fast.sample` and :func:`log_likelihood`; ``prior`` is the density that ``noise`` was drawn
    from.

    Naive equivalent: Euler steps as in :func:`fm_fast.sample` with ``integral += fm_fast.divergence(model, x, t).div * h`` and
    ``logp = Normal(0, 1).log_prob(noise).flatten(1).sum(1) - integral``.
    """
    _checks.state("noise", noise)
    settings = make_settings(
        noise, path=path, objective=objective, method=method, steps=steps, grid=grid, t0=t0, t1=t1, save=None, rtol=rtol, atol=atol,
        max_steps=max_steps, per_sample=per_sample, dtype=dtype, grad="none", backend=backend, reverse=False, guidance=guidance,
    )  # fmt: skip
    task = make_task(
        model, noise, settings, cond=cond, guidance=guidance, kind=kind, probes=probes, replicates=replicates, seed=seed, step=step,
        sample_ids=sample_ids, mode=mode, memory_budget=memory_budget, create_graph=create_graph, progress=progress,
        on_nonfinite=on_nonfinite,
    )  # fmt: skip
    warn_unless_recorded(create_graph, "noise", noise, "create_graph=True")
    with torch.set_grad_enabled(create_graph):
        if prior is None:
            warn_of_another_start(settings.path, float(settings.nodes[0]))
            warn_if_not_of_the_prior(noise, settings.path, float(settings.nodes[0]))
        before = log_prior(as_prior(prior), noise.to(reference.accumulation_dtype(noise)), settings.path)
    integral = integrate(task, noise)
    with torch.set_grad_enabled(create_graph):
        logp = before - integral.value
    check_finite(integral.x, "samples", settings, on_nonfinite)
    check_finite(logp, "log-densities", settings, on_nonfinite)
    return SampleWithLogProb(integral.x, logp, integral.std_err, integral.nfe, integral.nvjp, integral.nfe_of_each)
