"""Data sets as one uint8 tensor of images and one int64 tensor of labels, and the order in which training reads them."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fm_fast.random import noise
from fm_fast.train.cifar import is_cifar_folder, read_cifar10
from fm_fast.train.idx import read_idx
from fm_fast.train.npz import read_npz

DIGITS = Path(__file__).parent.parent / "datasets" / "digits.npz"
DIGITS_TRAIN = 1500
DIGITS_LEVELS = 17
LEVELS = 256
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")


@dataclass(frozen=True)
class Dataset:
    """images: uint8 [N, C, H, W] with values 0..levels-1; labels: int64 [N] in 0..classes-1."""

    name: str
    images: Tensor
    labels: Tensor
    classes: int
    levels: int = LEVELS

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device) -> "Dataset":
        """The same data on a device: small sets stay there for the whole run."""
        return Dataset(self.name, self.images.to(device), self.labels.to(device), self.classes, self.levels)


def load_dataset(source: str | Path, split: str = "train") -> Dataset:
    """The data set at `source`; split is "train" or "test".

    source: "digits" (shipped); a folder of IDX files (MNIST, Fashion-MNIST), of CIFAR-10 batches, or of images with one
    subfolder a class; a CIFAR-10 .tar.gz archive; an .npz archive with `images` and `labels`; or an IDX image file.
    An .npz archive, an IDX file and a folder of images have no splits: `split` is ignored.
    Raises FileNotFoundError for what is missing and ValueError, naming the file, for what is damaged.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split: expected 'train' or 'test', got {split!r}")
    if str(source) == "digits":
        return digits(split)
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder; expected 'digits' or a path to data")
    return _from_folder(path, split) if path.is_dir() else _from_file(path, split)


def levels_of(source: str) -> int:
    """The number of grey levels of the data at `source`, without reading them."""
    return DIGITS_LEVELS if source == "digits" else LEVELS


def digits(split: str = "train") -> Dataset:
    """The shipped 8x8 digits, 17 levels: 1500 to train on, 297 held out ("test"); see datasets/digits.txt."""
    images, labels = read_npz(DIGITS, ("images", "labels"))
    rows = slice(0, DIGITS_TRAIN) if split == "train" else slice(DIGITS_TRAIN, None)
    return make_dataset("digits", images[rows], labels[rows], levels=DIGITS_LEVELS, classes=10)


def make_dataset(name: str, images: Tensor, labels: Tensor, levels: int = LEVELS, classes: int | None = None) -> Dataset:
    """Checked data set: images uint8 [N, H, W] or [N, C, H, W], labels of any integer dtype [N]."""
    if images.dtype != torch.uint8 or images.ndim not in (3, 4) or images.numel() == 0:
        raise ValueError(f"{name}: expected images uint8 [N, H, W] or [N, C, H, W], not empty, got {images.dtype} {list(images.shape)}")
    if labels.shape != images.shape[:1]:
        raise ValueError(f"{name}: expected one label an image, {len(images)}, got {list(labels.shape)}")
    images = images.unsqueeze(1) if images.ndim == 3 else images
    classes = int(labels.max()) + 1 if classes is None else classes
    _check_ranges(name, images, labels, levels, classes)
    return Dataset(name, images.contiguous(), labels.to(torch.int64), classes, levels)


def _check_ranges(name: str, images: Tensor, labels: Tensor, levels: int, classes: int) -> None:
    if int(images.max()) >= levels:
        raise ValueError(f"{name}: expected pixel values below {levels}, got {int(images.max())}")
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise ValueError(f"{name}: expected labels in 0..{classes - 1}, got {int(labels.min())}..{int(labels.max())}")


def _from_file(path: Path, split: str) -> Dataset:
    if path.name.endswith((".tar.gz", ".tgz", ".tar")):
        return make_dataset(path.name, *read_cifar10(path, split), classes=10)
    if path.suffix == ".npz":
        images, labels = read_npz(path, ("images", "labels"))
        return make_dataset(path.name, images, labels)
    if "idx3-ubyte" in path.name:
        return make_dataset(path.name, read_idx(path, 3), read_idx(_label_file(path), 1))
    raise ValueError(f"{path}: expected a .npz, an *-images-idx3-ubyte[.gz] or a CIFAR-10 .tar.gz file")


def _label_file(images: Path) -> Path:
    return images.with_name(images.name.replace("images", "labels").replace("idx3", "idx1"))


def _from_folder(folder: Path, split: str) -> Dataset:
    if is_cifar_folder(folder):
        return make_dataset(folder.name, *read_cifar10(folder, split), classes=10)
    idx_files = sorted(folder.glob("*-images-idx3-ubyte*"))
    if idx_files:
        return _from_file(_idx_file_of_split(folder, idx_files, split), split)
    return _from_image_folder(folder)


def _idx_file_of_split(folder: Path, files: list[Path], split: str) -> Path:
    prefixes = ("train",) if split == "train" else ("t10k", "test")
    for file in files:
        if file.name.startswith(prefixes):
            return file
    raise FileNotFoundError(f"{folder}: expected {prefixes[0]}-images-idx3-ubyte[.gz], found {[file.name for file in files]}")


def _from_image_folder(folder: Path) -> Dataset:
    """One class a subfolder, in alphabetical order; every image is read as RGB and must have the size of the first."""
    names = sorted(child.name for child in folder.iterdir() if child.is_dir())
    files = [(file, number) for number, name in enumerate(names) for file in _image_files(folder / name)]
    if not files:
        raise FileNotFoundError(f"{folder}: expected IDX files, CIFAR-10 batches, or a subfolder of images for each class")
    images = [_read_image(file) for file, _ in files]
    for (file, _), image in zip(files, images, strict=True):
        if image.shape != images[0].shape:
            height, width = images[0].shape[1:]
            raise ValueError(f"{file}: expected {height}x{width} pixels like {files[0][0].name}, got {image.shape[1]}x{image.shape[2]}")
    return make_dataset(folder.name, torch.stack(images), torch.tensor([number for _, number in files]), classes=len(names))


def _image_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)


def _read_image(file: Path) -> Tensor:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("a folder of images needs Pillow: pip install pillow") from error
    try:
        with Image.open(file) as image:
            rgb = image.convert("RGB")
            pixels = torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8)
            return pixels.reshape(rgb.height, rgb.width, 3).permute(2, 0, 1)
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{file}: expected a readable image, got: {error}") from error


def epoch_order(size: int, seed: int, epoch: int) -> Tensor:
    """A permutation of 0..size-1 as a pure function of (seed, epoch): int64 [size], on the CPU.

    The ranks of the words of stream data_order, whose step is the epoch and whose sample ids are the indices.
    """
    words = noise((size,), seed=seed, step=epoch, stream="data_order", kind="word", device="cpu")
    return words.argsort(stable=True)


class DataOrder:
    """Which image is at each position of an endless, shuffled sequence; keeps the latest epoch's permutation.

    `order.indices(first, count)`: int64 [count], the same whether positions are read in one batch or in several.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed
        self._epoch, self._permutation = -1, torch.empty(0, dtype=torch.int64)

    def indices(self, first: int, count: int) -> Tensor:
        parts, position, last = [], first, first + count
        while position < last:
            start = position % self.size
            length = min(last - position, self.size - start)
            parts.append(self._order_of(position // self.size)[start : start + length])
            position += length
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)

    def _order_of(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            self._epoch, self._permutation = epoch, epoch_order(self.size, self.seed, epoch)
        return self._permutation
