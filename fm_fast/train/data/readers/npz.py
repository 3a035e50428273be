"""Read the arrays of an .npz archive, with errors that name the file and what was expected."""

import lzma
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fm_fast.train.prepare import CHANNELS

# What the readers of archives raise for it: of their own and, for an array's header that is none, of Python's.
DAMAGE = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, ValueError, RuntimeError, OSError, MemoryError, OverflowError,
    SyntaxError, TypeError, tokenize.TokenError,
)  # fmt: skip


def read_npz(path: Path, names: tuple[str, ...], real: Collection[str] = ()) -> list[Tensor]:
    """The integer arrays of those names in an .npz archive, in that order.

    real: names whose arrays may also hold floating-point numbers. Raises ValueError for a file that is not an archive, lacks a name, or
    holds something else under it.
    """
    found, arrays = _load(path, names)
    if len(arrays) < len(names):
        raise ValueError(f"{path}: expected arrays {', '.join(names)}, found {', '.join(found) or 'none'}")
    return [_numbers(arrays[name], f"{path}[{name}]", name in real) for name in names]


def array_names(path: Path) -> set[str]:
    """The names of the arrays, without reading them; none where the archive is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except (FileNotFoundError, PermissionError):
        raise
    except DAMAGE:
        return set()


def _load(path: Path, names: tuple[str, ...]) -> tuple[list[str], dict[str, np.ndarray | bytes]]:
    """The names of all arrays, and those asked for that are there: another may be large."""
    with damage_told(path), zipfile.ZipFile(path), np.load(path, allow_pickle=False) as archive:
        return archive.files, {name: archive[name] for name in names if name in archive.files}


@contextmanager
def damage_told(path: Path) -> Iterator[None]:
    """What readers raise for a damaged archive as a ValueError that names it."""
    try:
        yield
    except (FileNotFoundError, PermissionError):
        raise
    except DAMAGE as error:
        raise ValueError(f"{path}: expected a readable .npz archive, got: {error}") from error


def as_images(array: Tensor) -> Tensor:
    """[N, S, S] as [N, 1, S, S] and [N, S, S, C] as [N, C, S, S]; what cannot be square images with their channels last, as it is."""
    if array.ndim == 3:
        return array.unsqueeze(1)
    if array.ndim == 4 and array.shape[1] == array.shape[2] != array.shape[3] and array.shape[3] in CHANNELS:
        return array.permute(0, 3, 1, 2)
    return array


def _numbers(array: np.ndarray | bytes, name: str, real: bool) -> Tensor:
    if isinstance(array, bytes):
        raise ValueError(f"{name}: expected an array, got another file of {len(array)} bytes")
    if real and array.dtype.kind == "f" and array.dtype.itemsize <= 8:
        return torch.from_numpy(np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="), copy=False)))
    if array.dtype.kind not in "iu" or array.dtype == np.uint64:
        kinds = "integers or floating-point numbers" if real else "integers"
        raise ValueError(f"{name}: expected an array of {kinds} that torch can hold, got dtype {array.dtype}")
    return torch.from_numpy(np.ascontiguousarray(array if array.dtype == np.uint8 else array.astype(np.int64)))
