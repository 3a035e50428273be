"""train_step: a whole training step of a U-Net of 1.1 M parameters, against torchcfm's: its U-Net, loss and averaging, with Adam.

A step draws the noise and the times, and does the loss, its gradient, the clipping, Adam and the average of the weights. All networks
have the same shape and the same weights. In bfloat16, torchcfm runs under autocast, and a second time in float32, which is its default;
our weights are bfloat16 with float32 masters in the optimiser.
"""

import copy
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import fm_fast as fm
from benchmarks import peers
from benchmarks.op import Op, Provider, Setting
from benchmarks.points import check_close
from benchmarks.workloads import formula_loss, woken
from fm_fast.nn import UNet, UNetConfig, load_torchcfm
from fm_fast.train.optimiser.adamw_ema import AdamWEMA
from fm_fast.train.optimiser.averaging import fixed_decay

SIZES = {"32x32": (64, 3, 32, 32), "16x16": (64, 3, 16, 16), "tiny": (4, 3, 16, 16)}
CHANNELS, MULTIPLIERS, BLOCKS, HEAD_CHANNELS = 32, (1, 2, 2), 1, 32
RATE, DECAY, NORM, SEED = 2e-4, 0.9999, 1.0, 0
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Inputs:
    """Data, the noise and times at which all losses are compared, and the networks to start from: ours, and theirs of the same weights."""

    x1: Tensor
    x0: Tensor
    t: Tensor
    network: UNet
    theirs: nn.Module | None


class Point(Protocol):
    """Where on the path a provider's batch is, and the loss of the network's output there; ours is fm.PathSample."""

    @property
    def x_t(self) -> Tensor: ...
    @property
    def t(self) -> Tensor: ...
    def loss(self, o: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Trainer:
    """A provider at work; calling it takes one step.

    draw: a point with noise and times of its own. at: the point of given (x1, x0, t). model: from (x_t, t) to the output.
    updates: what follows the gradient, by name, in order; the optimiser's step among them.
    """

    draw: Callable[[], Point]
    at: Callable[[Tensor, Tensor, Tensor], Point]
    model: Callable[[Tensor, Tensor], Tensor]
    updates: Mapping[str, Callable[[], Any]]
    optimiser: torch.optim.Optimizer
    dtype: torch.dtype

    def __call__(self) -> None:
        self.learn(self.draw())

    def loss(self, point: Point) -> Tensor:
        return point.loss(self.model(point.x_t, point.t))

    def learn(self, point: Point) -> Tensor:
        """One step from this point; its loss."""
        loss = self.loss(point)
        loss.backward()
        for update in self.updates.values():
            update()
        return loss.detach()


def inputs(setting: Setting) -> Inputs:
    x1, x0 = (fm.noise(setting.shape, seed=SEED, step=0, index=index) for index in (1, 2))
    t = fm.noise(setting.shape[:1], seed=SEED, step=0, stream="t")
    config = unet_config(setting.shape)
    if not peers.available("torchcfm"):
        return Inputs(x1, x0, t, woken(UNet(config)), None)
    theirs = woken(torchcfm_network(config))
    return Inputs(x1, x0, t, load_torchcfm(theirs.state_dict(), config), theirs)


def unet_config(shape: tuple[int, ...]) -> UNetConfig:
    """Attention in the second level; the embedding added and t not scaled, as in torchcfm. shape: of x1."""
    _, colours, side, _ = shape
    return UNetConfig(
        side, colours, 0, channels=CHANNELS, multipliers=MULTIPLIERS, blocks=BLOCKS, attention_sizes=(side // 2,),
        head_channels=HEAD_CHANNELS, scale_shift=False, time_scale=1.0,
    )  # fmt: skip


def torchcfm_network(config: UNetConfig) -> nn.Module:
    from torchcfm.models.unet.unet import UNetModel

    return UNetModel(
        image_size=config.image_size, in_channels=config.image_channels, model_channels=CHANNELS, out_channels=config.image_channels,
        num_res_blocks=BLOCKS, attention_resolutions=(2,), channel_mult=MULTIPLIERS, num_head_channels=HEAD_CHANNELS,
    )  # fmt: skip


# Providers


def _fm_fast(fused: bool) -> Callable[[Inputs, Setting], Trainer]:
    return lambda given, setting: our_trainer(given, setting.dtype, fused)


def our_trainer(given: Inputs, dtype: torch.dtype, fused: bool = True) -> Trainer:
    model = UNet(given.network.config, fused=fused)
    model.load_state_dict(given.network.state_dict())
    model.to(dtype)
    optimiser = AdamWEMA(model.parameters(), RATE, weight_decay=0.0, max_norm=NORM, averages=[fixed_decay(DECAY)])
    steps = itertools.count()

    def draw() -> Point:
        return fm.sample_path(given.x1, seed=SEED, step=next(steps), dtype=dtype)

    def at(x1: Tensor, x0: Tensor, t: Tensor) -> Point:
        return fm.sample_path(x1, x0=x0, t=t, dtype=dtype)

    updates = {"clipping, Adam, average": optimiser.step, "clearing": optimiser.zero_grad}
    return Trainer(draw, at, model, updates, optimiser, dtype)


@dataclass(frozen=True)
class _TorchcfmPoint:
    """As its examples compute the loss."""

    t: Tensor
    x_t: Tensor
    target: Tensor

    def loss(self, o: Tensor) -> Tensor:
        return torch.mean((o - self.target) ** 2)


def _torchcfm(autocast: bool) -> Callable[[Inputs, Setting], Trainer]:
    return lambda given, setting: torchcfm_trainer(given, setting.dtype if autocast else torch.float32)


def torchcfm_trainer(given: Inputs, dtype: torch.dtype) -> Trainer:
    """Its U-Net, loss and average with torch's clipping and Adam; 16 bits by autocast."""
    from torchcfm.conditional_flow_matching import ConditionalFlowMatcher

    network, average = copy.deepcopy(given.theirs), copy.deepcopy(given.theirs)
    assert network is not None and average is not None
    optimiser, matcher = torch.optim.Adam(network.parameters(), lr=RATE), ConditionalFlowMatcher(sigma=0.0)

    def draw() -> Point:
        return _TorchcfmPoint(*matcher.sample_location_and_conditional_flow(torch.randn_like(given.x1), given.x1))

    def at(x1: Tensor, x0: Tensor, t: Tensor) -> Point:
        return _TorchcfmPoint(*matcher.sample_location_and_conditional_flow(x0, x1, t=t))

    def model(x_t: Tensor, t: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            return network(t, x_t)

    updates = {
        "clipping": lambda: torch.nn.utils.clip_grad_norm_(network.parameters(), NORM),
        "Adam": optimiser.step,
        "average": lambda: average_state(network, average, DECAY),
        "clearing": optimiser.zero_grad,
    }
    return Trainer(draw, at, model, updates, optimiser, dtype)


@torch.no_grad()
def average_state(model: nn.Module, average: nn.Module, decay: float) -> None:
    """As torchcfm's examples do it: tensor after tensor of the state dict."""
    weights, averages = model.state_dict(), average.state_dict()
    for name, value in weights.items():
        averages[name].copy_(averages[name] * decay + value * (1.0 - decay))


def providers(setting: Setting) -> list[Provider]:
    found = [Provider("fm_fast", _fm_fast(True)), Provider("fm_fast, plain layers", _fm_fast(False))]
    if peers.available("torchcfm"):
        found.append(Provider("torchcfm, float32", _torchcfm(False)))
        if setting.dtype == torch.bfloat16:
            found.append(Provider("torchcfm, autocast", _torchcfm(True)))
    return found


# Correctness


def check(given: Inputs, setting: Setting, step: Trainer) -> None:
    """The loss at given (x1, x0, t) against the formula in float64, before and after two steps there, which must have lowered it."""
    model = UNet(given.network.config, fused=False)
    model.load_state_dict(given.network.state_dict())
    with torch.no_grad():
        wanted = formula_loss(model.double(), given.x1.double(), given.x0.double(), given.t.double())
    found, _, later = (step.learn(step.at(given.x1, given.x0, given.t)) for _ in range(3))
    check_close("the loss", found, wanted, TOLERANCE[step.dtype])
    assert later < found, f"the loss is {later:.6f} after two steps and was {found:.6f} before"


OP = Op("train_step", SIZES, ("Adam, clipped, averaged",), inputs, providers, check, devices=("cpu",), peers=("torchcfm",), rounds=10)
