"""sampler: what a solver step costs beyond the model's calls, on the optimal-transport path from t = 0 to t = 1.

The model returns tensors that were made before, so that almost nothing is left but the solver. Of each provider a solve of N and one of
2 N steps are timed; their difference, divided by N, is a step without the cost of a call; the model's bare calls are taken off it. On a GPU
a solve is timed from the call until the device has finished. The part "call" is a whole solve of a few steps, as a policy takes them, where
what begins and ends a solve weighs most.
"""

import functools
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

import fm_fast as fm
from benchmarks import peers, timing
from benchmarks.costs import Costs, of_step
from benchmarks.op import Op, Provider, Setting, bytes_of_shape
from benchmarks.points import AsModule, check_close, over

Model = Callable[[Tensor, Tensor], Tensor]
# (model, noise, steps) -> x at t = 1
Solve = Callable[[Model, Tensor, int], Tensor]

SIZES = {"tiny": (1, 2), "small": (64, 2), "CIFAR": (128, 3, 32, 32), "large": (64, 3, 64, 64)}
EVALUATIONS = {"euler": 1, "midpoint": 2, "rk4": 4}
PASSES = {"euler": 3, "midpoint": 6, "rk4": 15}
LARGE = 1 << 16
STEPS, LARGE_STEPS, FEW_STEPS, CHECKED_STEPS, REPEATS = 100, 20, 5, 10, 3
TOLERANCE = 2e-6


@dataclass(frozen=True)
class Inputs:
    """Noise, and a model that hands out one of a few tensors after the other."""

    noise: Tensor
    model: Model


@dataclass(frozen=True)
class Solver:
    """A provider at work; calling it solves once. whole: what counts is that solve, of few steps, and not a step of a long one."""

    solve: Solve
    given: Inputs
    evaluations: int
    whole: bool = False

    @property
    def steps(self) -> int:
        if self.whole:
            return FEW_STEPS
        return LARGE_STEPS if self.given.noise.numel() >= LARGE else STEPS

    def __call__(self) -> Tensor:
        return self.solve(self.given.model, self.given.noise, self.steps)


def inputs(setting: Setting) -> Inputs:
    # More outputs than a step reads, or a solver that keeps them would be handed the same memory twice.
    noise, *outputs = (torch.randn(setting.shape, dtype=setting.dtype, device=setting.device) for _ in range(7))
    handed_out = itertools.cycle(outputs)
    return Inputs(noise, lambda x, t: next(handed_out))


# Providers


def _ours(method: str) -> Solve:
    return lambda model, noise, steps: fm.sample(model, noise, method=method, steps=steps).x


def _in_a_graph(method: str) -> Solve:
    """The whole solve recorded once and replayed: what a sampler of fixed shape can do on a GPU."""

    @functools.cache
    def recorded(model: Model, noise: Tensor, steps: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        fm.sample(model, noise, method=method, steps=steps)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            x = fm.sample(model, noise, method=method, steps=steps).x
        return graph, x

    def solve(model: Model, noise: Tensor, steps: int) -> Tensor:
        graph, x = recorded(model, noise, steps)
        graph.replay()
        return x

    return solve


def _full(x: Tensor, t: float) -> Tensor:
    return torch.full((len(x),), t, device=x.device)


@torch.no_grad()
def _naive_euler(model: Model, noise: Tensor, steps: int) -> Tensor:
    x, h = noise, 1.0 / steps
    for n in range(steps):
        x = x + h * model(x, _full(x, n * h))
    return x


@torch.no_grad()
def _naive_midpoint(model: Model, noise: Tensor, steps: int) -> Tensor:
    x, h = noise, 1.0 / steps
    for n in range(steps):
        middle = x + 0.5 * h * model(x, _full(x, n * h))
        x = x + h * model(middle, _full(x, (n + 0.5) * h))
    return x


@torch.no_grad()
def _naive_rk4(model: Model, noise: Tensor, steps: int) -> Tensor:
    x, h = noise, 1.0 / steps
    for n in range(steps):
        begin, middle, end = (_full(x, (n + part) * h) for part in (0.0, 0.5, 1.0))
        k1 = model(x, begin)
        k2 = model(x + 0.5 * h * k1, middle)
        k3 = model(x + 0.5 * h * k2, middle)
        x = x + h / 6.0 * (k1 + 2.0 * k2 + 2.0 * k3 + model(x + h * k3, end))
    return x


@torch.no_grad()
def _in_place_euler(model: Model, noise: Tensor, steps: int) -> Tensor:
    x, h = noise.clone(), 1.0 / steps
    for t in _times(x, steps, 1):
        x.add_(model(x, t), alpha=h)
    return x


@torch.no_grad()
def _in_place_midpoint(model: Model, noise: Tensor, steps: int) -> Tensor:
    x, middle, h = noise.clone(), torch.empty_like(noise), 1.0 / steps
    times = iter(_times(x, steps, 2))
    for t in times:
        torch.add(x, model(x, t), alpha=0.5 * h, out=middle)
        x.add_(model(middle, next(times)), alpha=h)
    return x


def _times(x: Tensor, steps: int, parts: int) -> tuple[Tensor, ...]:
    """Views [B] of the times of all evaluations, ``parts`` a step."""
    times = torch.arange(steps * parts, dtype=torch.float64, device=x.device) / (steps * parts)
    return times.to(x.dtype).unsqueeze(1).expand(-1, len(x)).unbind(0)


def _torchdiffeq(method: str) -> dict[str, Solve]:
    return {"torchdiffeq, step_size": _odeint(method, False), "torchdiffeq, time grid": _odeint(method, True)}


def _odeint(method: str, as_grid: bool) -> Solve:
    from torchdiffeq import odeint

    @torch.no_grad()
    def solve(model: Model, noise: Tensor, steps: int) -> Tensor:
        times = torch.linspace(0.0, 1.0, steps + 1 if as_grid else 2, device=noise.device)
        options = {} if as_grid else {"step_size": 1.0 / steps}
        return odeint(lambda t, x: model(x, t), noise, times, method=method, options=options)[-1]

    return solve


def _flow_matching(method: str) -> dict[str, Solve]:
    return {"flow_matching, step_size": _ode_solver(method, False), "flow_matching, time grid": _ode_solver(method, True)}


def _ode_solver(method: str, as_grid: bool) -> Solve:
    from flow_matching.solver import ODESolver

    def solve(model: Model, noise: Tensor, steps: int) -> Tensor:
        solver = ODESolver(velocity_model=model)
        if as_grid:
            return solver.sample(noise, step_size=None, method=method, time_grid=torch.linspace(0.0, 1.0, steps + 1, device=noise.device))
        return solver.sample(noise, step_size=1.0 / steps, method=method)

    return solve


def _torchebm(method: str) -> dict[str, Solve]:
    """Its Euler steps are those of an Euler-Maruyama method without noise."""
    from torchebm.samplers import FlowSampler

    integrator = {"euler": "euler_maruyama"}.get(method, method)

    @torch.no_grad()
    def solve(model: Model, noise: Tensor, steps: int) -> Tensor:
        sampler = FlowSampler(AsModule(model), integrator=integrator, dtype=noise.dtype, device=noise.device)
        return sampler.sample(noise, n_steps=steps)

    return {"torchebm": solve}


def _copies(passes: int) -> Solve:
    """As many memory passes a step as the method's formula needs, by plain copies: a bound that computes nothing."""

    @functools.cache
    def buffers(size: int, device: torch.device) -> Tensor:
        return torch.zeros(2, passes * size // 2, device=device)

    def solve(model: Model, noise: Tensor, steps: int) -> Tensor:
        source, target = buffers(noise.numel(), noise.device)
        for _ in range(steps):
            target.copy_(source)
        return noise

    return solve


NAIVE = {"euler": _naive_euler, "midpoint": _naive_midpoint, "rk4": _naive_rk4}
IN_PLACE = {"euler": _in_place_euler, "midpoint": _in_place_midpoint}
PEERS = {"torchdiffeq": _torchdiffeq, "flow_matching": _flow_matching, "torchebm": _torchebm}


def providers(setting: Setting) -> list[Provider]:
    method = setting.mode
    solves = {"fm_fast": _ours(method)}
    if setting.device.type == "cuda":
        solves["fm_fast, one CUDA graph"] = _in_a_graph(method)
    solves["hand loop, naive"] = NAIVE[method]
    if method in IN_PLACE:
        solves["hand loop, in place"] = IN_PLACE[method]
    for name in (name for name in PEERS if peers.available(name)):
        solves |= PEERS[name](method)
    found = [Provider(name, _build(solve, EVALUATIONS[method])) for name, solve in solves.items()]
    if torch.Size(setting.shape).numel() >= LARGE:
        found.append(Provider(f"copies, {PASSES[method]} passes", _build(_copies(PASSES[method]), 0), gated=False))
    return found


def _build(solve: Solve, evaluations: int) -> Callable[[Inputs, Setting], Solver]:
    return lambda given, setting: Solver(solve, given, evaluations, whole=setting.part == "call")


# Correctness


def _linear(x: Tensor, t: Tensor) -> Tensor:
    """A field on which every method of an order gives the same numbers: torchdiffeq's rk4 is the 3/8 rule, ours the classical one."""
    return over(t, x).to(x.dtype) - x


def check(given: Inputs, setting: Setting, step: Solver) -> None:
    """A solve of a linear field against the naive loop in float64."""
    found = step.solve(_linear, given.noise, CHECKED_STEPS)
    wanted = NAIVE[setting.mode](_linear_in_float64, given.noise.double(), CHECKED_STEPS)
    check_close("x", found, wanted, TOLERANCE)


def _linear_in_float64(x: Tensor, t: Tensor) -> Tensor:
    return _linear(x, t.double())


# Timing


def observe(steps: Mapping[str, Solver], rounds: int, now: timing.Clock) -> dict[str, list[float]]:
    """Microseconds a step, or a solve of few, beyond the model's calls."""
    timing.warm_up(steps, 0.2)
    return timing.interleaved(steps, rounds, lambda solver: 1e6 * _overhead(solver, now))


def _overhead(solver: Solver, now: timing.Clock) -> float:
    """Seconds. Each part is the shortest of a few: what an interruption adds to one part would be the whole of a small difference."""
    model, noise, steps = solver.given.model, solver.given.noise, solver.steps

    def shortest(part: Callable[[], object]) -> float:
        return min(timing.seconds(part, now) for _ in range(REPEATS))

    once = shortest(lambda: solver.solve(model, noise, steps))
    calls = shortest(lambda: _bare_calls(model, noise, steps * solver.evaluations))
    if solver.whole:
        return once - calls
    return (shortest(lambda: solver.solve(model, noise, 2 * steps)) - once - calls) / steps


def costs_of_a_step(solver: Solver, device: torch.device) -> Costs:
    """Kernels and traffic as the times are: of a solve of 2 N steps without those of one of N. The peak is that of a solve."""
    model, noise, steps = solver.given.model, solver.given.noise, solver.steps
    if solver.whole:
        return of_step(lambda: solver.solve(model, noise, steps), device)
    once, twice = (of_step(lambda count=count: solver.solve(model, noise, count), device) for count in (steps, 2 * steps))
    return once.of_one_more(twice, steps)


def _bare_calls(model: Model, x: Tensor, count: int) -> None:
    for _ in range(count):
        model(x, x)


OP = Op(
    "sampler", SIZES, tuple(EVALUATIONS), inputs, providers, check, peers=tuple(PEERS), rounds=20, unit="us", observe=observe,
    tensor_bytes=bytes_of_shape, costs=costs_of_a_step, parts=("full", "call"),
)  # fmt: skip
