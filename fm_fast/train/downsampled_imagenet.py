"""Read ImageNet of 8x8 to 64x64 pixels (Chrabaszcz et al., arXiv 1707.08819) as it is downloaded: batches of arrays, .npz or pickled."""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fm_fast.train.mapped import filled
from fm_fast.train.npz import read_npz
from fm_fast.train.pickled import unpickled
from fm_fast.train.prepare import Preparation

BATCH = re.compile(r"(train_data_batch_(?P<number>\d+)|val_data)(?P<form>\.npz)?")
PIXELS, LABELS = "data", "labels"
CLASSES = 1000  # labels begin with 1
READING = "downsampled ImageNet"


def find_batches(folder: Path, split: str) -> list[Path]:
    """The batches of "train" or "test", in order, in the folder or those within (an archive's own); none where there are none.

    .npz where both forms are there. Raises FileNotFoundError for a gap in the numbers.
    """
    found: dict[int, Path] = {}
    for file in sorted(file for place in (folder, *_subfolders(folder)) for file in place.glob("*_data*") if file.is_file()):
        match = BATCH.fullmatch(file.name)
        if match and (match["number"] is None) == (split == "test"):
            number = int(match["number"] or 1)
            found[number] = file if match["form"] else found.get(number, file)
    missing = sorted(set(range(1, max(found, default=0) + 1)) - set(found))
    if missing:
        names = ", ".join(found[number].name for number in sorted(found))
        raise FileNotFoundError(f"{folder}: expected train_data_batch_{missing[0]}, found {names}")
    return [found[number] for number in sorted(found)]


def _subfolders(folder: Path) -> list[Path]:
    return sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))


def read_batches(files: list[Path], preparation: Preparation) -> tuple[Tensor, Tensor, bool]:
    """(images uint8 [N, 3, S, S], labels int64 [N] from 0, whether the images lie in a mapped file).

    Raises ValueError, naming the file, for one that is damaged or has another size than the first.
    """
    labels = [_labels(file) for file in files]
    side = _images(files[0], len(labels[0])).shape[-1]

    def fill(images: Tensor) -> None:
        for file, part in zip(files, images.split([len(of_file) for of_file in labels]), strict=True):
            found = _images(file, len(part))
            if found.shape != part.shape:
                raise ValueError(f"{file}: expected {side}x{side} images like {files[0].name}, got {found.shape[-1]}x{found.shape[-1]}")
            part.copy_(found)

    images, mapped = filled((sum(map(len, labels)), 3, side, side), files, READING, preparation, fill)
    return images, torch.cat(labels), mapped


def _labels(file: Path) -> Tensor:
    labels = _array(file, LABELS)
    if labels.ndim != 1 or len(labels) == 0 or labels.dtype.is_floating_point or int(labels.min()) < 1 or int(labels.max()) > CLASSES:
        raise ValueError(f"{file}: expected labels 1..{CLASSES}, one an image, got {labels.dtype} {list(labels.shape)}")
    return labels.to(torch.int64) - 1


def _images(file: Path, count: int) -> Tensor:
    """Rows of 3 S^2 bytes, colour by colour."""
    pixels = _array(file, PIXELS)
    side = math.isqrt(pixels.shape[-1] // 3) if pixels.ndim == 2 else 0
    if pixels.dtype != torch.uint8 or side == 0 or pixels.shape != (count, 3 * side * side):
        raise ValueError(f"{file}: expected uint8 pixels [{count}, 3 S S], a row a label, got {pixels.dtype} {list(pixels.shape)}")
    return pixels.reshape(count, 3, side, side)


def _array(file: Path, name: str) -> Tensor:
    """An archive's array is read by itself, without the others."""
    if file.suffix == ".npz":
        return read_npz(file, (name,))[0]
    with file.open("rb") as opened:
        batch: Any = unpickled(opened, str(file), "downsampled ImageNet")
    try:
        return torch.as_tensor(np.asarray(batch[name]))
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{file}: expected a dictionary with arrays {PIXELS} and {LABELS}, got {type(batch).__name__}: {error}") from error
