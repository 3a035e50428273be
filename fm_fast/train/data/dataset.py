"""A data set as one tensor of images, uint8 or of real numbers, and one int64 tensor of labels."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fm_fast.train.standardisation import Standardisation, in_parts

LEVELS = 256
IMAGES = (torch.uint8, torch.float16, torch.float32, torch.float64)
MOST_CLASSES = 1_000_000  # each has a row of weights; more are labels of another kind
# How held-out images come about: a test part of the source, a share of it that is put aside, or not at all.
TEST_PART, SHARE, UNDIVIDED = "test part", "share", "undivided"


@dataclass(frozen=True)
class Dataset:
    """images: uint8 [N, C, H, W] with values 0..levels-1, or float16 or float32 as the network sees them, which have no levels (None).

    labels: int64 [N] in 0..classes-1. standardisation: what the network sees of real numbers, None for uint8.
    mapped: the images lie in a file, hence on the CPU, and go to the labels' device batch by batch. division: TEST_PART where the source
    has one, SHARE where `test_share` is held out; UNDIVIDED data are the same images for training and for tests. left_out: what else lies
    there, in lines for people.
    """

    name: str
    images: Tensor
    labels: Tensor
    classes: int
    levels: int | None = LEVELS
    mapped: bool = False
    division: str = TEST_PART
    left_out: tuple[str, ...] = ()
    standardisation: Standardisation | None = None

    def __len__(self) -> int:
        return len(self.images)

    @property
    def grey_levels(self) -> int:
        """`levels` where only integers will do. Raises ValueError for real numbers."""
        if self.levels is None:
            raise ValueError(f"data: expected images of grey levels, got {self.name} of real numbers")
        return self.levels

    @property
    def device(self) -> torch.device:
        """Where batches are."""
        return self.labels.device

    def to(self, device: torch.device) -> "Dataset":
        """The same data on a device: sets that fit into memory stay there for the whole run."""
        return replace(self, images=self.images if self.mapped else self.images.to(device), labels=self.labels.to(device))

    def batch(self, rows: Tensor, images: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(images, labels) of the rows int64 [B], given on the CPU; images: those of mapped data, if they have been read."""
        there = rows.to(self.device, non_blocking=True)
        if images is None:
            images = self.images[rows if self.mapped else there]
        return images.to(self.device, non_blocking=True), self.labels[there]

    def room_for(self, count: int) -> Tensor:
        """Memory on the host for so many mapped images; a GPU reads it while the host goes on."""
        pinned = self.device.type == "cuda"
        return torch.empty((count, *self.images.shape[1:]), dtype=self.images.dtype, pin_memory=pinned, device="cpu")


def make_dataset(name: str, images: Tensor, labels: Tensor, levels: int = LEVELS, classes: int | None = None, **marks: Any) -> Dataset:
    """Checked data set: images [N, H, W] or [N, C, H, W], labels of any integer dtype [N]; `marks`: further fields of it.

    Images are uint8, or of real numbers: float64 becomes float32, and there are no levels.
    """
    _check_form(name, images, labels)
    images = images.unsqueeze(1) if images.ndim == 3 else images
    classes = int(labels.max()) + 1 if classes is None else classes
    if classes > MOST_CLASSES:
        raise ValueError(f"{name}: expected labels 0, 1, 2, ..., at most {MOST_CLASSES} classes, got a label {classes - 1}")
    _check_labels(name, labels, classes)
    if not marks.get("mapped"):  # those were looked at when the file was written
        check_values(name, images, levels)
    if images.is_floating_point():
        images = images.to(torch.float16 if images.dtype == torch.float16 else torch.float32)
    known = None if images.is_floating_point() else levels
    return Dataset(name, images.contiguous(), labels.to(torch.int64), classes, known, **marks)


def _check_form(name: str, images: Tensor, labels: Tensor) -> None:
    """Raises ValueError for images of another dtype or shape, or another number of labels."""
    if images.dtype not in IMAGES or images.ndim not in (3, 4) or images.numel() == 0:
        kinds = "uint8, or real numbers, [N, H, W] or [N, C, H, W]"
        raise ValueError(f"{name}: expected images {kinds}, not empty, got {images.dtype} {list(images.shape)}")
    if labels.shape != images.shape[:1]:
        raise ValueError(f"{name}: expected one label an image, {len(images)}, got {list(labels.shape)}")


def _check_labels(name: str, labels: Tensor, classes: int) -> None:
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise ValueError(f"{name}: expected labels in 0..{classes - 1}, got {int(labels.min())}..{int(labels.max())}")


def check_values(name: str, images: Tensor, levels: int = LEVELS) -> None:
    """Raises ValueError for grey levels beyond these, and for real numbers that are not finite."""
    if images.is_floating_point():
        _check_finite(name, images)
    elif levels < LEVELS and int(images.max()) >= levels:
        raise ValueError(f"{name}: expected pixel values below {levels}, got {int(images.max())}")


def _check_finite(name: str, images: Tensor) -> None:
    strange = sum(int((~part.to(torch.float32).isfinite()).sum()) for part in in_parts(images))
    if strange:
        raise ValueError(f"{name}: expected finite numbers that float32 can hold, got {strange} others")


def with_levels(dataset: Dataset, levels: int | None) -> Dataset:
    """The same with that number of grey levels, since files do not tell theirs, or the same of real numbers (None).

    ValueError for values beyond these, for data of the other kind, and for the shipped digits, whose number is known.
    """
    if dataset.levels == levels:
        return dataset
    if dataset.levels != LEVELS or levels is None:
        raise ValueError(f"data: expected {_kind(levels)}, as the run was trained on, got {_kind(dataset.levels)} in {dataset.name}")
    highest = int(dataset.images.max())
    if highest >= levels:
        raise ValueError(f"data: expected values below {levels}, the grey levels that the run was trained on, got {highest}")
    return replace(dataset, levels=levels)


def _kind(levels: int | None) -> str:
    return "real numbers" if levels is None else f"images of {levels} grey levels"
