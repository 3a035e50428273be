"""Data sets as one uint8 tensor of images and one int64 tensor of labels, and the order in which training reads them."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fm_fast.random import noise
from fm_fast.train.prepare import CHANNELS, WITHOUT_LABELS, Preparation, pooled_and_padded, rows_of_split
from fm_fast.train.readers.cifar import find_cifar_folder, read_cifar10
from fm_fast.train.readers.downsampled_imagenet import CLASSES, TRAIN_BATCHES, Batches, batches_in, read_batches
from fm_fast.train.readers.idx import read_idx
from fm_fast.train.readers.image_folder import beside_parts, list_images, named, no_labels, preparation_of, read_images, split_folder
from fm_fast.train.readers.npz import array_names, read_npz

DIGITS = Path(__file__).parent.parent / "datasets" / "digits.npz"
DIGITS_TRAIN = 1500
DIGITS_LEVELS = 17
LEVELS = 256
ARRAYS = {"images", "labels", "test_images", "test_labels"}
UNNAMED = ("arr_0", "arr_1")  # images and labels where numpy named the arrays, as in guided-diffusion's archives
MOST_CLASSES = 1_000_000  # each has a row of weights; more are labels of another kind
TEST_FILES = ("t10k", "test")  # beginnings of their names
IDX_IMAGES = re.compile(r"-images[-.]idx3-ubyte(\.gz)?$")
# How held-out images come about: a test part of the source, a share of it that is put aside, or not at all.
TEST_PART, SHARE, UNDIVIDED = "test part", "share", "undivided"
# Where Debian's and Ubuntu's package dataset-fashion-mnist puts it, and a place of one's own.
FASHION_FOLDERS = (Path("/usr/share/datasets/fashion-mnist"), Path("data/fashion-mnist"))
PREPARED = Preparation()
SHIPPED = frozenset({"digits", "fashion"})  # sources by name instead of a path


@dataclass(frozen=True)
class Dataset:
    """images: uint8 [N, C, H, W] with values 0..levels-1; labels: int64 [N] in 0..classes-1.

    mapped: the images lie in a file, hence on the CPU, and go to the labels' device batch by batch. division: TEST_PART where the source
    has one, SHARE where `test_share` is held out; UNDIVIDED data are the same images for training and for tests. left_out: what else lies
    there, in lines for people.
    """

    name: str
    images: Tensor
    labels: Tensor
    classes: int
    levels: int = LEVELS
    mapped: bool = False
    division: str = TEST_PART
    left_out: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    @property
    def device(self) -> torch.device:
        """Where batches are."""
        return self.labels.device

    def to(self, device: torch.device) -> "Dataset":
        """The same data on a device: sets that fit into memory stay there for the whole run."""
        return replace(self, images=self.images if self.mapped else self.images.to(device), labels=self.labels.to(device))

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(images, labels) of the rows int64 [B], given on the CPU."""
        there = rows.to(self.device, non_blocking=True)
        images = self.images[rows if self.mapped else there]
        return images.to(self.device, non_blocking=True), self.labels[there]


def load_dataset(source: str | Path, split: str = "train", preparation: Preparation = PREPARED) -> Dataset:
    """The data set at `source`; split is "train" or "test".

    source: "digits" (shipped); "fashion" (Fashion-MNIST as installed by Debian's package dataset-fashion-mnist); a folder of IDX files
    (MNIST, Fashion-MNIST), of batches of CIFAR-10 or downsampled ImageNet, or of images with one subfolder a class, perhaps within train
    and test; a CIFAR-10 .tar.gz archive; an .npz archive with `images` and `labels`, perhaps `test_images` and `test_labels`, or with
    `arr_0` and `arr_1`; or an IDX image file.
    Of data without a test part, `preparation.test_share` is held out; if that is 0, both splits are all of them (UNDIVIDED).
    Where `preparation.unlabelled` allows it, an .npz archive may lack labels, and images may lie beside subfolders: all labels are 0 then.
    Raises FileNotFoundError for what is missing and ValueError, naming the file, for what is damaged.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split: expected 'train' or 'test', got {split!r}")
    dataset = _read(source, split, preparation)
    preparation = preparation.of_size(*dataset.images.shape[-2:])
    _check_size(dataset, preparation.resize)
    if dataset.division == UNDIVIDED and preparation.test_share > 0.0:
        rows = rows_of_split(len(dataset), preparation.test_share, split)
        dataset = replace(dataset, images=dataset.images[rows], labels=dataset.labels[rows], division=SHARE)
    if preparation.pool == 1 and preparation.pad == 0:
        return dataset
    return replace(dataset, images=pooled_and_padded(dataset.name, dataset.images, preparation))


def _check_size(dataset: Dataset, resize: int) -> None:
    """Only a folder's images are resized, when they are read."""
    height, width = dataset.images.shape[-2:]
    if resize and (height, width) != (resize, resize):
        raise ValueError(
            f"resize: expected 0 for {dataset.name} of {height}x{width} pixels, because only image files are resized"
            f" (pool and pad change others), got {resize}"
        )


def _read(source: str | Path, split: str, preparation: Preparation) -> Dataset:
    if str(source) == "digits":
        return digits(split)
    if str(source) == "fashion":
        return replace(_from_folder(_fashion_folder(), split, preparation), name="fashion")
    if not str(source):
        raise ValueError("data: expected 'digits', 'fashion' or a path to data, got ''")
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder; expected 'digits', 'fashion' or a path to data")
    return _from_folder(path, split, preparation) if path.is_dir() else _from_file(path, split, preparation)


def _fashion_folder() -> Path:
    for folder in FASHION_FOLDERS:
        if folder.is_dir():
            return folder
    places = " or ".join(map(str, FASHION_FOLDERS))
    raise FileNotFoundError(f"fashion: expected Fashion-MNIST in {places}; `apt-get install dataset-fashion-mnist`, or give --data FOLDER")


def levels_of(source: str) -> int:
    """The number of grey levels of the data at `source`, without reading them."""
    return DIGITS_LEVELS if source == "digits" else LEVELS


def with_levels(dataset: Dataset, levels: int) -> Dataset:
    """The same with that number of grey levels, since files do not tell theirs.

    ValueError for values beyond these, and for the shipped digits, whose number is known.
    """
    if dataset.levels == levels:
        return dataset
    if dataset.levels != LEVELS:
        raise ValueError(
            f"data: expected images of {levels} grey levels, as the run was trained on, got {dataset.name} with {dataset.levels}"
        )
    highest = int(dataset.images.max())
    if highest >= levels:
        raise ValueError(f"data: expected values below {levels}, the grey levels that the run was trained on, got {highest}")
    return replace(dataset, levels=levels)


def digits(split: str = "train") -> Dataset:
    """The shipped 8x8 digits, 17 levels: 1500 to train on, 297 held out ("test"); see datasets/digits.txt."""
    images, labels = read_npz(DIGITS, ("images", "labels"))
    rows = slice(0, DIGITS_TRAIN) if split == "train" else slice(DIGITS_TRAIN, None)
    return make_dataset("digits", images[rows], labels[rows], levels=DIGITS_LEVELS, classes=10)


def make_dataset(name: str, images: Tensor, labels: Tensor, levels: int = LEVELS, classes: int | None = None, **marks: Any) -> Dataset:
    """Checked data set (`marks`: mapped, division, left_out): images uint8 [N, H, W] or [N, C, H, W], labels of any integer dtype [N]."""
    if images.dtype != torch.uint8 or images.ndim not in (3, 4) or images.numel() == 0:
        raise ValueError(f"{name}: expected images uint8 [N, H, W] or [N, C, H, W], not empty, got {images.dtype} {list(images.shape)}")
    if labels.shape != images.shape[:1]:
        raise ValueError(f"{name}: expected one label an image, {len(images)}, got {list(labels.shape)}")
    images = images.unsqueeze(1) if images.ndim == 3 else images
    classes = int(labels.max()) + 1 if classes is None else classes
    if classes > MOST_CLASSES:
        raise ValueError(f"{name}: expected labels 0, 1, 2, ..., at most {MOST_CLASSES} classes, got a label {classes - 1}")
    _check_ranges(name, images, labels, levels, classes)
    return Dataset(name, images.contiguous(), labels.to(torch.int64), classes, levels, **marks)


def _check_ranges(name: str, images: Tensor, labels: Tensor, levels: int, classes: int) -> None:
    if levels < LEVELS and int(images.max()) >= levels:
        raise ValueError(f"{name}: expected pixel values below {levels}, got {int(images.max())}")
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise ValueError(f"{name}: expected labels in 0..{classes - 1}, got {int(labels.min())}..{int(labels.max())}")


def _from_file(path: Path, split: str, preparation: Preparation) -> Dataset:
    if path.name.endswith((".tar.gz", ".tgz", ".tar")):
        return make_dataset(path.name, *read_cifar10(path, split), classes=10)
    if path.suffix == ".npz":
        return _from_npz(path, split, preparation)
    if "idx3-ubyte" in path.name:
        return _from_idx(path)
    raise ValueError(f"{path}: expected a .npz, an *-images-idx3-ubyte[.gz] or a CIFAR-10 .tar.gz file")


def _from_npz(path: Path, split: str, preparation: Preparation) -> Dataset:
    names = array_names(path)
    if UNNAMED[0] in names and "images" not in names:
        labelled = _are_labelled(path, names, UNNAMED[1] in names, preparation)
        return _read_npz(path, UNNAMED, labelled, UNDIVIDED, _left_out(path, names - set(UNNAMED)))
    labelled, divided = _arrays_of(path, names, preparation)
    part = "test_" if divided and split == "test" else ""
    division = TEST_PART if divided else UNDIVIDED
    return _read_npz(path, (f"{part}images", f"{part}labels"), labelled, division, _left_out(path, names - ARRAYS))


def _left_out(path: Path, names: set[str]) -> tuple[str, ...]:
    return (f"note: {path}: {named('arrays', [Path(name) for name in names])} left out",) if names else ()


def _read_npz(path: Path, names: tuple[str, str], labelled: bool, division: str, left_out: tuple[str, ...]) -> Dataset:
    images, *labels = read_npz(path, names if labelled else names[:1])
    images = channels_first(images)
    if labelled:
        return make_dataset(path.name, images, labels[0], division=division, left_out=left_out)
    return make_dataset(path.name, images, no_labels(len(images)), classes=1, division=division, left_out=left_out)


def channels_first(images: Tensor) -> Tensor:
    """[N, S, S, C] as [N, C, S, S]; what cannot be square images with their channels last, as it is."""
    if images.ndim == 4 and images.shape[1] == images.shape[2] != images.shape[3] and images.shape[3] in CHANNELS:
        return images.permute(0, 3, 1, 2)
    return images


def _arrays_of(path: Path, names: set[str], preparation: Preparation) -> tuple[bool, bool]:
    """Whether there are labels, and whether there is a test part. Raises ValueError for a part that lacks what the other has."""
    labelled, divided = "labels" in names or "images" not in names, "test_images" in names
    expected = {name for name, there in (("test_images", divided), ("test_labels", divided and labelled)) if there}
    found = names & {"test_images", "test_labels"}
    if found != expected:
        raise ValueError(
            f"{path}: expected test_images and test_labels where there are images and labels, or neither, got {', '.join(sorted(names))}"
        )
    return _are_labelled(path, names, labelled, preparation), divided


def _are_labelled(path: Path, names: set[str], labelled: bool, preparation: Preparation) -> bool:
    if not labelled and not preparation.unlabelled:
        raise ValueError(f"{path}: expected labels beside images; {WITHOUT_LABELS}, got {', '.join(sorted(names))}")
    return labelled


def _from_idx(path: Path) -> Dataset:
    return make_dataset(path.name, read_idx(path, 3), read_idx(_label_file(path), 1), division=UNDIVIDED)


def _label_file(images: Path) -> Path:
    """The one that is there, of a name spelled with a dash or a dot, compressed or not."""
    usual = images.with_name(images.name.replace("images", "labels").replace("idx3", "idx1"))
    endings = (f"{mark}idx1-ubyte{suffix}" for mark in "-." for suffix in ("", ".gz"))
    spellings = (usual.with_name(re.sub(r"[-.]idx1-ubyte(\.gz)?$", ending, usual.name)) for ending in endings)
    return next((file for file in (usual, *spellings) if file.is_file()), usual)


def _from_folder(folder: Path, split: str, preparation: Preparation) -> Dataset:
    cifar = find_cifar_folder(folder)
    if cifar is not None:
        return make_dataset(folder.name, *read_cifar10(cifar, split), classes=10)
    batches = batches_in(folder)
    if batches:
        return _from_imagenet(folder, batches, split, preparation)
    idx_files = sorted(file for file in folder.iterdir() if IDX_IMAGES.search(file.name))
    if idx_files:
        divided = any(file.name.startswith(TEST_FILES) for file in idx_files)
        dataset = _from_idx(_idx_file_of_split(folder, idx_files, split if divided else "train"))
        return replace(dataset, division=TEST_PART if divided else UNDIVIDED)
    batches = batches_in(folder, within=True)
    if batches:
        return _from_imagenet(folder, batches, split, preparation)
    return _from_image_folder(folder, split, preparation)


def _from_imagenet(folder: Path, batches: Batches, split: str, preparation: Preparation) -> Dataset:
    """val_data alone are test images; training batches alone are undivided."""
    files = batches.test if split == "test" and batches.test else batches.train
    if not files:
        raise FileNotFoundError(f"{folder}: expected train_data_batch_1 and so on beside {batches.test[0].name}")
    images, labels, mapped = read_batches(files, preparation, bool(batches.test))
    few = len(batches.train) < TRAIN_BATCHES and files is batches.train
    left_out = (f"note: {folder}: {len(batches.train)} of ImageNet's {TRAIN_BATCHES} training batches",) if few else ()
    division = TEST_PART if batches.test else UNDIVIDED
    return make_dataset(folder.name, images, labels, classes=CLASSES, mapped=mapped, division=division, left_out=left_out)


def _from_image_folder(folder: Path, split: str, preparation: Preparation) -> Dataset:
    train, test = (split_folder(folder, name) for name in ("train", "test"))
    images_in = test if split == "test" and test else train or folder
    listing = list_images(images_in, train or folder, preparation.unlabelled)
    files, labels, preparation = listing.files, listing.labels, preparation_of(listing.files, preparation)
    division = TEST_PART if test else SHARE if preparation.test_share > 0.0 else UNDIVIDED
    if division == SHARE:  # before the images are read
        rows = rows_of_split(len(files), preparation.test_share, split)
        files, labels = [files[row] for row in rows], labels[rows]
    images, mapped = read_images(files, preparation)
    left_out = (*listing.left_out, *(beside_parts(folder, (train, test)) if train else ()))
    return make_dataset(folder.name, images, labels, classes=listing.classes, mapped=mapped, division=division, left_out=left_out)


def _idx_file_of_split(folder: Path, files: list[Path], split: str) -> Path:
    prefixes = ("train",) if split == "train" else TEST_FILES
    for file in files:
        if file.name.startswith(prefixes):
            return file
    raise FileNotFoundError(f"{folder}: expected {prefixes[0]}-images-idx3-ubyte[.gz], found {[file.name for file in files]}")


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
