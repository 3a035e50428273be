"""Settings that the data leave without effect: refused where somebody asked for them, else told at the start of a run."""

from collections.abc import Collection

import torch

from fm_fast.train.config import TrainConfig
from fm_fast.train.data import TEST_PART, UNDIVIDED, Dataset

ATTENTION = "model.attention_sizes"
MOST_NAMED = 5  # classes


def refuse_without_effect(config: TrainConfig, asked: Collection[str], share: int) -> None:
    """ValueError for a setting that was asked for and does nothing.

    asked: names of the settings that were. share: images of a step in each process.
    """
    sizes, heights = config.model.attention_sizes, _heights(config)
    if ATTENTION in asked and not set(sizes) <= set(heights):
        raise ValueError(f"{ATTENTION}: expected heights of the network's levels, {', '.join(map(str, heights))}, got {sizes}")
    for name, expected in _idle(config, share).items():
        if name in asked:
            raise ValueError(f"{name}: expected {expected}, got {getattr(config, name)}")


def _idle(config: TrainConfig, share: int) -> dict[str, str]:
    """Settings that do nothing, and what is expected in their place."""
    found = {}
    if config.coupling == "optimal" and share == 1:
        found["coupling"] = "independent where a process has one image a step, which leaves nothing to pair"
    if _never_told(config):
        found["label_drop"] = "less than 1, or --no-conditional: the network would never be told a label"
    elif not config.conditional and config.label_drop > 0.0:
        found["label_drop"] = "0 for a network that is told no labels"
    if not config.knows_the_null_class and config.guidance != 1.0:
        found["guidance"] = "1 for a network that is told no labels or always a label"
    if config.evaluate and config.super_resolution == 1 and not (config.data == "digits" and config.conditional):
        found["evaluate"] = "only for the shipped digits with their classes; the command evaluate judges other runs"
    return found


def _never_told(config: TrainConfig) -> bool:
    return config.conditional and config.label_drop == 1.0


def remarks(config: TrainConfig, dataset: Dataset, share: int) -> list[str]:
    """Lines for the start of a run on these data; share: images of a step in each process."""
    found, heights = list(dataset.left_out), _heights(config)
    if config.coupling == "optimal" and share == 1:
        found.append("note: coupling optimal has no effect, because a process has one image a step")
    if config.parallel != "ddp" and share == config.batch_size:
        found.append(f"note: parallel {config.parallel} has no effect in one process")
    if config.autotune and dataset.device.type == "cpu":
        found.append("note: autotune has no effect on a CPU")
    if config.micro_batch >= share:
        found.append(f"note: micro_batch {config.micro_batch} has no effect, because a process has {share} images a step")
    if _never_told(config):
        found.append("warning: label_drop 1: the network is never told a label, so it learns nothing about the classes")
    if config.test_share > 0.0 and dataset.division == TEST_PART:
        found.append(f"note: test_share {config.test_share:g} has no effect, because {dataset.name} has a test part")
    if dataset.division == UNDIVIDED and (config.super_resolution > 1 or config.quality_every > 0):
        found.append(f"warning: {dataset.name} has no test part: held-out images are training images; test_share holds some out")
    if config.model.attention_sizes and not set(config.model.attention_sizes) & set(heights):
        levels = ", ".join(map(str, heights))
        found.append(f"note: attention in the middle only: no level is as high as {ATTENTION} {config.model.attention_sizes} ({levels})")
    absent = (torch.bincount(dataset.labels, minlength=dataset.classes) == 0).nonzero().flatten().tolist()
    if absent:
        names = ", ".join(map(str, absent[:MOST_NAMED])) + (", ..." if len(absent) > MOST_NAMED else "")
        found.append(f"warning: no image is of class {names}, of {dataset.classes}; labels are to be 0, 1, 2, ...")
    if config.warmup >= config.steps:
        highest = max(config.rate.after(step) for step in (0, config.steps - 1))
        found.append(f"note: the run ends within its warmup of {config.warmup} steps, at a learning rate of {highest:.2g}")
    return found


def _heights(config: TrainConfig) -> list[int]:
    return [config.model.image_size // 2**level for level in range(len(config.model.multipliers))]
