"""What the network is told beside x and t: labels, and in super-resolution the image to enlarge (Lipman et al. 2023, section 6.3)."""

import torch
from torch import Tensor
from torch.nn import functional as F

from fm_fast.random import Whole, noise
from fm_fast.reference import per_sample
from fm_fast.train.config import TrainConfig

NULL_CLASS = -1
Condition = dict[str, Tensor]


def drop_labels(labels: Tensor, share: float, seed: int, step: Whole, first_id: int = 0) -> Tensor:
    """Labels int64 [B] with about `share` of them replaced by -1; a sample's fate depends on (seed, step, its id) only."""
    draws = noise((len(labels),), seed=seed, step=step, stream="label_drop", sample_ids=first_id, dtype=torch.float32, device=labels.device)
    return torch.where(draws < share, NULL_CLASS, labels)


def reduced(images: Tensor, levels: int, factor: int) -> Tensor:
    """Means over blocks of factor x factor pixels of uint8 images [B, C, H, W] of `levels` values, in [-1, 1] as the data are: float32."""
    return 2.0 * (F.avg_pool2d(images.float(), factor) + 0.5) / levels - 1.0


def training_condition(config: TrainConfig, images: Tensor, labels: Tensor, levels: int | None, step: Whole, first_id: int) -> Condition:
    """Of the samples first_id, first_id + 1, ... of a step: some labels dropped, the reduced images mirrored where the images are."""
    found = {}
    if config.model.classes:
        found["y"] = drop_labels(labels, config.label_drop, config.seed, step, first_id)
    low = reduced_if_wanted(config, images, levels)
    if low is not None:
        found["low_resolution"] = _mirrored(low, config, step, first_id)
    return found


def _mirrored(low: Tensor, config: TrainConfig, step: Whole, first_id: int) -> Tensor:
    """As op path_sample mirrors the images themselves: by the stream `flip` of the noise contract."""
    if config.flip == 0.0:
        return low
    draws = noise((len(low),), seed=config.seed, step=step, stream="flip", sample_ids=first_id, dtype=torch.float32, device=low.device)
    return torch.where(per_sample(draws < config.flip, low), low.flip(-1), low)


def condition_of(config: TrainConfig, labels: Tensor, low_resolution: Tensor | None, unconditional: bool = False) -> Condition:
    """Of a finished network's call: what it knows of. unconditional: the null class in place of every label.

    Raises ValueError where that is asked of a network that has never seen the null class.
    """
    if unconditional and config.model.classes and not config.knows_the_null_class:
        raise ValueError("unconditional: expected False for a run with label_drop 0, which has not learnt to go without labels, got True")
    found = {}
    if config.model.classes:
        found["y"] = torch.full_like(labels, NULL_CLASS) if unconditional else labels
    if low_resolution is not None:
        found["low_resolution"] = low_resolution
    return found


def reduced_if_wanted(config: TrainConfig, images: Tensor, levels: int | None) -> Tensor | None:
    """The images that a super-resolution network enlarges; None for another network."""
    if config.super_resolution == 1:
        return None
    assert levels is not None  # the configuration of real numbers is refused
    return reduced(images, levels, config.super_resolution)
