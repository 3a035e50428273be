"""Read ImageNet of 8x8 to 64x64 pixels (Chrabaszcz et al., arXiv 1707.08819) as it is downloaded: batches of arrays, .npz or pickled."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fm_fast.train.data.readers.cache import cache_file
from fm_fast.train.data.readers.mapped import filled, is_mapped
from fm_fast.train.data.readers.npz import read_npz
from fm_fast.train.data.readers.pickled import unpickled
from fm_fast.train.files import replaced_whole
from fm_fast.train.prepare import Preparation

BATCH = re.compile(r"(train_data_batch_(?P<number>\d+)|val_data)(?P<form>\.npz)?")
TRAIN_BATCHES = 10
PIXELS, LABELS, SIDE = "data", "labels", "side"
CLASSES = 1000  # labels begin with 1
READING = "downsampled ImageNet"


@dataclass(frozen=True)
class Batches:
    """The files of both splits, train in the order of their numbers; either may be empty."""

    train: list[Path]
    test: list[Path]

    def __bool__(self) -> bool:
        return bool(self.train or self.test)


def batches_in(folder: Path, within: bool = False) -> Batches:
    """The batches that lie in the folder, or in the folders within it (the archives' own).

    All are of one form, .npz where there are such. Raises FileNotFoundError for a gap in the numbers, ValueError for two of one number.
    """
    places = _subfolders(folder) if within else [folder]
    found = [file for place in places for file in sorted(place.glob("*_data*")) if BATCH.fullmatch(file.name) and file.is_file()]
    archives = [file for file in found if file.suffix == ".npz"]
    by_number: dict[int, Path] = {}
    for file in archives or found:
        number = _number(file)
        if number in by_number:
            raise ValueError(f"{folder}: expected one set of images, found {by_number[number]} and {file}; name the folder of one")
        by_number[number] = file
    train = [by_number[number] for number in sorted(by_number) if number]
    missing = sorted(set(range(1, max(by_number, default=0))) - set(by_number))
    if missing:
        raise FileNotFoundError(f"{folder}: expected train_data_batch_{missing[0]}, found {', '.join(file.name for file in train)}")
    return Batches(train, [by_number[0]] if 0 in by_number else [])


def _number(file: Path) -> int:
    """Of a training batch; 0 of the test part."""
    match = BATCH.fullmatch(file.name)
    return int(match["number"] or 0) if match else 0


def _subfolders(folder: Path) -> list[Path]:
    return sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))


def read_batches(files: list[Path], preparation: Preparation, divided: bool) -> tuple[Tensor, Tensor, bool]:
    """(images uint8 [N, 3, S, S], labels int64 [N] from 0, whether the images lie in a mapped file); divided: a test part is there.

    Raises ValueError, naming the file, for one that is damaged or has another size than the first, and for settings that cannot be.
    """
    labels, side = _overview(files, preparation)
    shape = (sum(map(len, labels)), 3, side, side)
    preparation = preparation.of_size(side, side)
    if preparation.resize not in (0, side):
        raise ValueError(
            f"resize: expected 0 or {side} for images of that size, which only image files are brought to, got {preparation.resize}"
        )
    if preparation.test_share > 0.0 and not divided and is_mapped(math.prod(shape), preparation):
        raise ValueError(f"test_share: expected 0 above memory_limit, where the test part is val_data, got {preparation.test_share:g}")

    def fill(images: Tensor) -> None:
        for file, part in zip(files, images.split([len(of_file) for of_file in labels]), strict=True):
            found = _images(file, len(part))
            if found.shape != part.shape:
                raise ValueError(f"{file}: expected {side}x{side} images like {files[0].name}, got {found.shape[-1]}x{found.shape[-1]}")
            part.copy_(found)

    images, mapped = filled(shape, files, READING, preparation, fill)
    if mapped:
        _keep_overview(files, preparation, labels, side)
    return images, torch.cat(labels), mapped


def _overview(files: list[Path], preparation: Preparation) -> tuple[list[Tensor], int]:
    """The labels of each file and the images' size; from the cache where the images are, since a pickle is read as a whole."""
    kept = cache_file(preparation, files, READING, ".npz")
    if kept.is_file():
        labels, counts, side = read_npz(kept, (LABELS, "counts", SIDE))
        return list(labels.split(counts.tolist())), int(side)
    labels = [_labels(file) for file in files]
    return labels, _images(files[0], len(labels[0])).shape[-1]


def _keep_overview(files: list[Path], preparation: Preparation, labels: list[Tensor], side: int) -> None:
    kept = cache_file(preparation, files, READING, ".npz")
    if not kept.is_file():
        with replaced_whole(kept) as temporary, temporary.open("wb") as opened:
            np.savez(opened, labels=torch.cat(labels).numpy(), counts=np.array([len(of_file) for of_file in labels]), side=np.array(side))


def _labels(file: Path) -> Tensor:
    labels = _array(file, LABELS)
    if labels.dtype.kind not in "iu" or labels.ndim != 1 or not len(labels) or labels.min() < 1 or labels.max() > CLASSES:
        raise ValueError(f"{file}: expected labels 1..{CLASSES}, one an image, got {labels.dtype} {list(labels.shape)}")
    return torch.from_numpy(labels.astype(np.int64) - 1)


def _images(file: Path, count: int) -> Tensor:
    """Rows of 3 S^2 bytes, colour by colour."""
    pixels = _array(file, PIXELS)
    side = math.isqrt(pixels.shape[-1] // 3) if pixels.ndim == 2 else 0
    if pixels.dtype != np.uint8 or side == 0 or pixels.shape != (count, 3 * side * side):
        raise ValueError(f"{file}: expected uint8 pixels [{count}, 3 S S], a row a label, got {pixels.dtype} {list(pixels.shape)}")
    return torch.from_numpy(pixels).reshape(count, 3, side, side)


def _array(file: Path, name: str) -> np.ndarray:
    """An archive's array is read without the others."""
    if file.suffix == ".npz":
        return read_npz(file, (name,))[0].numpy()
    with file.open("rb") as opened:
        batch: Any = unpickled(opened, str(file), "downsampled ImageNet")
    try:
        return np.asarray(batch[name])
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: expected a dictionary with arrays {PIXELS} and {LABELS}, got {type(batch).__name__}: {error}") from error
