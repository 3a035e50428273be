"""divergence: the velocity of a network and its divergence by Rademacher probes, one forward pass and a product a probe.

fm_fast chooses between products one by one (loop) and all at once (batched) by the memory that its graph takes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import fm_fast as fm
from benchmarks.op import Op, Provider, Setting
from benchmarks.points import check_close
from benchmarks.workloads import Perceptron, woken
from fm_fast.nn import UNet, UNetConfig

SIZES = {"mlp 2": (1024, 2), "mlp 64": (256, 64), "unet": (8, 3, 16, 16)}
MODES = ("1 probe", "4 probes", "16 probes")
TIME = 0.4
LAYERS = 2  # of the perceptron, hidden
TOLERANCE = 1e-5

Divergence = Callable[[nn.Module, Tensor, int], Tensor]


@dataclass(frozen=True)
class Inputs:
    """A network, its input and the number of probes."""

    model: nn.Module
    x: Tensor
    probes: int


@dataclass(frozen=True)
class Evaluation:
    """A provider at work."""

    divergence: Divergence
    given: Inputs

    def __call__(self) -> Tensor:
        return self.divergence(self.given.model, self.given.x, self.given.probes)


class _Elementwise(nn.Module):
    """Every element by itself: all sign probes give its divergence exactly."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x) + 0.1 * x


def _network(shape: tuple[int, ...]) -> nn.Module:
    if len(shape) == 2:
        return Perceptron(shape[1:], LAYERS)
    return woken(UNet(UNetConfig(shape[2], shape[1], 0, 16, (1, 2), 1, (8,), 16, 8)))


def inputs(setting: Setting) -> Inputs:
    return Inputs(_network(setting.shape), torch.randn(setting.shape), int(setting.mode.split()[0]))


def _ours(mode: str) -> Divergence:
    return lambda model, x, probes: fm.divergence(model, x, TIME, probes=probes, kind="rademacher", mode=mode, seed=0).div


def _hand_loop(model: nn.Module, x: Tensor, probes: int) -> Tensor:
    x = x.detach().requires_grad_()
    v = model(x, torch.full((len(x),), TIME))
    total = torch.zeros(len(x))
    for _ in range(probes):
        z = torch.randint_like(x, 2) * 2.0 - 1.0
        total += (torch.autograd.grad(v, x, z, retain_graph=True)[0] * z).flatten(1).sum(1)
    return total / probes


def _hand_batched(model: nn.Module, x: Tensor, probes: int) -> Tensor:
    x = x.detach().requires_grad_()
    v = model(x, torch.full((len(x),), TIME))
    z = torch.randint(0, 2, (probes, *x.shape)) * 2.0 - 1.0
    products = torch.autograd.grad(v, x, z, is_grads_batched=True)[0]
    return (products * z).flatten(2).sum(2).mean(0)


@torch.no_grad()
def _forward(model: nn.Module, x: Tensor, probes: int) -> Tensor:
    return model(x, torch.full((len(x),), TIME))


def providers(setting: Setting) -> list[Provider]:
    found = {"fm_fast": "auto", "fm_fast loop": "loop", "fm_fast batched": "batched"}
    evaluations = {name: _ours(mode) for name, mode in found.items()} | {"hand loop": _hand_loop, "is_grads_batched": _hand_batched}
    gated = [Provider(name, _build(divergence)) for name, divergence in evaluations.items()]
    return [*gated, Provider("forward pass alone", _build(_forward), gated=False)]


def _build(divergence: Divergence) -> Callable[[Inputs, Setting], Evaluation]:
    return lambda given, setting: Evaluation(divergence, given)


def check(given: Inputs, setting: Setting, step: Evaluation) -> None:
    """A network of which all probes know the exact divergence."""
    found = step.divergence(_Elementwise(), given.x, given.probes)
    wanted = (1.1 - torch.tanh(given.x.double()).square()).flatten(1).sum(1)
    check_close("the divergence", found, wanted, TOLERANCE)


OP = Op("divergence", SIZES, MODES, inputs, providers, check, devices=("cpu",), rounds=30)
