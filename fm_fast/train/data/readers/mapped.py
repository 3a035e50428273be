"""Images in memory or, where they are too many, in a file of the cache that is mapped into memory."""

import math
import mmap
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from fm_fast.train.data.readers.cache import cache_file, make_once
from fm_fast.train.prepare import GIB, Preparation

# Without it Linux wants room in memory for all of a private mapping. Python names it from 3.13 on.
MAP_NORESERVE = 0x4000
SUFFIXES = {torch.uint8: ".u8", torch.float16: ".f16", torch.float32: ".f32"}


def filled(
    shape: tuple[int, ...],
    files: Iterable[Path],
    reading: str,
    preparation: Preparation,
    fill: Callable[[Tensor], None],
    dtype: torch.dtype = torch.uint8,
) -> tuple[Tensor, bool]:
    """(tensor of that shape after ``fill``, whether it lies in a mapped file).

    A mapped file is used again as long as the names, sizes and times of ``files``, which are read by the way ``reading``, are the same.
    Raises ValueError where its images would have to be changed.
    """
    size = math.prod(shape) * dtype.itemsize
    if not is_mapped(size, preparation):
        pixels = torch.empty(shape, dtype=dtype)
        fill(pixels)
        return pixels, False
    if preparation.pool > 1 or preparation.pad > 0:
        raise ValueError(f"pool, pad: expected 1 and 0 {_above(size, preparation)}, got {preparation.pool} and {preparation.pad}")
    cache = cache_file(preparation, files, reading, SUFFIXES[dtype])

    def make(place: Path) -> None:
        print(f"{_above(size, preparation).removeprefix('for ')}: writing {cache}", flush=True)
        _reserve(place, size)
        fill(torch.from_file(str(place), shared=True, size=math.prod(shape), dtype=dtype).reshape(shape))

    make_once(cache, lambda: cache.is_file() and cache.stat().st_size == size, make)
    return _mapped(cache, size, dtype).reshape(shape), True


def is_mapped(size: int, preparation: Preparation) -> bool:
    """Whether images of so many bytes lie in a file."""
    return size > preparation.limit_in_bytes


def _above(size: int, preparation: Preparation) -> str:
    return f"for {size / GIB:.2f} GiB of images, above memory_limit {preparation.memory_limit:g}"


def _mapped(file: Path, size: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    """Its numbers, of so many bytes, read when they are asked for; what is written to them stays in memory."""
    if not sys.platform.startswith("linux"):
        return torch.from_file(str(file), shared=False, size=size // dtype.itemsize, dtype=dtype)
    with file.open("rb") as opened:
        pages = mmap.mmap(opened.fileno(), size, flags=mmap.MAP_PRIVATE | MAP_NORESERVE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    return torch.frombuffer(pages, dtype=dtype)


def _reserve(file: Path, size: int) -> None:
    """Take the room on the disk now: a full disk is an error here, but kills a process that writes to a mapped file."""
    if hasattr(os, "posix_fallocate"):
        with file.open("r+b") as opened:
            os.posix_fallocate(opened.fileno(), 0, size)
