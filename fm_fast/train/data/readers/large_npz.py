"""The images of an .npz archive that is too large for memory, read piece by piece."""

import math
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from fm_fast.train.data.readers.mapped import is_mapped
from fm_fast.train.data.readers.npz import DAMAGE, as_images, damage_told
from fm_fast.train.prepare import Preparation

PART = 2**21  # bytes that are read at once: a processor's cache holds them
HELD = {1: torch.uint8, 2: torch.float16, 4: torch.float32, 8: torch.float32}  # by the size of a number in the archive
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


@dataclass(frozen=True)
class LargeImages:
    """uint8 or floating-point images of an archive. shape: as they are stored; rows: which of them are meant, int64 in ascending order."""

    path: Path
    name: str
    shape: tuple[int, ...]
    stored: np.dtype
    rows: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return HELD[self.stored.itemsize]

    @property
    def size(self) -> torch.Size:
        """[n, C, H, W] of those that are meant."""
        return torch.Size([len(self.rows), *as_images(torch.empty(self.shape, device="meta")).shape[1:]])

    def parts(self) -> Iterator[Tensor]:
        """Those that are meant, in order: tensors [n, C, H, W]. Raises ValueError, naming the archive, where it is damaged."""
        with damage_told(self.path), _opened(self.path, self.name) as stream:
            _header(stream)
            for first in range(0, self.shape[0], self._together):
                part = self._read(stream, min(self._together, self.shape[0] - first))
                here = self.rows[(self.rows >= first) & (self.rows < first + len(part))] - first
                if len(here):
                    yield as_images(part)[here].to(self.dtype)

    @property
    def number_of_parts(self) -> int:
        """At most."""
        return -(-self.shape[0] // self._together)

    @property
    def _together(self) -> int:
        return max(1, PART // self._bytes_of_one)

    @property
    def _bytes_of_one(self) -> int:
        return math.prod(self.shape[1:]) * self.stored.itemsize

    def _read(self, stream: IO[bytes], count: int) -> Tensor:
        numbers = np.frombuffer(stream.read(count * self._bytes_of_one), self.stored)
        return torch.from_numpy(numbers.astype(self.stored.newbyteorder("=")).reshape(count, *self.shape[1:]))


def large_images(path: Path, name: str, preparation: Preparation) -> LargeImages | None:
    """The array of that name if it is uint8 or floating-point images that do not fit into the memory's limit.

    None for what fits, and for what is no such array, since to read it as a whole tells what is wrong.
    """
    try:
        with _opened(path, name) as stream:
            shape, fortran, stored = _header(stream)
    except (*DAMAGE, KeyError):
        return None
    real = stored.kind == "f" and stored.itemsize in HELD
    if not (real or stored == np.uint8) or len(shape) not in (3, 4) or not is_mapped(_bytes(shape, stored), preparation):
        return None
    if fortran:
        raise ValueError(f"{path}[{name}]: expected an array in C's order above memory_limit {preparation.memory_limit:g}, got Fortran's")
    return LargeImages(path, name, shape, stored, torch.arange(shape[0]))


def _bytes(shape: tuple[int, ...], stored: np.dtype) -> int:
    return math.prod(shape) * HELD[stored.itemsize].itemsize


@contextmanager
def _opened(path: Path, name: str) -> Iterator[IO[bytes]]:
    with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as stream:
        yield stream


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, whether in Fortran's order, dtype); the numbers follow."""
    return HEADERS[np.lib.format.read_magic(stream)](stream)
