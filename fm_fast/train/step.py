"""One training step as a function of (state, configuration, data): everything random is counted from (seed, step, sample).

What the host does (which images come next, the learning rate) and what the device does (`learn`) are apart, so that
train/execution/graph.py can record the latter once and replay it.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fm_fast.couplings import optimal_ids
from fm_fast.loss import PathSample, sample_path
from fm_fast.nn import Preconditioned, UNet
from fm_fast.random import Whole
from fm_fast.train.condition import training_condition
from fm_fast.train.config import TrainConfig
from fm_fast.train.data import DataOrder, Dataset
from fm_fast.train.optimiser.adamw_ema import AdamWEMA
from fm_fast.train.optimiser.averaging import Averaging, power_function_of_width, warmed_up_decay
from fm_fast.train.times import importance_times

QUARTILES = 4
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Model = Callable[..., Tensor]


@dataclass
class TrainState:
    """All that changes in a run. `step` counts finished steps; `average` is the first moving average of `model`, kept by the optimiser."""

    model: nn.Module
    average: nn.Module
    optimiser: AdamWEMA
    step: int = 0
    unets: tuple[UNet, ...] = field(init=False, repr=False)  # within `model`: to look for them takes as long as some kernels

    def __post_init__(self) -> None:
        self.unets = tuple(module for module in self.model.modules() if isinstance(module, UNet))

    def __setstate__(self, values: dict[str, Any]) -> None:
        """For copy and pickle, where the average would otherwise lose touch with the optimiser."""
        self.__dict__.update(values)
        self.average = self.optimiser.average(self.model).eval()

    def averaged(self) -> nn.Module:
        """`average`, up to date."""
        return self.average

    def state_dict(self) -> dict[str, Any]:
        parts = {name: getattr(self, name).state_dict() for name in ("model", "average", "optimiser")}
        return {**parts, "step": self.step}

    def load_state_dict(self, stored: dict[str, Any]) -> None:
        for name in ("model", "average", "optimiser"):
            getattr(self, name).load_state_dict(stored[name])
        self.step = stored["step"]


@dataclass(frozen=True)
class Share:
    """The part of every step's batch that this process computes: number `rank` of `world` parts of equal size.

    All that data parallelism asks of a step: a sample's noise, time and labels depend on its place in the whole batch, so the parts
    together are the batch, whatever `world` is. Gradients are averaged over the parts by the network that the step is given
    (DistributedDataParallel does), and every process then makes the same update. Raises ValueError for a batch that does not divide.
    """

    rank: int = 0
    world: int = 1

    def samples(self, batch_size: int) -> range:
        """Places in the batch."""
        size, rest = divmod(batch_size, self.world)
        if rest:
            raise ValueError(f"batch_size: expected a multiple of the number of processes, {self.world}, got {batch_size}")
        return range(self.rank * size, (self.rank + 1) * size)


WHOLE = Share()


@dataclass(frozen=True)
class Batch:
    """The samples first_id, first_id + 1, ... of a step's batch: images uint8 [B, C, H, W] of `levels` values, labels int64 [B].

    levels: None for real numbers, as the network is to see them.

    step: number of steps before this one; a tensor int64 [] on the device where a recorded step is to be replayed with other numbers.
    paired_ids: int64 [B], the ids of the noise that goes with each image, where it is not that of the image's own id.
    """

    images: Tensor
    labels: Tensor
    levels: int | None
    step: Whole
    first_id: int = 0
    paired_ids: Tensor | None = None

    @property
    def noise_ids(self) -> Whole:
        """Of the loss."""
        return self.first_id if self.paired_ids is None else self.paired_ids

    def __len__(self) -> int:
        return len(self.images)

    def parts(self, size: int) -> Iterator[tuple["Batch", bool]]:
        """(piece, whether it is the last) of pieces of `size` samples, 0 for one piece."""
        size = size or len(self)
        for first in range(0, len(self), size):
            part = slice(first, first + size)
            ids = None if self.paired_ids is None else self.paired_ids[part]
            piece = replace(self, images=self.images[part], labels=self.labels[part], first_id=self.first_id + first, paired_ids=ids)
            yield piece, first + size >= len(self)


@dataclass(frozen=True)
class StepLoss:
    """What a step tells the log, on the device: the mean loss, and the losses' sums and counts [2, 4] by quartile of t (0..1/4, ...).

    gradient_norm: of all gradients before clipping, float64 [].
    """

    mean: Tensor
    by_quartile: Tensor
    gradient_norm: Tensor


def build_model(config: TrainConfig, weights: dict[str, Tensor] | None = None) -> nn.Module:
    """The network of a run, preconditioned if the recipe says so. Initial weights are those given, the others depend on the seed only."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = UNet(config.model)
    recipe = config.recipe
    model = Preconditioned(network, recipe.path, recipe.objective) if recipe.preconditioned else network
    if weights is not None:
        model.load_state_dict(weights, strict=False)
    return model


def averages_of(config: TrainConfig) -> tuple[Averaging, ...]:
    """The averages that the optimiser keeps: of `ema_decay` with its warm-up, then one for each of `ema_widths`."""
    return (warmed_up_decay(config.ema_decay), *(power_function_of_width(width) for width in config.ema_widths))


def new_state(config: TrainConfig, device: torch.device, weights: dict[str, Tensor] | None = None) -> TrainState:
    """The state before the first step, with weights of another run where they are given."""
    model = build_model(config, weights).to(device, DTYPES[config.precision])
    if device.type == "cuda" and config.parallel != "fsdp":  # which takes contiguous parameters only
        # Else each convolution would turn its weights and their gradient at every step.
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    betas, largest_norm = (config.beta1, config.beta2), config.clip if config.clip > 0.0 else math.inf
    optimiser = AdamWEMA(
        model.parameters(), config.learning_rate, betas, weight_decay=config.weight_decay, max_norm=largest_norm,
        averages=averages_of(config),
    )  # fmt: skip
    return TrainState(model, optimiser.average(model).eval(), optimiser)


def network_of(state: TrainState, config: TrainConfig) -> Model:
    """What steps call instead of `state.model` itself: the same weights, compiled where the configuration says so."""
    return torch.compile(state.model) if config.compile else state.model


def sample_losses(state: TrainState, config: TrainConfig, batch: Batch, network: Model | None = None) -> tuple[Tensor, Tensor]:
    """The objective's losses and the times of the batch's samples, float32 [B] each. network: what to call, if not `state.model`."""
    point, weight = _sampled(config, batch)
    for unet in state.unets:
        unet.set_dropout_key(config.seed, batch.step, batch.first_id)
    condition = training_condition(config, batch.images, batch.labels, batch.levels, batch.step, batch.first_id)
    model = state.model if network is None else network  # the truth of a compiled network is an error
    output = model(point.x_t, point.t, **condition)
    return point.loss(output, weight=weight, reduction="none"), point.t


def _sampled(config: TrainConfig, batch: Batch) -> tuple[PathSample, Tensor | None]:
    """Points of the path, and the factors by which the losses there must be multiplied, None for 1."""
    recipe, weight, images = config.recipe, None, batch.images
    grey: dict[str, Any] = {} if batch.levels is None else {"levels": batch.levels, "dequantise": config.dequantise}
    times: dict[str, Any] = {"t_sampler": recipe.t_sampler}
    if recipe.t_sampler == "importance":
        t, weight = importance_times(recipe, len(batch), config.seed, batch.step, batch.first_id, images.device)
        times = {"t": t}
    point = sample_path(
        images, path=recipe.path, objective=recipe.objective, flip=config.flip, dtype=DTYPES[config.precision], seed=config.seed,
        step=batch.step, sample_ids=batch.noise_ids, **times, **grey,
    )  # fmt: skip
    return point, weight


def by_quartile(losses: Tensor, t: Tensor) -> Tensor:
    """Sums and counts [2, 4] of the finite losses whose t lies in each quarter of [0, 1]."""
    quarter, finite = (t * QUARTILES).long().clamp(0, QUARTILES - 1), losses.isfinite()
    member = ((quarter == torch.arange(QUARTILES, device=t.device)[:, None]) & finite).to(losses.dtype)
    return torch.stack([(member * losses.where(finite, 0.0)).sum(1), member.sum(1)])


def training_step(
    state: TrainState, config: TrainConfig, dataset: Dataset, order: DataOrder, share: Share = WHOLE, network: Model | None = None
) -> StepLoss:
    """One step, in place: loss, gradient, clipping, AdamW, averages. A step whose gradient is not finite is counted and changes no weight.

    share: the part of the batch to compute; the loss is the mean over it. network: called instead of `state.model`, e.g. the same model
    compiled or in DistributedDataParallel. Nothing waits for the device.
    """
    batch = next_batch(state, config, dataset, order, share)
    set_learning_rate(state, config)
    loss = learn(state, config, batch, network)
    state.step += 1
    return loss


def next_batch(state: TrainState, config: TrainConfig, dataset: Dataset, order: DataOrder, share: Share = WHOLE) -> Batch:
    """What the next step reads."""
    samples = share.samples(config.batch_size)
    images, labels = order.read(dataset, state.step * config.batch_size + samples.start, len(samples))
    batch = Batch(images, labels, dataset.levels, state.step, samples.start)
    return replace(batch, paired_ids=_paired(config, batch)) if config.coupling == "optimal" else batch


def _paired(config: TrainConfig, batch: Batch) -> Tensor:
    """The noise of a class stays Gaussian: pairs are made within it."""
    return optimal_ids(
        batch.images, seed=config.seed, step=batch.step, sample_ids=batch.first_id, flip=config.flip,
        labels=batch.labels if config.model.classes else None,
    )  # fmt: skip


def set_learning_rate(state: TrainState, config: TrainConfig) -> None:
    """That of the next step."""
    for group in state.optimiser.param_groups:
        group["lr"] = config.rate.after(state.step)


def learn(state: TrainState, config: TrainConfig, batch: Batch, network: Model | None = None) -> StepLoss:
    """All that a step does on the device. It reads no number from the host but the configuration's, if `batch.step` is a tensor."""
    total = torch.zeros((), device=batch.labels.device)
    quartiles = torch.zeros(2, QUARTILES, device=batch.labels.device)
    for part, last in batch.parts(config.micro_batch):
        with _gradients_kept_local(network, not last):
            losses, t = sample_losses(state, config, part, network)
            (losses.sum() / len(batch)).backward()
        with torch.no_grad():
            total += losses.sum() / len(batch)
            quartiles += by_quartile(losses, t)
    state.optimiser.step()
    state.optimiser.zero_grad(set_to_none=True)
    return StepLoss(total, quartiles, state.optimiser.gradient_norm)


def _gradients_kept_local(network: Model | None, kept: bool) -> contextlib.AbstractContextManager[Any]:
    """Data-parallel networks send gradients only with the last micro-batch."""
    return network.no_sync() if kept and hasattr(network, "no_sync") else contextlib.nullcontext()  # type: ignore[union-attr]
