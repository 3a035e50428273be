"""Files of the cache, made once of other files: one process makes a file, others wait for it, and newer ones take the place of older."""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from fm_fast.train.files import TEMPORARY, as_folder, held_in_turn, is_held, takes_place
from fm_fast.train.prepare import Preparation


def cache_file(preparation: Preparation, files: Iterable[Path], reading: str, suffix: str) -> Path:
    """Where the cache keeps what was made of ``files`` as they are now, read by the way ``reading``.

    Its name has a part that stays as long as the files' names and the reading, and one of their sizes and times.
    """
    names, states = hashlib.sha256(reading.encode()), hashlib.sha256()
    for file in files:
        status = file.stat()
        names.update(b"\0" + os.fsencode(file.resolve()))
        states.update(f"{status.st_size} {status.st_mtime_ns}\n".encode())
    folder = as_folder("cache", os.path.expanduser(preparation.cache))
    return folder / f"images-{names.hexdigest()[:16]}-{states.hexdigest()[:16]}{suffix}"


def make_once(file: Path, is_made: Callable[[], bool], make: Callable[[Path], None]) -> None:
    """Nothing if ``is_made``; else ``make`` writes the place that it is given, which takes the name of ``file`` at the end.

    What the cache kept of the same files as they were before is deleted, and what a killed process left is written over.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    place = file.with_name(file.name + TEMPORARY)
    while not is_made():
        if is_held(place):
            print(f"waiting for another process, which writes {file}", flush=True)
        with held_in_turn(place) as is_there:
            if is_there:  # else another process made the file, or failed to, while this one waited
                _make(file, place, is_made, make)
                _forget_older(file)
                return


def _make(file: Path, place: Path, is_made: Callable[[], bool], make: Callable[[Path], None]) -> None:
    try:
        with takes_place(place, file):
            make(place)
    except FileNotFoundError:
        if not is_made():  # by another process, which wrote the same to the same place: some file systems have no locks
            raise


def _forget_older(file: Path) -> None:
    """A run that has an older one mapped keeps it until it ends."""
    names, now = file.stem.rsplit("-", 1)
    for other in file.parent.glob(f"{names}-*"):
        if not other.name.startswith(f"{names}-{now}.") and not (other.suffix == TEMPORARY and is_held(other)):
            with contextlib.suppress(OSError):
                other.unlink()
