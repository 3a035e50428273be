"""Pixels in memory or, where they are too many, in a file of the cache that is mapped into memory."""

import hashlib
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from fm_fast.train.files import as_folder, replaced_whole
from fm_fast.train.prepare import GIB, Preparation


def filled(
    shape: tuple[int, ...], files: Iterable[Path], reading: str, preparation: Preparation, fill: Callable[[Tensor], None]
) -> tuple[Tensor, bool]:
    """(uint8 tensor of that shape after ``fill``, whether it lies in a mapped file).

    A mapped file is used again as long as the names, sizes and times of ``files``, which are read by the way ``reading``, are the same.
    """
    size = math.prod(shape)
    if size <= preparation.limit_in_bytes:
        pixels = torch.empty(shape, dtype=torch.uint8)
        fill(pixels)
        return pixels, False
    cache = as_folder("cache", os.path.expanduser(preparation.cache)) / f"images-{fingerprint(files, reading)}.u8"
    if not (cache.is_file() and cache.stat().st_size == size):
        print(f"{size / GIB:.2f} GiB of pixels, above memory_limit {preparation.memory_limit:g}: writing {cache}", flush=True)
        cache.parent.mkdir(parents=True, exist_ok=True)
        with replaced_whole(cache) as temporary:
            _reserve(temporary, size)
            fill(torch.from_file(str(temporary), shared=True, size=size, dtype=torch.uint8).reshape(shape))
    return torch.from_file(str(cache), shared=False, size=size, dtype=torch.uint8).reshape(shape), True


def _reserve(file: Path, size: int) -> None:
    """Take the room on the disk now: a full disk is an error here, but kills a process that writes to a mapped file."""
    if hasattr(os, "posix_fallocate"):
        with file.open("r+b") as opened:
            os.posix_fallocate(opened.fileno(), 0, size)


def fingerprint(files: Iterable[Path], reading: str) -> str:
    """Of the files as they are now, and of the way in which they are read."""
    digest = hashlib.sha256(reading.encode())
    for file in files:
        status = file.stat()
        digest.update(f"{file.resolve()}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:20]
