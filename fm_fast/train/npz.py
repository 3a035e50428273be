"""Read .npz archives without numpy: the shipped digits must load where only torch is installed."""

import ast
import math
import zipfile
import zlib
from pathlib import Path

import torch
from torch import Tensor

MAGIC = b"\x93NUMPY"
DTYPES = {"|u1": torch.uint8, "|i1": torch.int8, "<i2": torch.int16, "<i4": torch.int32, "<i8": torch.int64}


def read_npz(path: Path, names: tuple[str, ...]) -> list[Tensor]:
    """The integer arrays of those names in an .npz archive, in that order.

    Raises ValueError for a file that is not an archive, lacks a name, or holds another dtype under it.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            missing = {f"{name}.npy" for name in names} - set(archive.namelist())
            if missing:
                raise ValueError(f"{path}: expected arrays {', '.join(names)}, found {archive.namelist()}")
            return [parse_npy(archive.read(f"{name}.npy"), f"{path}[{name}]") for name in names]
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path}: expected a readable .npz archive, got: {error}") from error


def parse_npy(content: bytes, name: str) -> Tensor:
    """The array in the bytes of one .npy file (format versions 1 and 2, C order). `name` is for error messages."""
    if content[:6] != MAGIC or content[6] not in (1, 2):
        raise ValueError(f"{name}: expected an .npy array of format 1 or 2, got bytes starting with {content[:8]!r}")
    width = 2 if content[6] == 1 else 4
    start = 8 + width + int.from_bytes(content[8 : 8 + width], "little")
    header = ast.literal_eval(content[8 + width : start].decode("latin1"))
    return _array(header["descr"], header["shape"], header["fortran_order"], content[start:], name)


def _array(descr: str, shape: tuple[int, ...], fortran: bool, content: bytes, name: str) -> Tensor:
    if descr not in DTYPES or fortran:
        raise ValueError(f"{name}: expected a C-ordered array of dtype {', '.join(DTYPES)}, got {descr!r}, fortran_order={fortran}")
    expected = math.prod(shape) * DTYPES[descr].itemsize
    if len(content) != expected:
        raise ValueError(f"{name}: expected {expected} bytes for shape {list(shape)}, got {len(content)}")
    return torch.frombuffer(bytearray(content), dtype=DTYPES[descr]).reshape(shape) if content else torch.empty(shape, dtype=DTYPES[descr])
