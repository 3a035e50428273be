"""Read a folder of images with one subfolder a class, into memory or, where they are too many, into a mapped file."""

import hashlib
import math
import os
import sys
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fm_fast.train.files import as_folder, replaced_whole
from fm_fast.train.prepare import GIB, Preparation

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")
TEST_FOLDERS = ("test", "val", "validation")
# Fewer images are read before a progress bar would be seen.
FEW = 2000
WIDE_MODES = ("I", "F")  # of more than 8 bits, which Pillow cuts off at 255


def split_folder(folder: Path, split: str) -> Path | None:
    """The subfolder of that split, where the folder is divided into train and test (or val); else None."""
    if not (folder / "train").is_dir():
        return None
    names = TEST_FOLDERS if split == "test" else ("train",)
    return next((folder / name for name in names if (folder / name).is_dir()), None)


def list_images(folder: Path, classes_of: Path | None = None, unlabelled: bool = False) -> tuple[list[Path], Tensor, int]:
    """(files, labels int64 [N], number of classes): one class a subfolder, in alphabetical order, of ``classes_of`` where given.

    unlabelled: images may also lie in the folder itself, all with label 0. Names that begin with a dot are left out, as everywhere.
    Raises FileNotFoundError for no image, ValueError for a subfolder without images or a class that ``classes_of`` does not have.
    """
    present, names = _subfolders(folder), _subfolders(classes_of or folder)
    if not present:
        files = _without_classes(folder, unlabelled)
        return files, no_labels(len(files)), 1
    unknown = sorted(set(present) - set(names))
    if unknown:
        raise ValueError(f"{folder}: expected the classes of {classes_of}, {', '.join(names)}; got also {', '.join(unknown)}")
    found = {name: _image_files(folder / name) for name in present}
    empty = [name for name, files in found.items() if not files]
    if empty:
        raise ValueError(f"{folder}: expected images ({', '.join(SUFFIXES)}) in every subfolder, found none in {', '.join(empty)}")
    labels = [names.index(name) for name, files in found.items() for _ in files]
    return [file for files in found.values() for file in files], torch.tensor(labels), len(names)


def _without_classes(folder: Path, unlabelled: bool) -> list[Path]:
    files = _image_files(folder)
    if not files:
        raise FileNotFoundError(f"{folder}: expected IDX files, CIFAR-10 batches, or a subfolder of images for each class")
    if not unlabelled:
        raise ValueError(
            f"{folder}: expected a subfolder of images for each class; --no-conditional trains a network without, got {len(files)} images"
        )
    return files


def no_labels(count: int) -> Tensor:
    """What stands for the labels of data that have none: int64 [count]."""
    return torch.zeros(count, dtype=torch.int64)


def _subfolders(folder: Path) -> list[str]:
    return sorted(child.name for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))


def _image_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES and not file.name.startswith("."))


def read_images(files: list[Path], preparation: Preparation) -> tuple[Tensor, bool]:
    """(RGB images uint8 [N, 3, H, W], whether they lie in a mapped file).

    All must have the size of the first, if they are not resized. A mapped file is kept in the cache and read again as long as the
    images' names, sizes and times are the same. Raises ValueError for an image that cannot be read or has another size.
    """
    shape = (len(files), *_read_image(files[0], preparation.resize).shape)
    size = math.prod(shape)
    if size <= preparation.limit_in_bytes:
        return _fill(torch.empty(shape, dtype=torch.uint8), files, preparation.resize), False
    cache = as_folder("cache", os.path.expanduser(preparation.cache)) / f"images-{_fingerprint(files, preparation.resize)}.u8"
    if not (cache.is_file() and cache.stat().st_size == size):
        print(f"{size / GIB:.2f} GiB of pixels, above memory_limit {preparation.memory_limit:g}: writing {cache}", flush=True)
        cache.parent.mkdir(parents=True, exist_ok=True)
        with replaced_whole(cache) as temporary:
            _reserve(temporary, size)
            _fill(torch.from_file(str(temporary), shared=True, size=size, dtype=torch.uint8).reshape(shape), files, preparation.resize)
    return torch.from_file(str(cache), shared=False, size=size, dtype=torch.uint8).reshape(shape), True


def _reserve(file: Path, size: int) -> None:
    """Take the room on the disk now: a full disk is an error here, but kills a process that writes to a mapped file."""
    if hasattr(os, "posix_fallocate"):
        with file.open("r+b") as opened:
            os.posix_fallocate(opened.fileno(), 0, size)


def _fingerprint(files: list[Path], resize: int) -> str:
    digest = hashlib.sha256(str(resize).encode())
    for file in files:
        status = file.stat()
        digest.update(f"{file.resolve()}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:20]


def _fill(images: Tensor, files: list[Path], resize: int) -> Tensor:
    for number, file in enumerate(_with_progress(files)):
        image = _read_image(file, resize)
        if image.shape != images.shape[1:]:
            height, width = images.shape[2:]
            raise ValueError(
                f"{file}: expected {height}x{width} pixels like {files[0].name}, got {image.shape[1]}x{image.shape[2]};"
                " --resize brings all to one size"
            )
        images[number] = image
    return images


def _with_progress(files: list[Path]) -> Iterable[Path]:
    if len(files) < FEW or not sys.stderr.isatty() or find_spec("tqdm") is None:
        return files
    from tqdm import tqdm

    return tqdm(files, desc="reading images", unit="image", dynamic_ncols=True)


def _read_image(file: Path, resize: int) -> Tensor:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("a folder of images needs Pillow: pip install pillow, or 'fm_fast[train]'") from error
    try:
        with Image.open(file) as image:
            mode = image.mode
            rgb = image if mode.startswith(WIDE_MODES) else image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file}: expected a readable image, got: {error}") from error
    if mode.startswith(WIDE_MODES):
        raise ValueError(f"{file}: expected 8 bits a channel, got an image of mode {mode}")
    rgb = _middle_square(rgb, resize) if resize else rgb
    pixels = torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8)
    return pixels.reshape(rgb.height, rgb.width, 3).permute(2, 0, 1)


def _middle_square(image: Any, size: int) -> Any:
    """Each pixel of the result is the mean of those it covers when the image shrinks (Pillow's box filter), as for ImageNet 32 and 64."""
    from PIL import Image

    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.resize((size, size), Image.Resampling.BOX, box=(left, top, left + side, top + side))
