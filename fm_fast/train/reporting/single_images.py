"""Samples as PNG files of their own, in a folder without others, as programs that compute FID read them."""

import os
from pathlib import Path

from torch import Tensor

from fm_fast.train.files import TEMPORARY, as_folder, raise_with_name
from fm_fast.train.reporting.picture import COLOUR_TYPES, to_8_bit, write_png


def require_empty(name: str, text: str) -> Path:
    """The folder that the option of that name asks for. OSError where files of others lie or none can, ValueError where a file is."""
    folder = as_folder(name, text)
    entries = sum(1 for _ in folder.iterdir()) if folder.is_dir() else 0
    if entries:
        raise FileExistsError(
            f"{name}: expected a new or an empty folder, so that other images stay apart, got {folder} with {entries} in it"
        )
    nearest = next(place for place in (folder, *folder.parents) if place.is_dir())
    if not os.access(nearest, os.W_OK):
        raise PermissionError(f"{name}: expected a folder that can be written into, got {folder}")
    return folder


class ImageFiles:
    """Numbers the samples from 0. Each file is whole as soon as it is there, so an interruption leaves all that were finished."""

    def __init__(self, folder: Path, channels: int, levels: int | None) -> None:
        """Raises ValueError for images that PNG files do not hold."""
        if levels is None:
            raise ValueError("images: expected a network of grey levels, got one of real numbers, which an .npz archive holds (--out)")
        if channels not in COLOUR_TYPES:
            raise ValueError(f"images: expected a network of 1 or 3 channels, got {channels}; an .npz archive takes any (--out)")
        self._folder, self._levels, self._written = folder, levels, 0

    def add(self, images: Tensor, labels: Tensor) -> None:
        """Integer images [B, C, H, W] with values 0..levels-1 and their classes int64 [B], below 0 for none."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for image, label in zip(to_8_bit(images, self._levels).cpu(), labels.tolist(), strict=True):
            of_class = f"-class-{label}" if label >= 0 else ""
            _write(self._folder / f"{self._written:06}{of_class}.png", image)
            self._written += 1


def _write(file: Path, image: Tensor) -> None:
    temporary = file.with_suffix(TEMPORARY)
    try:
        write_png(temporary, image)
        os.replace(temporary, file)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        raise_with_name(error, file)
        raise
