"""Files of the cache, made once of other files: one process makes a file, and others wait for it."""

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from fm_fast.train.files import TEMPORARY, as_folder, held_in_turn, is_held, takes_place
from fm_fast.train.prepare import Preparation


def cache_file(preparation: Preparation, files: Iterable[Path], reading: str, suffix: str) -> Path:
    """Where the cache keeps what was made of ``files`` as they are now, by name, size and time, read by the way ``reading``."""
    digest = hashlib.sha256(reading.encode())
    for file in files:
        status = file.stat()
        digest.update(os.fsencode(file.resolve()) + f"\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return as_folder("cache", os.path.expanduser(preparation.cache)) / f"images-{digest.hexdigest()[:20]}{suffix}"


def make_once(file: Path, is_made: Callable[[], bool], make: Callable[[Path], None]) -> None:
    """Nothing if ``is_made``; else ``make`` writes the place that it is given, which takes the name of ``file`` at the end.

    What a killed process left is written over. Of other files, a run on another machine may have one mapped, so none is deleted.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    place = file.with_name(file.name + TEMPORARY)
    while not is_made():
        if is_held(place):
            print(f"waiting for another process, which writes {file}", flush=True)
        with held_in_turn(place) as is_there:
            # Where it is not, another process made the file, or failed to, while this one waited.
            if is_there and is_made():
                place.unlink(missing_ok=True)
            elif is_there:
                _make(file, place, is_made, make)
                return


def _make(file: Path, place: Path, is_made: Callable[[], bool], make: Callable[[Path], None]) -> None:
    try:
        with takes_place(place, file):
            make(place)
    except FileNotFoundError:
        if not is_made():  # by another process, which wrote the same to the same place: some file systems have no locks
            raise
