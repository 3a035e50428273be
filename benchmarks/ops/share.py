"""share: what part of a whole training step, sampling run or likelihood each op is, on networks of four sizes.

The whole is the first provider, the others are parts of it or the same without fm_fast. A part is timed by itself, in the rounds in which
the whole is, on tensors of the shapes that it meets there: with its cost in Python, which a profiler's times of kernels leave out, and
with warmer caches than inside the whole. Layers and probes repeat the calls of one recorded run.
"""

import copy
import functools
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fm_fast as fm
from benchmarks import log_prob, timing
from benchmarks.op import Op, Provider, Setting
from benchmarks.ops import adamw_ema, path_loss, sampler
from benchmarks.points import check_close
from benchmarks.workloads import SIZES, Workload, formula_loss, workload
from fm_fast.nn.convolution import Convolution
from fm_fast.nn.norm import GroupNormSiLU
from fm_fast.train.optimiser.adamw_ema import AdamWEMA
from fm_fast.train.optimiser.averaging import fixed_decay

MODES = ("training", "sampling", "likelihood")
RATE, DECAY, NORM, WEIGHT_DECAY = 1e-3, 0.999, 1.0, 0.01
METHOD, LIKELIHOOD_STEPS, CHECKED_STEPS = "midpoint", 2, 2
# Of a solve: so many that a call costs little beside them, and on images no more than a benchmark has time for.
SAMPLING_STEPS = {"MLP, 2-D": 20, "MLP, robotics": 20, "U-Net, digits": 3, "U-Net, 32x32": 3}
TOLERANCE = 2e-5
WARM_UP_SECONDS, CALL_MS = 0.1, 5.0


@dataclass(frozen=True)
class Part:
    """A provider at work, and its check, which raises AssertionError."""

    step: Callable[[], Any]
    check: Callable[[], None]

    def __call__(self) -> Any:
        return self.step()


Build = Callable[[Workload, Setting], Part]


def inputs(setting: Setting) -> Workload:
    if setting.dtype != torch.float32:
        sys.exit(f"--dtype must be float32 for op share, got {str(setting.dtype).removeprefix('torch.')}")
    return workload(setting.shape)


def providers(setting: Setting) -> list[Provider]:
    builds = {"training": _training, "sampling": _sampling, "likelihood": _likelihood}[setting.mode](len(setting.shape) == 4)
    return [Provider(name, build) for name, build in builds.items()]


# Training


def _training(normalised: bool) -> dict[str, Build]:
    parts: dict[str, Build] = {
        "fm_fast whole step": functools.partial(_training_step, fused=True),
        "fm_fast path_sample, path_loss": functools.partial(_loss, name="fm_fast"),
        "fm_fast adamw_ema": functools.partial(_optimiser, name="fm_fast"),
        "fm_fast group_norm_silu": functools.partial(_norms, fused=True),
        "plain whole step": functools.partial(_training_step, fused=False),
        "plain loss": functools.partial(_loss, name="naive eager"),
        "plain clip, AdamW, EMA": functools.partial(_optimiser, name="clip, fused AdamW, foreach EMA"),
        "plain norm, SiLU": functools.partial(_norms, fused=False),
    }
    return {name: build for name, build in parts.items() if normalised or "norm" not in name}


def _with_layers(network: nn.Module, fused: bool) -> nn.Module:
    """A copy whose normalisations and convolutions are ours or plain."""
    network = copy.deepcopy(network)
    for layer in network.modules():
        if isinstance(layer, GroupNormSiLU | Convolution):
            layer.fused = fused
    return network


def _layers(network: nn.Module) -> list[GroupNormSiLU]:
    return [layer for layer in network.modules() if isinstance(layer, GroupNormSiLU)]


def _training_step(given: Workload, setting: Setting, fused: bool) -> Part:
    network = _with_layers(given.network, fused)
    loss_of, update = (_our_loss, _our_update) if fused else (_plain_loss, _plain_update)
    finish, steps = update(network), itertools.count()

    def step() -> None:
        loss_of(network, given.x1, next(steps)).backward()
        finish()

    return Part(step, lambda: _check_loss(given, network, fused))


def _our_loss(network: nn.Module, x1: Tensor, step: int) -> Tensor:
    return fm.flow_matching_loss(network, x1, seed=0, step=step)


def _plain_loss(network: nn.Module, x1: Tensor, step: int) -> Tensor:
    x0, t = torch.randn_like(x1), torch.rand(len(x1))
    return formula_loss(network, x1, x0, t)


def _our_update(network: nn.Module) -> Callable[[], None]:
    optimiser = AdamWEMA(network.parameters(), RATE, weight_decay=WEIGHT_DECAY, max_norm=NORM, averages=[fixed_decay(DECAY)])

    def update() -> None:
        optimiser.step()
        optimiser.zero_grad()

    return update


def _plain_update(network: nn.Module) -> Callable[[], None]:
    parameters = list(network.parameters())
    values = [p.detach() for p in parameters]
    averages = [x.clone() for x in values]
    optimiser = torch.optim.AdamW(parameters, RATE, weight_decay=WEIGHT_DECAY, fused=True)

    def update() -> None:
        nn.utils.clip_grad_norm_(parameters, NORM)
        optimiser.step()
        optimiser.zero_grad()
        torch._foreach_lerp_(averages, values, 1.0 - DECAY)

    return update


@torch.no_grad()
def _check_loss(given: Workload, network: nn.Module, ours: bool) -> None:
    """Before the first step, at given noise and times, against float64 and plain layers."""
    t = fm.noise((len(given.x1),), seed=0, step=0, stream="t")
    loss = fm.flow_matching_loss(network, given.x1, x0=given.x0, t=t) if ours else formula_loss(network, given.x1, given.x0, t)
    plain = _with_layers(given.network, False).double()
    check_close("the loss", loss, formula_loss(plain, given.x1.double(), given.x0.double(), t.double()), TOLERANCE)


def _other(op: Op, given: Any, setting: Setting, name: str) -> Part:
    """A provider of another op, with that op's check."""
    provider = next(provider for provider in op.providers(setting) if provider.name.startswith(name))
    step = provider.build(given, setting)
    return Part(step, lambda: op.check(given, setting, step))


def _loss(given: Workload, setting: Setting, name: str) -> Part:
    return _other(
        path_loss.OP, path_loss.Inputs(given.x1, None, given.x0.clone().requires_grad_()), replace(setting, mode="x0 drawn"), name
    )


def _optimiser(given: Workload, setting: Setting, name: str) -> Part:
    weights = [p.detach() for p in given.network.parameters()]
    gradients = [1e-2 * torch.randn_like(p) for p in weights]
    return _other(adamw_ema.OP, adamw_ema.Inputs(weights, gradients), replace(setting, mode="1 average"), name)


@dataclass(frozen=True)
class Call:
    """A layer with what it was given in a run; all that has a gradient there is a leaf here."""

    layer: nn.Module
    x: Tensor
    others: Mapping[str, Tensor | None]
    grad_y: Tensor

    def __call__(self) -> tuple[Tensor, ...]:
        """The result and the gradients."""
        leaves = [self.x, *(value for value in self.others.values() if value is not None), *self.layer.parameters()]
        y = self.layer(self.x, **self.others)
        return y.detach(), *torch.autograd.grad(y, leaves, self.grad_y)


def _norms(given: Workload, setting: Setting, fused: bool) -> Part:
    """Forward and backward of every normalisation of the network."""
    calls = _recorded_layers(_with_layers(given.network, fused), given)
    return Part(lambda: [call() for call in calls], lambda: _check_layers(calls))


def _recorded_layers(network: nn.Module, given: Workload) -> list[Call]:
    calls: list[Call] = []

    def record(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> None:
        others = {name: _leaf(value) for name, value in kwargs.items() if name != "key"}
        calls.append(Call(layer, _leaf(args[0]), others, torch.randn_like(y)))

    handles = [layer.register_forward_hook(record, with_kwargs=True) for layer in _layers(network)]
    with torch.no_grad():
        network(given.x1, torch.full((len(given.x1),), 0.5))
    for handle in handles:
        handle.remove()
    return calls


def _leaf(x: Any) -> Any:
    return x.detach().clone().requires_grad_() if isinstance(x, Tensor) else x


def _check_layers(calls: Sequence[Call]) -> None:
    """Each result and gradient against plain layers in float64."""
    for call in calls:
        others = {name: None if value is None else _leaf(value.double()) for name, value in call.others.items()}
        exact = Call(_with_layers(nn.Sequential(call.layer), False).double()[0], _leaf(call.x.double()), others, call.grad_y.double())  # type: ignore[index]
        for found, wanted in zip(call(), exact(), strict=True):
            check_close("a normalisation", found, wanted, TOLERANCE)


# Sampling


def _sampling(normalised: bool) -> dict[str, Build]:
    solves = {"fm_fast": lambda model, x0, steps: fm.sample(model, x0, method=METHOD, steps=steps).x, "plain": sampler.NAIVE[METHOD]}
    wholes: dict[str, Build] = {f"{name} whole solve": functools.partial(_solve, solve=solve) for name, solve in solves.items()}
    parts: dict[str, Build] = {f"{name} solver": functools.partial(_solver, solve=solve) for name, solve in solves.items()}
    return {name: builds[name] for kind in solves for builds in (wholes, parts) for name in builds if name.startswith(kind)}


def _solve(given: Workload, setting: Setting, solve: sampler.Solve) -> Part:
    network = _with_layers(given.network, solve is not sampler.NAIVE[METHOD])
    wide = _with_layers(given.network, False).double()

    def check() -> None:
        with torch.no_grad():
            exact = sampler.NAIVE[METHOD](lambda x, t: wide(x, t.double()), given.x0.double(), CHECKED_STEPS)
            check_close("x", solve(network, given.x0, CHECKED_STEPS), exact, TOLERANCE)

    return Part(lambda: solve(network, given.x0, SAMPLING_STEPS[setting.size]), check)


def _solver(given: Workload, setting: Setting, solve: sampler.Solve) -> Part:
    """The same solve of a model that hands out tensors which were made before; checked as the benchmark of the solvers is."""
    problem, mode = sampler.inputs(setting), replace(setting, mode=METHOD)
    check = functools.partial(sampler.check, problem, mode, sampler.Solver(solve, problem, sampler.EVALUATIONS[METHOD]))
    return Part(lambda: solve(problem.model, problem.noise, SAMPLING_STEPS[setting.size]), check)


# Likelihood


def _likelihood(normalised: bool) -> dict[str, Build]:
    return {
        "fm_fast whole likelihood": functools.partial(_log_prob, log_p=log_prob.ours(METHOD)),
        "fm_fast probe, divergence_step": _probes,
        "plain whole likelihood": functools.partial(_log_prob, log_p=log_prob.hand_loop(METHOD)),
    }


def _problem(given: Workload, fused: bool = True) -> log_prob.Problem:
    return log_prob.Problem(_with_layers(given.network, fused), given.x1, METHOD, LIKELIHOOD_STEPS, 1)


def _log_prob(given: Workload, setting: Setting, log_p: log_prob.LogProb) -> Part:
    evaluator = log_prob.Evaluator(log_p, _problem(given))
    return Part(evaluator, lambda: log_prob.check_exactly(evaluator, TOLERANCE))


class Recorder(TorchDispatchMode):
    """Keeps the calls of ops of fm_fast by their names."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.names, self.calls = names, list[tuple[Any, tuple[Any, ...]]]()

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if op.name().removeprefix("fm_fast::") in self.names:
            self.calls.append((op, args))
        return op(*args, **(kwargs or {}))


def _probes(given: Workload, setting: Setting) -> Part:
    with Recorder("probe", "divergence_step") as recorder:
        log_prob.Evaluator(log_prob.ours(METHOD), _problem(given))()

    def step() -> None:
        for op, args in recorder.calls:
            op(*args)

    return Part(step, lambda: _check_probes(recorder.calls))


def _check_probes(calls: Sequence[tuple[Any, tuple[Any, ...]]]) -> None:
    """Random signs, and each time their products with the vectors that the network gave."""
    names = [op.name() for op, _ in calls]
    assert names == ["fm_fast::probe", "fm_fast::divergence_step"] * (len(calls) // 2) != [], f"the calls are {names}"
    for (draw, drawn), (add, added) in zip(calls[::2], calls[1::2], strict=True):
        draw(*drawn)
        add(*added)
        z, dots, products = drawn[0], added[1], added[2]
        assert bool((z.abs() == 1.0).all()), "a probe is not of signs"
        check_close("a product", dots, (z.double() * products.double()).flatten(2).sum(2), TOLERANCE)


# Timing


def check(given: Workload, setting: Setting, step: Part) -> None:
    """What each part is checked against, on its own."""
    step.check()


def observe(steps: Mapping[str, Part], rounds: int, now: timing.Clock) -> dict[str, list[float]]:
    """Milliseconds of a step, each averaged over as many calls as fill a few milliseconds."""
    timing.warm_up(steps, WARM_UP_SECONDS)
    repeats = {id(step): max(1, round(CALL_MS / timing.host_clock(1)(step))) for step in steps.values()}
    return timing.interleaved(steps, rounds, lambda step: timing.host_clock(repeats[id(step)], now)(step))


OP = Op(
    "share", SIZES, MODES, inputs, providers, check, devices=("cpu",), rounds=5, observe=observe, relation="share",
)  # fmt: skip
