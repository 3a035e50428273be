"""Read CIFAR-10 batches in its "python" and "binary" forms, from a folder or from the .tar.gz archive itself."""

import io
import lzma
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor

from fm_fast.train.data.readers.pickled import unpickled

IMAGE_BYTES = 3 * 32 * 32
TRAIN_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
TEST_BATCHES = ("test_batch",)
SUBFOLDERS = ("", "cifar-10-batches-py", "cifar-10-batches-bin")  # the archives' own


def find_cifar_folder(folder: Path) -> Path | None:
    """The folder itself or its subfolder that the archive makes, whichever holds the first training batch, pickled or binary; else None."""
    places = (folder / name for name in SUBFOLDERS)
    return next((place for place in places if any((place / (TRAIN_BATCHES[0] + suffix)).is_file() for suffix in ("", ".bin"))), None)


def read_cifar10(path: Path, split: str) -> tuple[Tensor, Tensor]:
    """(images uint8 [N, 3, 32, 32], labels int64 [N]) of a folder or an archive; N is 50000 or 10000.

    Raises FileNotFoundError if batches are missing, ValueError if one is damaged.
    """
    wanted = TEST_BATCHES if split == "test" else TRAIN_BATCHES
    files = dict(_folder_files(path) if path.is_dir() else _archive_files(path))
    batches = [_batch(path, files, name) for name in wanted]
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])


def _folder_files(folder: Path) -> Iterator[tuple[str, bytes]]:
    for file in sorted(folder.glob("*_batch*")):
        yield file.name, file.read_bytes()


def _archive_files(archive: Path) -> Iterator[tuple[str, bytes]]:
    try:
        with tarfile.open(archive) as members:
            for member in members:
                content = members.extractfile(member) if "_batch" in member.name else None
                if content is not None:
                    yield PurePath(member.name).name, content.read()
            _read_on(members.fileobj)
    except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"{archive}: expected a complete tar archive of CIFAR-10, got: {error}") from error


def _read_on(archive: Any) -> None:
    """To the end, where the compressed file's checksum is: behind the last member, tarfile does not look."""
    while archive.read(1 << 20):
        pass


def _batch(path: Path, files: dict[str, bytes], name: str) -> tuple[Tensor, Tensor]:
    if name in files:
        return _python_batch(files[name], f"{path}: {name}")
    if name + ".bin" in files:
        return _binary_batch(files[name + ".bin"], f"{path}: {name}.bin")
    raise FileNotFoundError(f"{path}: expected a CIFAR-10 batch {name} or {name}.bin, found {sorted(files) or 'none'}")


def _binary_batch(content: bytes, name: str) -> tuple[Tensor, Tensor]:
    record = 1 + IMAGE_BYTES
    if not content or len(content) % record:
        raise ValueError(f"{name}: expected a multiple of {record} bytes, got {len(content)}")
    rows = torch.frombuffer(bytearray(content), dtype=torch.uint8).reshape(-1, record)
    return _checked(rows[:, 1:], rows[:, 0], name)


def _python_batch(content: bytes, name: str) -> tuple[Tensor, Tensor]:
    batch = unpickled(io.BytesIO(content), name, "CIFAR-10")
    try:
        pixels, labels = torch.as_tensor(batch[b"data"]), torch.as_tensor(batch[b"labels"])
    except (LookupError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{name}: expected a dictionary with arrays b'data' and b'labels', got {type(batch).__name__}: {error}") from error
    return _checked(pixels, labels, name)


def _checked(pixels: Tensor, labels: Tensor, name: str) -> tuple[Tensor, Tensor]:
    if pixels.dtype != torch.uint8 or pixels.ndim != 2 or pixels.shape[1] != IMAGE_BYTES:
        raise ValueError(f"{name}: expected uint8 images [N, {IMAGE_BYTES}], got {pixels.dtype} {list(pixels.shape)}")
    if labels.shape != pixels.shape[:1]:
        raise ValueError(f"{name}: expected {len(pixels)} labels, one an image, got {labels.numel()}")
    if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
        raise ValueError(f"{name}: expected whole numbers as labels, got {labels.dtype}")
    return pixels.reshape(-1, 3, 32, 32), labels.to(torch.int64)
