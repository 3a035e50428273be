"""Data sets by name or by the files they lie in: which reader, which files of them, which part."""

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from fm_fast.train.data.archives import Archives, archives_in, archives_of, read_archives
from fm_fast.train.data.dataset import LEVELS, SHARE, TEST_PART, UNDIVIDED, Dataset, make_dataset
from fm_fast.train.data.large import mapped_images, standardisation_of
from fm_fast.train.data.readers.cifar import find_cifar_folder, read_cifar10
from fm_fast.train.data.readers.downsampled_imagenet import CLASSES, TRAIN_BATCHES, Batches, batches_in, read_batches
from fm_fast.train.data.readers.idx import read_idx
from fm_fast.train.data.readers.image_folder import beside_parts, list_images, preparation_of, read_images, split_folder
from fm_fast.train.data.readers.large_npz import LargeImages, large_images
from fm_fast.train.data.readers.npz import read_npz
from fm_fast.train.prepare import Preparation, pooled_and_padded, rows_of_split
from fm_fast.train.standardisation import given, in_parts, measured

DIGITS = Path(__file__).parents[2] / "datasets" / "digits.npz"
DIGITS_TRAIN = 1500
DIGITS_LEVELS = 17
TEST_FILES = ("t10k", "test")  # beginnings of their names
IDX_IMAGES = re.compile(r"-images[-.]idx3-ubyte(\.gz)?$")
# Where Debian's and Ubuntu's package dataset-fashion-mnist puts it, and a place of one's own.
FASHION_FOLDERS = (Path("/usr/share/datasets/fashion-mnist"), Path("data/fashion-mnist"))
PREPARED = Preparation()
SHIPPED = frozenset({"digits", "fashion"})  # sources by name instead of a path


def load_dataset(source: str | Path, split: str = "train", preparation: Preparation = PREPARED) -> Dataset:
    """The data set at `source`; split is "train" or "test".

    source: "digits" (shipped); "fashion" (Fashion-MNIST as installed by Debian's package dataset-fashion-mnist); a folder of IDX files
    (MNIST, Fashion-MNIST), of batches of CIFAR-10 or downsampled ImageNet, of .npz archives, or of images with one subfolder a class,
    these two perhaps within train and test; a CIFAR-10 .tar.gz archive; an .npz archive with `images` and `labels`, perhaps `test_images`
    and `test_labels`, or with `arr_0` and `arr_1`, whose images may be of real numbers, such as an autoencoder's latents; or an IDX image
    file.
    Real numbers are standardised (data/standardisation.py) by what `preparation` says or, without `scale`, by what these data are.
    Of data without a test part, `preparation.test_share` is held out; if that is 0, both splits are all of them (UNDIVIDED).
    Where `preparation.unlabelled` allows it, an .npz archive may lack labels, and images may lie beside subfolders: all labels are 0 then.
    Raises FileNotFoundError for what is missing and ValueError, naming the file, for what is damaged.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split: expected 'train' or 'test', got {split!r}")
    dataset = _read(source, split, preparation)
    preparation = preparation.of_size(*dataset.images.shape[-2:])
    _check_kind(dataset.name, dataset.images.shape[1:], dataset.levels is None, preparation)
    if dataset.division == UNDIVIDED and preparation.test_share > 0.0:
        rows = rows_of_split(len(dataset), preparation.test_share, split)
        dataset = replace(dataset, images=dataset.images[rows], labels=dataset.labels[rows], division=SHARE)
    if preparation.pool > 1 or preparation.pad > 0:
        dataset = replace(dataset, images=pooled_and_padded(dataset.name, dataset.images, preparation))
    return _standardised(dataset, preparation) if dataset.levels is None and dataset.standardisation is None else dataset


def _standardised(dataset: Dataset, preparation: Preparation) -> Dataset:
    shift, scale, images = preparation.shift, preparation.scale, dataset.images
    found = given(shift, scale, images.shape[1]) if scale else measured(in_parts(images))
    left_out = (*dataset.left_out, *_taken_for_real(dataset.name, in_parts(images)))
    return replace(dataset, images=found.seen(images), standardisation=found, left_out=left_out)


def _taken_for_real(name: str, parts: Iterable[Tensor]) -> tuple[str, ...]:
    """Grey levels lose their discreteness when they are stored as floats, perhaps by mistake."""
    if any(bool((part != part.round()).any()) for part in parts):
        return ()
    return (f"warning: {name}: all numbers are whole, but taken for real ones, being floats; as uint8 they would be grey levels",)


def _check_kind(name: str, size: tuple[int, ...], real: bool, preparation: Preparation) -> None:
    """Only a folder's images are resized and converted, when they are read; only real numbers are shifted and scaled. size: C, H, W."""
    (channels, height, width), resize = size, preparation.resize
    if preparation.scale and not real:
        raise ValueError(f"data_scale: expected none for {name} of integers, which have grey levels, got {preparation.scale}")
    if preparation.grey and channels != 1:
        raise ValueError(f"grey: expected off for {name} of {channels} channels, because only image files are converted")
    if resize and (height, width) != (resize, resize):
        raise ValueError(
            f"resize: expected 0 for {name} of {height}x{width} pixels, because only image files are resized"
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


def levels_of(source: str, standardised: bool = False) -> int | None:
    """The number of grey levels of the data at `source`, without reading them; None for real numbers, which are standardised."""
    if standardised:
        return None
    return DIGITS_LEVELS if source == "digits" else LEVELS


def digits(split: str = "train") -> Dataset:
    """The shipped 8x8 digits, 17 levels: 1500 to train on, 297 held out ("test"); see datasets/digits.txt."""
    images, labels = read_npz(DIGITS, ("images", "labels"))
    rows = slice(0, DIGITS_TRAIN) if split == "train" else slice(DIGITS_TRAIN, None)
    return make_dataset("digits", images[rows], labels[rows], levels=DIGITS_LEVELS, classes=10)


def _from_file(path: Path, split: str, preparation: Preparation) -> Dataset:
    if path.name.endswith((".tar.gz", ".tgz", ".tar")):
        return make_dataset(path.name, *read_cifar10(path, split), classes=10)
    if path.suffix == ".npz":
        return _from_archives(archives_of(path, [path], split, preparation), split, preparation)
    if "idx3-ubyte" in path.name:
        return _from_idx(path)
    raise ValueError(f"{path}: expected a .npz, an *-images-idx3-ubyte[.gz] or a CIFAR-10 .tar.gz file")


def _from_archives(archives: Archives, split: str, preparation: Preparation) -> Dataset:
    large = large_images(archives.files, archives.names[0], preparation)
    return read_archives(archives) if large is None else _from_large(archives, large, split, preparation)


def _from_large(archives: Archives, large: LargeImages, split: str, preparation: Preparation) -> Dataset:
    """As of images in memory, but for the order: what cannot be is told before the file is written, and of held-out images none is."""
    name, marks = archives.place.name, archives.marks
    labels = archives.labels([len(piece) for piece in large.pieces], [read_npz(file, archives.names[1:]) for file in archives.files])
    preparation, classes = preparation.of_size(*large.size[-2:]), int(labels.max()) + 1
    _check_kind(name, large.size[1:], large.dtype.is_floating_point, preparation)
    if archives.division == UNDIVIDED and preparation.test_share > 0.0:
        rows = rows_of_split(len(labels), preparation.test_share, split)
        large, labels = replace(large, rows=rows), labels[rows]
        marks["division"] = SHARE
    units = standardisation_of(large, preparation)
    images = mapped_images(large, units, preparation)
    if units is not None:
        marks["left_out"] += _taken_for_real(name, (part for _, part in large.parts()))
    return make_dataset(name, images, labels, classes=classes, mapped=True, standardisation=units, **marks)


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
    archives = archives_in(folder, split, preparation)
    return _from_archives(archives, split, preparation) if archives else _from_image_folder(folder, split, preparation)


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
