"""Images and labels of .npz archives: of one, or of those of a folder, which are read one after the other."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fm_fast.train.data.dataset import TEST_PART, UNDIVIDED, Dataset, make_dataset
from fm_fast.train.data.readers.image_folder import SUFFIXES, named, no_labels, split_folder
from fm_fast.train.data.readers.large_npz import require_alike
from fm_fast.train.data.readers.npz import array_names, as_images, read_npz
from fm_fast.train.prepare import WITHOUT_LABELS, Preparation

ARRAYS = {"images", "labels", "test_images", "test_labels"}
UNNAMED = ("arr_0", "arr_1")  # images and labels where numpy named the arrays, as in guided-diffusion's archives


@dataclass(frozen=True)
class Archives:
    """What is read of .npz archives. names: of the arrays of images and of labels, these only where there are some."""

    place: Path
    files: list[Path]
    names: tuple[str, ...]
    division: str
    left_out: tuple[str, ...]

    @property
    def classes(self) -> int | None:
        """Known only where there are no labels."""
        return None if len(self.names) > 1 else 1

    @property
    def marks(self) -> dict[str, Any]:
        """Of the data set."""
        return {"division": self.division, "left_out": self.left_out}

    def labels(self, sizes: list[int], found: list[list[Tensor]]) -> Tensor:
        """Those found in each file, of so many images. ValueError where they are not one an image."""
        labels = [each[0] if each else no_labels(size) for size, each in zip(sizes, found, strict=True)]
        for file, size, part in zip(self.files, sizes, labels, strict=True):
            if part.shape != (size,) and size:  # no images are told by make_dataset
                raise ValueError(f"{file.name}: expected one label an image, {size}, got {list(part.shape)}")
        return labels[0] if len(labels) == 1 else torch.cat(labels)


def archives_in(folder: Path, split: str, preparation: Preparation) -> Archives | None:
    """Those of a split, perhaps within train and test; None where there are none, or images or subfolders beside them."""
    train, test = (split_folder(folder, name) for name in ("train", "test"))
    place = test if split == "test" and test else train or folder
    entries = [entry for entry in place.iterdir() if not entry.name.startswith(".")]
    files = sorted(entry for entry in entries if entry.suffix == ".npz")
    if not files or any(entry.is_dir() or entry.suffix.lower() in SUFFIXES for entry in entries):
        return None
    others = [entry for entry in entries if entry not in files]
    beside = (f"note: {place}: {named('files', others)} left out: no .npz",) if others else ()
    found = archives_of(folder, files, split, preparation, divided=test is not None)
    return replace(found, left_out=(*found.left_out, *beside))


def archives_of(place: Path, files: list[Path], split: str, preparation: Preparation, divided: bool = False) -> Archives:
    """What is read of the files; divided: by the folder, so that they are one part of the data."""
    found = _common_names(files)
    if UNNAMED[0] in found and "images" not in found:
        labelled, parted, known, names = _are_labelled(files[0], found, UNNAMED[1] in found, preparation), False, set(UNNAMED), UNNAMED
    else:
        (labelled, parted), known = _arrays_of(files[0], found, preparation), ARRAYS
        part = "test_" if parted and split == "test" else ""
        names = (f"{part}images", f"{part}labels")
    division = TEST_PART if parted or divided else UNDIVIDED
    return Archives(place, files, names if labelled else names[:1], division, _left_out(place, found - known))


def _common_names(files: list[Path]) -> set[str]:
    """Of the arrays in each. Raises ValueError where they differ."""
    names = array_names(files[0])
    for file in files[1:]:
        found = array_names(file)
        if found and found != names:  # none of a damaged one, which reading it tells
            raise ValueError(f"{file}: expected arrays {', '.join(sorted(names))} as in {files[0].name}, got {', '.join(sorted(found))}")
    return names


def _left_out(path: Path, names: set[str]) -> tuple[str, ...]:
    return (f"note: {path}: {named('arrays', [Path(name) for name in names])} left out",) if names else ()


def read_archives(archives: Archives) -> Dataset:
    """In memory."""
    arrays = [read_npz(file, archives.names, real=archives.names[:1]) for file in archives.files]
    images = [as_images(found[0]) for found in arrays]
    for file, part in zip(archives.files, images, strict=True):
        require_alike(file, _kind(part), archives.files[0], _kind(images[0]))
    labels = archives.labels([len(part) for part in images], [found[1:] for found in arrays])
    together = torch.cat(images) if len(images) > 1 else images[0]
    return make_dataset(archives.place.name, together, labels, classes=archives.classes, **archives.marks)


def _kind(images: Tensor) -> tuple[torch.dtype, tuple[int, ...]]:
    """(dtype in memory, size of an image)."""
    return torch.float32 if images.dtype == torch.float64 else images.dtype, tuple(images.shape[1:])


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
