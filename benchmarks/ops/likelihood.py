"""likelihood: log p of images under a U-Net, a fixed number of steps and of probes.

The network has random weights, the last layer's included: what it costs does not depend on them. Its parameters require gradients, as
those of a network that was just trained do.
"""

import copy
import functools
from collections.abc import Callable

import torch
from torch import nn

from benchmarks import log_prob
from benchmarks.log_prob import Evaluator, LogProb, Problem
from benchmarks.op import Op, Provider, Setting
from benchmarks.workloads import woken
from fm_fast.nn import UNet, UNetConfig

SIZES = {"grey": (8, 1, 16, 16), "colour": (8, 3, 16, 16)}
MODES = ("midpoint, 1 probe", "euler, 1 probe", "midpoint, 4 probes", "midpoint, 16 probes")
STEPS = {1: 10, 4: 4, 16: 2}
CHECKED_STEPS, CHECKED_SAMPLES, DRAWS = 2, 2, 32
TOLERANCE = 1e-5


def _network(channels: int) -> UNet:
    config = UNetConfig(16, channels, 0, channels=24, multipliers=(1, 2), blocks=1, attention_sizes=(8,), head_channels=24, groups=8)
    return woken(UNet(config), gain=1.0)


def inputs(setting: Setting) -> Problem:
    torch.manual_seed(0)
    method, count = setting.mode.split(", ")
    probes = int(count.split()[0])
    return Problem(_network(setting.shape[1]), torch.randn(setting.shape), method, STEPS[probes], probes)


def _frozen(log_p: LogProb) -> LogProb:
    """The same on a network whose parameters do not require gradients: advice that a careful user follows."""

    @functools.cache
    def without_gradients(model: nn.Module) -> nn.Module:
        return copy.deepcopy(model).requires_grad_(False)

    return lambda model, *rest: log_p(without_gradients(model) if isinstance(model, nn.Module) else model, *rest)


def providers(setting: Setting) -> list[Provider]:
    method = setting.mode.split(", ")[0]
    found = {"fm_fast": log_prob.ours(method), **log_prob.peers_and_hand_loop(method)}
    if "flow_matching" in found:
        found["flow_matching, frozen"] = _frozen(found["flow_matching"])
    found["hand loop, frozen"] = _frozen(found["hand loop"])
    return [Provider(name, _build(log_p)) for name, log_p in found.items()]


def _build(log_p: LogProb) -> Callable[[Problem, Setting], Evaluator]:
    return lambda problem, setting: Evaluator(log_p, problem)


def check(problem: Problem, setting: Setting, step: Evaluator) -> None:
    """Exactly where probes do not matter; on the network, the mean over draws."""
    log_prob.check_exactly(step, TOLERANCE)
    log_prob.check_mean(step, problem.model, _exact(problem), _corner(problem), CHECKED_STEPS, DRAWS)


def _corner(problem: Problem) -> torch.Tensor:
    """A part of few images: small enough for its exact divergence, and the network takes any size."""
    return problem.x1[:CHECKED_SAMPLES, :, :8, :8]


@functools.cache
def _exact(problem: Problem) -> torch.Tensor:
    network = copy.deepcopy(problem.model).double()
    return log_prob.exact_log_prob(network, _corner(problem), problem.method, CHECKED_STEPS)


OP = Op("likelihood", SIZES, MODES, inputs, providers, check, devices=("cpu",), peers=log_prob.PEERS, rounds=15)
