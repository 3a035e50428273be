"""Networks and data of the sizes that people train: what the ops are parts of."""

import itertools
import math
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fm_fast as fm
from benchmarks.points import over
from fm_fast.nn import UNet, UNetConfig

SIZES = {"MLP, 2-D": (256, 2), "MLP, robotics": (256, 16, 7), "U-Net, digits": (64, 1, 8, 8), "U-Net, 32x32": (16, 3, 32, 32)}
HIDDEN, LAYERS = 256, 3
Network = TypeVar("Network", bound=nn.Module)
_UNETS = {
    8: replace(UNetConfig.digits(), classes=0),  # the demo's
    32: UNetConfig(32, 3, 0, channels=32, multipliers=(1, 2, 2), blocks=1, attention_sizes=(16,), head_channels=32),
}


@dataclass(frozen=True)
class Workload:
    """A network, noise and data of a shape [B, ...]."""

    network: nn.Module
    x0: Tensor
    x1: Tensor


class Perceptron(nn.Module):
    """Hidden layers of one width on the flattened sample and t."""

    def __init__(self, shape: tuple[int, ...], hidden_layers: int = LAYERS) -> None:
        super().__init__()
        size = math.prod(shape)
        widths = (size + 1, *[HIDDEN] * hidden_layers, size)
        layers = [layer for a, b in itertools.pairwise(widths) for layer in (nn.Linear(a, b), nn.SiLU())]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layers(torch.cat([x.flatten(1), t.unsqueeze(1).to(x.dtype)], dim=1)).reshape(x.shape)


def workload(shape: tuple[int, ...]) -> Workload:
    """Of one of SIZES."""
    torch.manual_seed(0)
    network = Perceptron(shape[1:]) if len(shape) < 4 else woken(UNet(_UNETS[shape[-1]]))
    return Workload(network, *(fm.noise(shape, seed=0, step=0, index=index) for index in (0, 1)))


@torch.no_grad()
def woken(network: Network, gain: float = 0.1) -> Network:
    """Weights that hide nothing behind a zero: every second convolution would otherwise start there, and the divergence be zero."""
    for parameter in (parameter for parameter in network.parameters() if parameter.dim() > 1 and not parameter.any()):
        nn.init.normal_(parameter, std=gain * parameter[0].numel() ** -0.5)
    return network


def formula_loss(network: nn.Module, x1: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    """Equation 23 of Lipman et al. (2023) with sigma_min = 0."""
    column = over(t, x1)
    return F.mse_loss(network(column * x1 + (1 - column) * x0, t), x1 - x0)
