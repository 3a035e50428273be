"""Providers of log-densities along the flow, and their reference: the same steps in float64 with the exact divergence."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

import fm_fast as fm
from benchmarks import peers
from benchmarks.points import off_by, over

Model = Callable[..., Tensor]
# (model, data, steps, probes) -> log p [B]; every call draws new probes.
LogProb = Callable[[Model, Tensor, int, int], Tensor]

PEERS = ("flow_matching",)
SPREAD = 6.0  # standard errors by which a correct mean of draws may be off


@dataclass(frozen=True)
class Problem:
    """Data and the field whose density of them is wanted."""

    model: Model
    x1: Tensor
    method: str
    steps: int
    probes: int


@dataclass(frozen=True)
class Evaluator:
    """A provider at work; calling it computes log p [B] of the problem's data once."""

    log_prob: LogProb
    problem: Problem

    def __call__(self) -> Tensor:
        return self.log_prob(self.problem.model, self.problem.x1, self.problem.steps, self.problem.probes)


def log_normal(x: Tensor) -> Tensor:
    """log N(x; 0, 1), [B]."""
    return -0.5 * (x.square().flatten(1).sum(1) + x[0].numel() * math.log(2.0 * math.pi))


# Providers


def ours(method: str, kind: str = "rademacher") -> LogProb:
    def log_prob(model: Model, x1: Tensor, steps: int, probes: int) -> Tensor:
        return fm.log_likelihood(model, x1, method=method, steps=steps, probes=probes, kind=kind).logp

    return log_prob


def flow_matching(method: str) -> LogProb:
    """The mean over as many calls as there are probes: a call has one."""
    from flow_matching.solver import ODESolver

    def log_prob(model: Model, x1: Tensor, steps: int, probes: int) -> Tensor:
        solver = ODESolver(velocity_model=lambda x, t: model(x, t.expand(len(x))))
        draws = [solver.compute_likelihood(x1, log_normal, step_size=1.0 / steps, method=method)[1] for _ in range(probes)]
        return torch.stack(draws).mean(0)

    return log_prob


def hand_loop(method: str) -> LogProb:
    """The naive loop at its best: a direct vector-Jacobian product a probe at every evaluation, probes drawn once."""

    def log_prob(model: Model, x1: Tensor, steps: int, probes: int) -> Tensor:
        z = [torch.randint_like(x1, 2) * 2.0 - 1.0 for _ in range(probes)]

        def derivatives(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
            x = x.detach().requires_grad_()
            v = model(x, torch.full((len(x),), t, dtype=x.dtype))
            products = (torch.autograd.grad(v, x, probe, retain_graph=True)[0] * probe for probe in z)
            return v.detach(), sum((product.flatten(1).sum(1) for product in products), torch.zeros(len(x))) / probes

        x, integral = integrate(derivatives, x1, method, steps)
        return log_normal(x) - integral

    return log_prob


def peers_and_hand_loop(method: str) -> Mapping[str, LogProb]:
    found = {"flow_matching": flow_matching(method)} if peers.available("flow_matching") else {}
    return {**found, "hand loop": hand_loop(method)}


# Reference


def integrate(derivatives: Callable[[Tensor, float], tuple[Tensor, Tensor]], x1: Tensor, method: str, steps: int) -> tuple[Tensor, Tensor]:
    """x at t = 0 and the integral of the divergence from 0 to 1; ``derivatives`` gives (v, div v)."""
    x, integral, h = x1, torch.zeros(len(x1), dtype=x1.dtype), 1.0 / steps
    for n in range(steps, 0, -1):
        v, growth = derivatives(x, n * h)
        if method == "midpoint":
            v, growth = derivatives(x - 0.5 * h * v, (n - 0.5) * h)
        x, integral = x - h * v, integral + h * growth
    return x, integral


def exact_log_prob(model: Model, x1: Tensor, method: str, steps: int) -> Tensor:
    """log p of the discrete trajectory by the trace of the Jacobian, in float64; ``model`` takes float64."""

    def derivatives(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        v = model(x, torch.full((len(x),), t, dtype=x.dtype))
        diagonal = [torch.autograd.grad(v.flatten(1)[:, i].sum(), x, retain_graph=True)[0].flatten(1)[:, i] for i in range(x[0].numel())]
        return v.detach(), torch.stack(diagonal).sum(0)

    x, integral = integrate(derivatives, x1.double(), method, steps)
    return log_normal(x) - integral


# Checks


def check_exactly(evaluator: Evaluator, tolerance: float) -> None:
    """A field that scales every element by itself: all sign probes give its divergence exactly."""
    problem = evaluator.problem
    rates = torch.linspace(-0.5, 1.0, problem.x1[0].numel(), dtype=torch.float64).reshape(problem.x1.shape[1:])

    def field(x: Tensor, t: Tensor) -> Tensor:
        return (1.0 + over(t, x).to(x.dtype)) * rates.to(x.dtype) * x

    def derivatives(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        return (1.0 + t) * rates * x, (1.0 + t) * rates.sum().expand(len(x))

    x, integral = integrate(derivatives, problem.x1.double(), problem.method, 5)
    error = _largest_error(evaluator.log_prob(field, problem.x1, 5, problem.probes), log_normal(x) - integral)
    assert error <= tolerance, off_by("log p of a linear field", error, tolerance)


def _largest_error(found: Tensor, wanted: Tensor) -> float:
    """Of any element, relative to the largest."""
    return float((found.double() - wanted).abs().max() / wanted.abs().max())


def check_mean(evaluator: Evaluator, model: Model, wanted: Tensor, x1: Tensor, steps: int, draws: int) -> None:
    """The mean over draws, which ``x1`` [samples * draws, ...] holds side by side, against ``wanted`` [samples]."""
    found = evaluator.log_prob(model, x1.repeat_interleave(draws, 0), steps, evaluator.problem.probes).detach().double().reshape(-1, draws)
    error = (found.mean(1) - wanted).abs()
    allowed = SPREAD * found.std(1) / draws**0.5 + 1e-5 * wanted.abs()
    worst = float((error / allowed).max()) * SPREAD
    assert worst <= SPREAD, f"the mean of log p is off by {worst:.1f} standard errors, more than {SPREAD:.0f}"
