"""training: whole steps of the trainer on random images, as `fm-fast train` takes them, against torchcfm's script for CIFAR-10.

The network is that of the script (35.7 M parameters, dropout), and so are the loss, clipping, Adam with its warm-up and the average. Each
provider takes its images from memory of the device. On a GPU ours runs by replays of a CUDA graph and, for comparison, kernel by kernel;
torchcfm's in float32, its default, and under bfloat16 autocast. That both learn alike is what benchmarks/loss_curves.py shows; here the
first loss is checked against its expectation: the output of a new network is 0, so it is the mean square of x1 - x0.
"""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from benchmarks import peers, timing
from benchmarks.op import Op, Provider, Setting
from benchmarks.ops.train_step import average_state
from fm_fast.nn import UNetConfig
from fm_fast.nn.presets import PRESETS as NETWORKS
from fm_fast.train.config import TrainConfig, fit_to_data
from fm_fast.train.data import DataOrder, Dataset, make_dataset
from fm_fast.train.execution.devices import autotuning, flops_per_image, peak_tflops
from fm_fast.train.execution.graph import GraphedStep
from fm_fast.train.presets import PRESETS
from fm_fast.train.step import new_state, training_step

SIZES, GPU_SIZES = {"tiny": (8, 3, 16, 16)}, {"CIFAR, 128": (128, 3, 32, 32), "CIFAR, 512": (512, 3, 32, 32)}
IMAGES, SEED, WARM_UP_SECONDS, CALLS = 2048, 0, 2.0, 5
PRESET = "cifar10-torchcfm"
TINY = UNetConfig(16, 3, 0, channels=32, multipliers=(1, 2), blocks=1, attention_sizes=(8,), head_channels=32, dropout=0.1)
# The first loss is a mean over the batch: for uniform images and normal noise (1/3 + 1) (1 +- 1.4 / sqrt(elements)).
SPREAD = 6.0
Step = Callable[[], Tensor]  # its loss


@dataclass(frozen=True)
class Inputs:
    dataset: Dataset
    config: TrainConfig


def inputs(setting: Setting) -> Inputs:
    words = torch.randint(256, (IMAGES, *setting.shape[1:]), dtype=torch.uint8, generator=torch.Generator().manual_seed(SEED))
    dataset = make_dataset("random images", words, torch.zeros(IMAGES, dtype=torch.int64)).to(setting.device)
    model, precision = network_for(setting), precision_of(setting)
    config = replace(PRESETS[PRESET], batch_size=setting.shape[0], precision=precision, model=model, seed=SEED)
    return Inputs(dataset, fit_to_data(config, dataset.images.shape[1:], dataset.classes))


def network_for(setting: Setting) -> UNetConfig:
    return NETWORKS[PRESET] if setting.size in GPU_SIZES else TINY


def precision_of(setting: Setting) -> str:
    return str(setting.dtype).removeprefix("torch.")


def _autotuned(step: Step) -> Step:
    """With the fastest convolutions that cuDNN finds, for all providers."""

    def tuned() -> Tensor:
        with autotuning(True):
            return step()

    return tuned


def _ours(graph: bool) -> Callable[[Inputs, Setting], Step]:
    def build(given: Inputs, setting: Setting) -> Step:
        config, order = replace(given.config, cuda_graph="on" if graph else "off"), DataOrder(IMAGES, SEED)
        state = new_state(config, setting.device)
        step = GraphedStep(state, config, given.dataset, order, state.model) if graph else None
        return _autotuned(lambda: (step() if step else training_step(state, config, given.dataset, order)).mean)

    return build


def _torchcfm(autocast: bool) -> Callable[[Inputs, Setting], Step]:
    def build(given: Inputs, setting: Setting) -> Step:
        from torchcfm.conditional_flow_matching import ConditionalFlowMatcher

        network = torchcfm_network(given.config.model).to(setting.device).train()
        average, matcher = copy.deepcopy(network), ConditionalFlowMatcher(sigma=0.0)
        optimiser = torch.optim.Adam(network.parameters(), lr=given.config.learning_rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min(step, given.config.warmup) / given.config.warmup)
        images, size = given.dataset.images.float() / 127.5 - 1.0, setting.shape[0]

        def step() -> Tensor:
            x1 = images[torch.randint(IMAGES, (size,), device=setting.device)]
            optimiser.zero_grad()
            t, x_t, target = matcher.sample_location_and_conditional_flow(torch.randn_like(x1), x1)
            with torch.autocast(setting.device.type, dtype=torch.bfloat16, enabled=autocast):
                output = network(t, x_t)
            loss = torch.mean((output - target) ** 2)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), given.config.clip)
            optimiser.step()
            schedule.step()
            average_state(network, average, given.config.ema_decay)
            return loss.detach()

        return _autotuned(step)

    return build


def torchcfm_network(config: UNetConfig) -> nn.Module:
    from torchcfm.models.unet.unet import UNetModelWrapper

    return UNetModelWrapper(
        dim=(config.image_channels, config.image_size, config.image_size), num_channels=config.channels, num_res_blocks=config.blocks,
        channel_mult=list(config.multipliers), num_head_channels=config.head_channels, dropout=config.dropout,
        attention_resolutions=",".join(map(str, config.attention_sizes)),
    )  # fmt: skip


def providers(setting: Setting) -> list[Provider]:
    graphed = setting.device.type == "cuda"
    found = [Provider("fm_fast", _ours(graphed))]
    if graphed:
        found.append(Provider("fm_fast, kernel by kernel", _ours(False)))
    if peers.available("torchcfm"):
        found.append(Provider("torchcfm, float32", _torchcfm(False)))
        if setting.dtype == torch.bfloat16:
            found.append(Provider("torchcfm, autocast", _torchcfm(True)))
    return found


def check(given: Inputs, setting: Setting, step: Step) -> None:
    """The first loss against its expectation; and later ones are finite."""
    found, later = float(step()), float(step())
    expected = float((given.dataset.images.double() / 127.5 - 1.0).square().mean()) + 1.0
    spread = SPREAD * expected / math.prod(setting.shape) ** 0.5
    assert abs(found - expected) < spread, f"the first loss is {found:.4f}, expected {expected:.4f} +- {spread:.4f}"
    assert 0.0 < later < 2.0 * expected, f"the second loss is {later:.4f}"


def observe(steps: Mapping[str, Step], rounds: int, now: timing.Clock) -> dict[str, list[float]]:
    """Milliseconds of a step, averaged over CALLS in a row, since the host may run ahead of a GPU."""
    timing.warm_up(steps, WARM_UP_SECONDS, now)
    return timing.interleaved(steps, rounds, timing.host_clock(CALLS, now))


def work(setting: Setting) -> dict[str, float]:
    """Of the network's matrix products and convolutions, and of the best speed of the setting's dtype, whichever a provider runs in."""
    images = setting.shape[0]
    tflop = images * flops_per_image(network_for(setting)) * 1e-12
    peak = peak_tflops(setting.device, precision_of(setting))
    rates = {"images_per_second": images * 1e3, "tflops": tflop * 1e3}
    return rates if peak is None else rates | {"share_of_peak": tflop * 1e3 / peak}


OP = Op(
    "training", SIZES, ("random images",), inputs, providers, check, peers=("torchcfm",), rounds=5, observe=observe, work=work,
    gpu_sizes=GPU_SIZES,
)  # fmt: skip
