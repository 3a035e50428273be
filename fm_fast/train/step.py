"""One training step as a function of (state, configuration, data): everything random is counted from (seed, step, sample)."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from fm_fast.loss import flow_matching_loss
from fm_fast.nn import Preconditioned, UNet
from fm_fast.random import noise
from fm_fast.train.config import TrainConfig
from fm_fast.train.data import DataOrder, Dataset
from fm_fast.train.times import importance_times

NULL_CLASS = -1


@dataclass
class TrainState:
    """All that changes in a run. `step` counts finished steps; `average` is the exponential moving average of `model`."""

    model: nn.Module
    average: nn.Module
    optimiser: torch.optim.Optimizer
    step: int = 0

    def state_dict(self) -> dict[str, Any]:
        parts = {name: getattr(self, name).state_dict() for name in ("model", "average", "optimiser")}
        return {**parts, "step": self.step}

    def load_state_dict(self, stored: dict[str, Any]) -> None:
        for name in ("model", "average", "optimiser"):
            getattr(self, name).load_state_dict(stored[name])
        self.step = stored["step"]


def build_model(config: TrainConfig) -> nn.Module:
    """The network of a run, preconditioned if the recipe says so. Initial weights depend on the seed only."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = UNet(config.model)
    recipe = config.recipe
    return Preconditioned(network, recipe.path, recipe.objective) if recipe.preconditioned else network


def new_state(config: TrainConfig, device: torch.device) -> TrainState:
    """The state before the first step."""
    model = build_model(config).to(device)
    average = copy.deepcopy(model).requires_grad_(False)
    betas = (config.beta1, config.beta2)
    optimiser = torch.optim.AdamW(model.parameters(), config.learning_rate, betas, weight_decay=config.weight_decay, fused=True)
    return TrainState(model, average, optimiser)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear from peak/warmup at step 0 to the peak, then linear towards 0, which the step after the last would reach."""
    rising = (step + 1) / max(config.warmup, 1)
    falling = (config.steps - step) / max(config.steps - config.warmup, 1)
    return config.learning_rate * max(min(rising, falling, 1.0), 0.0)


def ema_decay(config: TrainConfig, step: int) -> float:
    """min(decay, (1 + n) / (10 + n)) for the n-th update: early averages forget the initial weights."""
    return min(config.ema_decay, (1 + step) / (10 + step))


def drop_labels(labels: Tensor, share: float, seed: int, step: int, first_id: int = 0) -> Tensor:
    """Labels int64 [B] with about `share` of them replaced by -1; a sample's fate depends on (seed, step, its id) only."""
    draws = noise((len(labels),), seed=seed, step=step, stream="label_drop", sample_ids=first_id, device=labels.device)
    return torch.where(draws < share, NULL_CLASS, labels)


def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """average = decay * average + (1 - decay) * model, in place, in one multi-tensor call."""
    get_ema_multi_avg_fn(decay)(list(average.parameters()), list(model.parameters()), 0)


def batch_loss(state: TrainState, config: TrainConfig, images: Tensor, labels: Tensor, levels: int, first_id: int = 0) -> Tensor:
    """The objective's loss on samples first_id, first_id + 1, ... of the step's batch. images: uint8 [B, C, H, W]."""
    recipe, seed, step = config.recipe, config.seed, state.step
    times: dict[str, Any] = {"t_sampler": recipe.t_sampler}
    if recipe.t_sampler == "importance":
        t, weight = importance_times(recipe, len(images), seed, step, first_id, images.device)
        times = {"t": t, "weight": weight}
    return flow_matching_loss(
        state.model, images, cond={"y": drop_labels(labels, config.label_drop, seed, step, first_id)}, path=recipe.path,
        objective=recipe.objective, flip=config.flip, levels=levels, dequantise=config.dequantise,
        seed=seed, step=step, sample_ids=first_id, **times,
    )  # fmt: skip


def training_step(state: TrainState, config: TrainConfig, dataset: Dataset, order: DataOrder) -> Tensor:
    """One step, in place: loss, gradient, clipping, AdamW, average. Returns the loss, detached and still on the device."""
    rows = order.indices(state.step * config.batch_size, config.batch_size).to(dataset.images.device)
    loss = batch_loss(state, config, dataset.images[rows], dataset.labels[rows], dataset.levels)
    loss.backward()
    _apply_gradient(state, config)
    update_average(state.average, state.model, ema_decay(config, state.step))
    state.step += 1
    return loss.detach()


def _apply_gradient(state: TrainState, config: TrainConfig) -> None:
    if config.clip > 0.0:
        nn.utils.clip_grad_norm_(state.model.parameters(), config.clip)
    _set_learning_rate(state.optimiser.param_groups, learning_rate(config, state.step))
    state.optimiser.step()
    state.optimiser.zero_grad(set_to_none=True)


def _set_learning_rate(groups: Sequence[dict[str, Any]], rate: float) -> None:
    for group in groups:
        group["lr"] = rate
