"""The images of .npz archives that are too large for memory, read piece by piece."""

import math
import zipfile
from collections.abc import Iterator, Sequence
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
class StoredImages:
    """uint8 or floating-point images of one archive. shape: as they are stored."""

    path: Path
    name: str
    shape: tuple[int, ...]
    stored: np.dtype
    fortran: bool

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return HELD[self.stored.itemsize]

    @property
    def size(self) -> tuple[int, ...]:
        """(C, H, W)."""
        return tuple(as_images(torch.empty(self.shape, device="meta")).shape[1:])

    @property
    def together(self) -> int:
        """How many are read at once."""
        return max(1, PART // self._bytes_of_one)

    def parts(self) -> Iterator[Tensor]:
        """In order: tensors [n, C, H, W]. Raises ValueError, naming the archive, where it is damaged."""
        with damage_told(self.path), _opened(self.path, self.name) as stream:
            _header(stream)
            for first in range(0, len(self), self.together):
                yield as_images(self._read(stream, min(self.together, len(self) - first))).to(self.dtype)

    @property
    def _bytes_of_one(self) -> int:
        return math.prod(self.shape[1:]) * self.stored.itemsize

    def _read(self, stream: IO[bytes], count: int) -> Tensor:
        numbers = np.frombuffer(stream.read(count * self._bytes_of_one), self.stored)
        return torch.from_numpy(numbers.astype(self.stored.newbyteorder("=")).reshape(count, *self.shape[1:]))


@dataclass(frozen=True)
class LargeImages:
    """Those of archives of one kind, one after the other. rows: which of them are meant, int64 in ascending order."""

    pieces: tuple[StoredImages, ...]
    rows: Tensor

    @property
    def files(self) -> list[Path]:
        return [piece.path for piece in self.pieces]

    @property
    def name(self) -> str:
        """Of the array in each archive."""
        return self.pieces[0].name

    @property
    def dtype(self) -> torch.dtype:
        return self.pieces[0].dtype

    @property
    def size(self) -> torch.Size:
        """[n, C, H, W] of those that are meant."""
        return torch.Size([len(self.rows), *self.pieces[0].size])

    @property
    def number_of_parts(self) -> int:
        """At most."""
        return sum(-(-len(piece) // piece.together) for piece in self.pieces)

    def parts(self) -> Iterator[tuple[Path, Tensor]]:
        """Those that are meant, in order: the archive and a tensor [n, C, H, W]."""
        first = 0
        for piece in self.pieces:
            for part in piece.parts():
                begin, end = torch.searchsorted(self.rows, torch.tensor([first, first + len(part)])).tolist()
                if end > begin:
                    yield piece.path, part[self.rows[begin:end] - first]
                first += len(part)


def large_images(files: Sequence[Path], name: str, preparation: Preparation) -> LargeImages | None:
    """The arrays of that name if they are uint8 or floating-point images that together do not fit into the memory's limit.

    None for what fits, and where one is no such array, since to read it as a whole tells what is wrong. Raises ValueError for arrays of
    different kinds.
    """
    pieces = [piece for piece in (_stored(file, name) for file in files) if piece is not None]
    if len(pieces) < len(files) or not is_mapped(sum(map(_bytes, pieces)), preparation):
        return None
    for piece in pieces:
        if piece.fortran:
            limit = f"above memory_limit {preparation.memory_limit:g}"
            raise ValueError(f"{piece.path}[{name}]: expected an array in C's order {limit}, got Fortran's")
        require_alike(piece.path, (piece.dtype, piece.size), pieces[0].path, (pieces[0].dtype, pieces[0].size))
    return LargeImages(tuple(pieces), torch.arange(sum(map(len, pieces))))


def require_alike(file: Path, kind: object, first: Path, expected: object) -> None:
    """Raises ValueError for an archive of another kind than the first: (dtype, (C, H, W))."""
    if kind != expected:
        raise ValueError(f"{file}: expected images like those of {first.name}, {expected}, got {kind}")


def _stored(path: Path, name: str) -> StoredImages | None:
    try:
        with _opened(path, name) as stream:
            shape, fortran, stored = _header(stream)
            there = _size(path, name) - stream.tell()
    except (*DAMAGE, KeyError):
        return None
    if there != math.prod(shape) * stored.itemsize:
        return None  # a header that is wrong may ask for any amount of memory
    real = stored.kind == "f" and stored.itemsize in HELD
    return StoredImages(path, name, shape, stored, fortran) if (real or stored == np.uint8) and len(shape) in (3, 4) else None


def _bytes(images: StoredImages) -> int:
    return math.prod(images.shape) * images.dtype.itemsize


def _size(path: Path, name: str) -> int:
    """Bytes of the unpacked array with its header."""
    with zipfile.ZipFile(path) as archive:
        return archive.getinfo(f"{name}.npy").file_size


@contextmanager
def _opened(path: Path, name: str) -> Iterator[IO[bytes]]:
    with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as stream:
        yield stream


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, whether in Fortran's order, dtype); the numbers follow."""
    return HEADERS[np.lib.format.read_magic(stream)](stream)
