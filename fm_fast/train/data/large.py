"""Images that do not fit into memory: measured and written, as the network sees them, to a mapped file, part by part."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from fm_fast.train.data.dataset import check_values
from fm_fast.train.data.readers.cache import cache_file, make_once
from fm_fast.train.data.readers.large_npz import LargeImages
from fm_fast.train.data.readers.mapped import filled
from fm_fast.train.data.readers.progress import with_progress
from fm_fast.train.prepare import Preparation
from fm_fast.train.standardisation import Standardisation, given, measured


def checked_parts(images: LargeImages) -> Iterator[Tensor]:
    """[n, C, H, W] each. Raises ValueError for a damaged archive and for numbers that are not finite."""
    for file, part in with_progress(images.parts(), images.number_of_parts, "part"):
        check_values(file.name, part)
        yield part


def standardisation_of(images: LargeImages, preparation: Preparation) -> Standardisation | None:
    """None for grey levels."""
    if not images.dtype.is_floating_point:
        return None
    if preparation.scale:
        return given(preparation.shift, preparation.scale, images.size[1])
    kept = cache_file(preparation, images.files, f"measured, {_selection(images)}", ".json")
    make_once(kept, kept.is_file, lambda place: _keep(place, measured(checked_parts(images))))
    return Standardisation(**{name: tuple(numbers) for name, numbers in json.loads(kept.read_text()).items()})


def _keep(place: Path, units: Standardisation) -> None:
    place.write_text(json.dumps(asdict(units)))


def mapped_images(images: LargeImages, units: Standardisation | None, preparation: Preparation) -> Tensor:
    """What the network sees of them, in a file of the cache."""

    def fill(file: Tensor) -> None:
        first = 0
        for part in checked_parts(images):
            there = file[first : first + len(part)].copy_(part)
            if units is not None:
                units.seen(there)
            first += len(part)

    reading = f"{_selection(images)}, {units!r}"
    return filled(images.size, images.files, reading, preparation, fill, images.dtype)[0]


def _selection(images: LargeImages) -> str:
    return f"{images.name}, {hashlib.sha256(images.rows.numpy().tobytes()).hexdigest()}"
