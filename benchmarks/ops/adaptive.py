"""adaptive: what an adaptive solver costs beyond the model's calls, an evaluation, from t = 0 to t = 1 at tolerances of 1e-5.

The field is one that costs little, x cos(9 t). Of each provider a whole solve is timed; as many bare calls of the model are taken off it.
On a GPU a solve is timed from the call until the device has finished.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

import fm_fast as fm
from benchmarks import peers, timing
from benchmarks.costs import Costs, of_step
from benchmarks.op import Op, Provider, Setting, bytes_of_shape
from benchmarks.points import AsModule, check_close, over
from fm_fast.compat.torchdiffeq import odeint

Model = Callable[[Tensor, Tensor], Tensor]
# (model, noise) -> x at t = 1
Solve = Callable[[Model, Tensor], Tensor]

SIZES = {"tiny": (1, 2), "small": (256, 2), "CIFAR": (128, 3, 32, 32)}
METHODS = ("dopri5", "bosh3")
TOLERANCE = 1e-5
ACCURACY = 1e-3
REPEATS = 3


def _field(x: Tensor, t: Tensor) -> Tensor:
    return x * over(torch.cos(9.0 * t), x).to(x.dtype)


@dataclass(frozen=True)
class Solver:
    """A provider at work; calling it solves once."""

    solve: Solve
    noise: Tensor

    def __call__(self) -> Tensor:
        return self.solve(_field, self.noise)

    def evaluations(self) -> int:
        """Of a solve, which is the same each time."""
        count = 0

        def counted(x: Tensor, t: Tensor) -> Tensor:
            nonlocal count
            count += 1
            return _field(x, t)

        self.solve(counted, self.noise)
        return count


def inputs(setting: Setting) -> Tensor:
    return torch.randn(setting.shape, dtype=setting.dtype, device=setting.device)


# Providers


def _ours(method: str, per_sample: bool = False) -> Solve:
    return lambda model, noise: fm.sample(model, noise, method=method, rtol=TOLERANCE, atol=TOLERANCE, per_sample=per_sample).x


def _odeint(odeint: Callable[..., Tensor], method: str) -> Solve:
    @torch.no_grad()
    def solve(model: Model, noise: Tensor) -> Tensor:
        times = torch.tensor([0.0, 1.0], device=noise.device)
        return odeint(lambda t, x: model(x, t.expand(len(x))), noise, times, method=method, rtol=TOLERANCE, atol=TOLERANCE)[-1]

    return solve


def _torchdiffeq(method: str) -> Solve:
    import torchdiffeq

    return _odeint(torchdiffeq.odeint, method)


def _flow_matching(method: str) -> Solve:
    from flow_matching.solver import ODESolver

    def solve(model: Model, noise: Tensor) -> Tensor:
        solver = ODESolver(velocity_model=lambda x, t: model(x, t.expand(len(x))))
        return solver.sample(noise, step_size=None, method=method, rtol=TOLERANCE, atol=TOLERANCE)

    return solve


def _torchode(method: str) -> Solve:
    """Each sample has steps of its own."""
    import torchode

    @torch.no_grad()
    def solve(model: Model, noise: Tensor) -> Tensor:
        term = torchode.ODETerm(lambda t, y: model(y.view_as(noise), t).flatten(1))
        control = torchode.IntegralController(atol=TOLERANCE, rtol=TOLERANCE, term=term)
        solver = torchode.AutoDiffAdjoint(torchode.Dopri5(term=term), control)
        times = torch.tensor([0.0, 1.0], dtype=noise.dtype, device=noise.device).expand(len(noise), 2)
        return solver.solve(torchode.InitialValueProblem(y0=noise.flatten(1), t_eval=times)).ys[:, -1].view_as(noise)

    return solve


def _torchebm(method: str) -> Solve:
    from torchebm.integrators import Bosh3Integrator, Dopri5Integrator
    from torchebm.samplers import FlowSampler

    integrator = {"dopri5": Dopri5Integrator, "bosh3": Bosh3Integrator}[method]

    @torch.no_grad()
    def solve(model: Model, noise: Tensor) -> Tensor:
        here = {"dtype": noise.dtype, "device": noise.device}
        return FlowSampler(AsModule(model), integrator=integrator(atol=TOLERANCE, rtol=TOLERANCE, **here), **here).sample(noise)

    return solve


PEERS = {"torchdiffeq": _torchdiffeq, "flow_matching": _flow_matching, "torchode": _torchode, "torchebm": _torchebm}
METHODS_OF = {"torchode": ("dopri5",)}  # of a library that has not all of them


def providers(setting: Setting) -> list[Provider]:
    solves = {"fm_fast": _ours(setting.mode), "fm_fast: per_sample": _ours(setting.mode, per_sample=True)}
    solves["fm_fast.compat: odeint"] = _odeint(odeint, setting.mode)
    solves |= {name: PEERS[name](setting.mode) for name in PEERS if _has(name, setting.mode)}
    return [Provider(name, _build(solve)) for name, solve in solves.items()]


def _has(name: str, method: str) -> bool:
    return peers.available(name) and method in METHODS_OF.get(name, METHODS)


def _build(solve: Solve) -> Callable[[Tensor, Setting], Solver]:
    return lambda noise, setting: Solver(solve, noise)


def check(noise: Tensor, setting: Setting, solver: Solver) -> None:
    """Against the closed form in float64, as far as the tolerances go."""
    check_close("x", solver(), math.exp(math.sin(9.0) / 9.0) * noise.double(), ACCURACY)


# Timing


def observe(steps: Mapping[str, Solver], rounds: int, now: timing.Clock) -> dict[str, list[float]]:
    """Microseconds an evaluation beyond the model's calls."""
    evaluations = {solver: solver.evaluations() for solver in steps.values()}
    timing.warm_up(steps, 0.2)
    return timing.interleaved(steps, rounds, lambda solver: 1e6 * _overhead(solver, evaluations[solver], now))


def _overhead(solver: Solver, evaluations: int, now: timing.Clock) -> float:
    """Seconds. Each part is the shortest of a few: what an interruption adds to one part would be the whole of a small difference."""
    parts = solver, lambda: _bare_calls(solver.noise, evaluations)
    whole, calls = (min(timing.seconds(part, now) for _ in range(REPEATS)) for part in parts)
    return (whole - calls) / evaluations


def _bare_calls(x: Tensor, count: int) -> None:
    t = torch.full((len(x),), 0.5, device=x.device)
    for _ in range(count):
        _field(x, t)


def costs_of_an_evaluation(solver: Solver, device: torch.device) -> Costs:
    """Of a solve divided by its evaluations, the model's own kernels among them; the peak is that of a solve."""
    whole, evaluations = of_step(solver, device), solver.evaluations()
    kernels, traffic = (None if value is None else value / evaluations for value in (whole.kernels, whole.traffic))
    return Costs(whole.peak, kernels, traffic)


OP = Op(
    "adaptive", SIZES, METHODS, inputs, providers, check, peers=tuple(PEERS), rounds=20, unit="us", observe=observe,
    tensor_bytes=bytes_of_shape, costs=costs_of_an_evaluation,
)  # fmt: skip
