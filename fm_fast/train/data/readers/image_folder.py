"""Read a folder of images with one subfolder a class, into memory or, where they are too many, into a mapped file."""

import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fm_fast.train.data.readers.image_file import read_image
from fm_fast.train.data.readers.mapped import filled
from fm_fast.train.data.readers.progress import with_progress
from fm_fast.train.prepare import WITHOUT_LABELS, Preparation

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")
TEST_FOLDERS = ("test", "val", "validation")
# Fewer images are read before a progress bar would be seen.
FEW = 2000
# Of what is done to an image when it is read: files in the cache that others made are not used.
READING = "upright, on white"
MOST_NAMED = 3


def split_folder(folder: Path, split: str) -> Path | None:
    """The subfolder of that split, where the folder is divided into train and test (or val); else None."""
    if not (folder / "train").is_dir():
        return None
    names = TEST_FOLDERS if split == "test" else ("train",)
    return next((folder / name for name in names if (folder / name).is_dir()), None)


@dataclass(frozen=True, eq=False)
class Listing:
    """files; labels: int64 [N]; classes: their number; left_out: what else lies in the folder, in lines for people."""

    files: list[Path]
    labels: Tensor
    classes: int
    left_out: tuple[str, ...] = ()


def list_images(folder: Path, classes_of: Path | None = None, unlabelled: bool = False) -> Listing:
    """The images of a folder: one class a subfolder, in alphabetical order, of ``classes_of`` where given, and all that is in it.

    unlabelled: images may also lie in the folder itself, and then all have label 0. Names that begin with a dot are left out, as
    everywhere. Raises FileNotFoundError for no image, ValueError for a subfolder without images or a class that ``classes_of`` does not
    have.
    """
    present, (images, others) = _subfolders(folder), _images_and_others(folder)
    beside = [file for file in images if file.parent == folder]
    if not present or (unlabelled and beside):
        return _without_classes(folder, images, others, unlabelled)
    names = _subfolders(classes_of or folder)
    unknown = sorted(set(present) - set(names))
    if unknown:
        raise ValueError(f"{folder}: expected the classes of {classes_of}, {', '.join(names)}; got also {', '.join(unknown)}")
    files = [file for file in images if file.parent != folder]
    found = [file.relative_to(folder).parts[0] for file in files]
    empty = sorted(set(present) - set(found))
    if empty:
        raise ValueError(f"{folder}: expected images ({', '.join(SUFFIXES)}) in every subfolder, found none in {', '.join(empty)}")
    return Listing(files, torch.tensor([names.index(name) for name in found]), len(names), _left_out(folder, beside, others))


def _without_classes(folder: Path, images: list[Path], others: list[Path], unlabelled: bool) -> Listing:
    if not images:
        raise FileNotFoundError(f"{folder}: expected IDX files, CIFAR-10 batches, .npz archives, or a subfolder of images for each class")
    if not unlabelled:
        raise ValueError(f"{folder}: expected a subfolder of images for each class; {WITHOUT_LABELS}, got {len(images)} images")
    return Listing(images, no_labels(len(images)), 1, _left_out(folder, [], others))


def _left_out(folder: Path, beside: list[Path], others: list[Path]) -> tuple[str, ...]:
    """beside: images without a class; others: files that are none."""
    found = []
    if beside:
        found.append(
            f"warning: {folder}: {named('images', beside)} left out: beside the subfolders, of no class (--no-conditional takes them)"
        )
    if others:
        found.append(f"note: {folder}: {named('files', others)} left out: no {', '.join(SUFFIXES)}")
    return tuple(found)


def beside_parts(folder: Path, used: Collection[Path | None]) -> tuple[str, ...]:
    """What is left out of a folder that is divided into parts, in lines for people."""
    others = [entry for entry in folder.iterdir() if entry not in used and not entry.name.startswith(".")]
    return (f"note: {folder}: {named('entries', others)} left out: beside the parts",) if others else ()


def named(what: str, entries: Collection[Path]) -> str:
    """As in "7 of the images (a.png, b.png, c.png, ...)"."""
    names = sorted(entry.name for entry in entries)
    return f"{len(names)} of the {what} ({', '.join(names[:MOST_NAMED])}{', ...' if len(names) > MOST_NAMED else ''})"


def no_labels(count: int) -> Tensor:
    """What stands for the labels of data that have none: int64 [count]."""
    return torch.zeros(count, dtype=torch.int64)


def _subfolders(folder: Path) -> list[str]:
    return sorted(child.name for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))


def _images_and_others(folder: Path) -> tuple[list[Path], list[Path]]:
    """Of all files in the folder and those within, in alphabetical order."""
    files = sorted(_files(folder))
    return [file for file in files if _is_image(file)], [file for file in files if not _is_image(file)]


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in SUFFIXES


def _files(folder: Path) -> Iterator[Path]:
    """Links are followed, but to no folder for the second time: one may hold a link to itself."""
    seen = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith("."))
        yield from (Path(place) / name for name in names if real not in seen and not name.startswith("."))
        seen.add(real)


def preparation_of(files: list[Path], preparation: Preparation) -> Preparation:
    """What happens to these images, by the size of the first."""
    return preparation.of_size(*read_image(files[0], 0).shape[-2:]) if preparation.as_is else preparation


def read_images(files: list[Path], preparation: Preparation) -> tuple[Tensor, bool]:
    """(images uint8 [N, 3, H, W], or [N, 1, H, W] for grey, whether they lie in a mapped file).

    All must have the size of the first, if they are not resized. Raises ValueError for an image that cannot be read or has another size.
    """
    shape = (len(files), *read_image(files[0], preparation.resize, preparation.grey).shape)
    reading = f"{READING}, {preparation.resize}{', grey' if preparation.grey else ''}"
    return filled(shape, files, reading, preparation, lambda images: _fill(images, files, preparation))


def _fill(images: Tensor, files: list[Path], preparation: Preparation) -> None:
    for number, file in enumerate(files if len(files) < FEW else with_progress(files, len(files), "image")):
        image = read_image(file, preparation.resize, preparation.grey)
        if image.shape != images.shape[1:]:
            height, width = images.shape[2:]
            raise ValueError(
                f"{file}: expected {height}x{width} pixels like {files[0].name}, got {image.shape[1]}x{image.shape[2]};"
                " --resize brings all to one size"
            )
        images[number] = image
