"""Read IDX files, plain or gzipped: the format of MNIST and Fashion-MNIST."""

import gzip
import math
import zlib
from pathlib import Path

import torch
from torch import Tensor

UNSIGNED_BYTE = 8


def read_idx(path: Path, dimensions: int) -> Tensor:
    """The uint8 array in an IDX file with that many dimensions.

    Raises FileNotFoundError if there is none, ValueError for a wrong magic number, a wrong number of dimensions, or a wrong length.
    """
    content = _content(path)
    if len(content) < 4 + 4 * dimensions:
        raise ValueError(f"{path}: expected an IDX header of {4 + 4 * dimensions} bytes, got a file of {len(content)} bytes")
    magic, expected = int.from_bytes(content[:4], "big"), UNSIGNED_BYTE << 8 | dimensions
    if magic != expected:
        raise ValueError(f"{path}: expected IDX magic number 0x{expected:08x} (uint8, {dimensions}-d), got 0x{magic:08x}")
    shape = [int.from_bytes(content[4 + 4 * axis : 8 + 4 * axis], "big") for axis in range(dimensions)]
    return _array(path, shape, content[4 + 4 * dimensions :])


def _content(path: Path) -> bytes:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such IDX file")
    if path.suffix != ".gz":
        return path.read_bytes()
    try:
        return gzip.decompress(path.read_bytes())
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: expected a complete gzip file, got: {error}") from error


def _array(path: Path, shape: list[int], content: bytes) -> Tensor:
    if len(content) != math.prod(shape):
        raise ValueError(f"{path}: expected {math.prod(shape)} bytes of data for shape {shape}, got {len(content)}")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).reshape(shape) if content else torch.empty(shape, dtype=torch.uint8)
