"""Sampling as the trainer's pictures, its quality report and the command line do it: a recipe's noise, solve and data map."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fm_fast import sampling
from fm_fast.paths import prior_scale
from fm_fast.random import noise
from fm_fast.sampling import Guidance
from fm_fast.solvers import is_adaptive
from fm_fast.train.condition import NULL_CLASS, reduced, reduced_if_wanted
from fm_fast.train.config import Recipe, TrainConfig
from fm_fast.train.data import Dataset

BatchDone = Callable[[Tensor, Tensor], None]


def ignore(images: Tensor, labels: Tensor) -> None:
    """A `BatchDone` that does nothing."""


def starting_noise(shape: tuple[int, ...], recipe: Recipe, seed: int, index: int, device: torch.device, first_id: int = 0) -> Tensor:
    """Noise of the path's prior, float32, of samples first_id, first_id + 1, ... `index` >= 1 keeps it apart from training's, index 0."""
    return prior_scale(recipe.path) * noise(shape, seed=seed, step=0, stream="x0", index=index, sample_ids=first_id, device=device)


def sample(
    model: nn.Module,
    x0: Tensor,
    labels: Tensor | None,
    recipe: Recipe,
    steps: int | None,
    method: str = "midpoint",
    guidance: float = 1.0,
    low_resolution: Tensor | None = None,
    churn: float = 0.0,
    seed: int = 0,
    first_id: int = 0,
    **options: Any,
) -> Tensor:
    """Samples [B, ...] from noise x0, float32: :func:`fm_fast.sample` with the recipe's path and objective.

    labels: int64 [B], or None for a network without classes. guidance w: v = v_u + w (v_c - v_u), with v_u for the null class; 1
    evaluates the conditional network only. low_resolution: what a super-resolution network enlarges. Adaptive methods take no steps.
    churn, seed, first_id: of noise on the way. options: other arguments of :func:`fm_fast.sample`.
    """
    drawn: dict[str, Any] = {"churn": churn, "seed": seed, "sample_ids": first_id} if churn else {}
    guided = Guidance(guidance, {"y": NULL_CLASS}) if guidance != 1.0 and labels is not None else None
    condition = {name: value for name, value in (("y", labels), ("low_resolution", low_resolution)) if value is not None}
    return sampling.sample(
        model, x0, cond=condition, path=recipe.path, objective=recipe.objective, method=method,
        steps=None if is_adaptive(method) else steps, guidance=guided, **drawn, **options,
    ).x  # fmt: skip


def sample_classes(
    model: nn.Module, config: TrainConfig, classes: Sequence[int], count: int, seed: int, batch_size: int, levels: int | None,
    each: BatchDone = ignore, **options: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(images [N, C, H, W] as in `as_data`, labels int64 [N]), on the CPU: ``count`` samples of each class, by ``options`` of `sample`.

    each: what is given the images and labels of every batch as soon as they are there.
    A sample of a fixed-step method depends on the seed and its position only. With the run's own seed and settings they are those of
    its picture.
    """
    device, side = next(model.parameters()).device, config.model.image_size
    labels, parts = torch.tensor(classes).repeat_interleave(count), []
    for first in range(0, len(labels), batch_size):
        part = labels[first : first + batch_size]
        rows = part.to(device) if config.model.classes else None
        x0 = starting_noise((len(part), config.model.image_channels, side, side), config.recipe, seed, 1, device, first)
        parts.append(as_data(sample(model, x0, rows, config.recipe, seed=seed, first_id=first, **options), levels).cpu())
        each(parts[-1], part)
    return torch.cat(parts), labels


def sample_enlarged(
    model: nn.Module, config: TrainConfig, originals: Dataset, seed: int, batch_size: int, each: BatchDone = ignore, **options: Any
) -> Tensor:
    """uint8 [N, C, H, W], on the CPU: a sample of a super-resolution network for each image, of its reduced image and label.

    each: as in `sample_classes`.
    """
    device, parts = next(model.parameters()).device, []
    for first in range(0, len(originals), batch_size):
        images, labels = (values[first : first + batch_size].to(device) for values in (originals.images, originals.labels))
        x0 = starting_noise(tuple(images.shape), config.recipe, seed, 1, device, first)
        low = reduced_if_wanted(config, images, originals.levels)
        rows = labels if config.model.classes else None
        x = sample(model, x0, rows, config.recipe, low_resolution=low, seed=seed, first_id=first, **options)
        parts.append(to_integers(x, originals.grey_levels).cpu())
        each(parts[-1], labels)
    return torch.cat(parts)


def enlargements(config: TrainConfig, originals: Dataset, drawn: Tensor, each: int = 1, shown: bool = True) -> Tensor:
    """For a picture, uint8 [N (each + 2), C, H, W]: every reduced image with its pixels enlarged, `each` samples, and the original.

    shown: whether the originals are; else there is one image less a row.
    """
    factor, images = config.super_resolution, originals.images.cpu()
    low = reduced(images, originals.grey_levels, factor)
    coarse = to_integers(low, originals.grey_levels).repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)
    last = [images[:, None]] if shown else []
    return torch.cat([coarse[:, None], drawn.unflatten(0, (len(images), each)), *last], dim=1).flatten(0, 1)


def as_data(y: Tensor, levels: int | None) -> Tensor:
    """What a sample stands for, as data sets hold it: uint8 of so many levels, or real numbers (None), which it is itself."""
    return y if levels is None else to_integers(y, levels)


def to_integers(y: Tensor, levels: int) -> Tensor:
    """Undo the data map y = 2 (x + 1/2) / levels - 1: the nearest level in 0..levels-1, uint8."""
    return ((y + 1.0) * (levels / 2.0)).floor().clamp(0, levels - 1).to(torch.uint8)
