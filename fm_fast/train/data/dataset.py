"""A data set as one uint8 tensor of images and one int64 tensor of labels."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

LEVELS = 256
MOST_CLASSES = 1_000_000  # each has a row of weights; more are labels of another kind
# How held-out images come about: a test part of the source, a share of it that is put aside, or not at all.
TEST_PART, SHARE, UNDIVIDED = "test part", "share", "undivided"


@dataclass(frozen=True)
class Dataset:
    """images: uint8 [N, C, H, W] with values 0..levels-1; labels: int64 [N] in 0..classes-1.

    mapped: the images lie in a file, hence on the CPU, and go to the labels' device batch by batch. division: TEST_PART where the source
    has one, SHARE where `test_share` is held out; UNDIVIDED data are the same images for training and for tests. left_out: what else lies
    there, in lines for people.
    """

    name: str
    images: Tensor
    labels: Tensor
    classes: int
    levels: int = LEVELS
    mapped: bool = False
    division: str = TEST_PART
    left_out: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    @property
    def device(self) -> torch.device:
        """Where batches are."""
        return self.labels.device

    def to(self, device: torch.device) -> "Dataset":
        """The same data on a device: sets that fit into memory stay there for the whole run."""
        return replace(self, images=self.images if self.mapped else self.images.to(device), labels=self.labels.to(device))

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(images, labels) of the rows int64 [B], given on the CPU."""
        there = rows.to(self.device, non_blocking=True)
        images = self.images[rows if self.mapped else there]
        return images.to(self.device, non_blocking=True), self.labels[there]


def make_dataset(name: str, images: Tensor, labels: Tensor, levels: int = LEVELS, classes: int | None = None, **marks: Any) -> Dataset:
    """Checked data set (`marks`: mapped, division, left_out): images uint8 [N, H, W] or [N, C, H, W], labels of any integer dtype [N]."""
    if images.dtype != torch.uint8 or images.ndim not in (3, 4) or images.numel() == 0:
        raise ValueError(f"{name}: expected images uint8 [N, H, W] or [N, C, H, W], not empty, got {images.dtype} {list(images.shape)}")
    if labels.shape != images.shape[:1]:
        raise ValueError(f"{name}: expected one label an image, {len(images)}, got {list(labels.shape)}")
    images = images.unsqueeze(1) if images.ndim == 3 else images
    classes = int(labels.max()) + 1 if classes is None else classes
    if classes > MOST_CLASSES:
        raise ValueError(f"{name}: expected labels 0, 1, 2, ..., at most {MOST_CLASSES} classes, got a label {classes - 1}")
    _check_ranges(name, images, labels, levels, classes)
    return Dataset(name, images.contiguous(), labels.to(torch.int64), classes, levels, **marks)


def _check_ranges(name: str, images: Tensor, labels: Tensor, levels: int, classes: int) -> None:
    if levels < LEVELS and int(images.max()) >= levels:
        raise ValueError(f"{name}: expected pixel values below {levels}, got {int(images.max())}")
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise ValueError(f"{name}: expected labels in 0..{classes - 1}, got {int(labels.min())}..{int(labels.max())}")


def with_levels(dataset: Dataset, levels: int) -> Dataset:
    """The same with that number of grey levels, since files do not tell theirs.

    ValueError for values beyond these, and for the shipped digits, whose number is known.
    """
    if dataset.levels == levels:
        return dataset
    if dataset.levels != LEVELS:
        raise ValueError(
            f"data: expected images of {levels} grey levels, as the run was trained on, got {dataset.name} with {dataset.levels}"
        )
    highest = int(dataset.images.max())
    if highest >= levels:
        raise ValueError(f"data: expected values below {levels}, the grey levels that the run was trained on, got {highest}")
    return replace(dataset, levels=levels)
