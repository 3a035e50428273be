"""A checkpoint: the whole state of a run and its configuration in one file, which reading never executes."""

import contextlib
import pickle
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fm_fast.train.config import TrainConfig, from_dict, resume_conflicts, to_dict
from fm_fast.train.data.identity import data_conflicts
from fm_fast.train.files import replaced_whole
from fm_fast.train.step import TrainState

FORMAT = "fm_fast.checkpoint"
VERSION = 2
PARTS = {"format", "version", "config", "state"}
LATER_PARTS = {"data"}  # which the first checkpoints of this version have not
# What readers of a damaged archive raise, torch's among them: it seeks to negative positions in some files that were cut off, and takes
# what a changed byte of its pickle stands for as what it should be.
DAMAGE = (
    zipfile.BadZipFile, OSError, RuntimeError, ValueError, EOFError, LookupError, OverflowError, struct.error, zlib.error,
    pickle.UnpicklingError, TypeError, AttributeError, AssertionError,
)  # fmt: skip


def save_checkpoint(path: Path, stored: dict[str, Any], config: TrainConfig, data: dict[str, Any] | None = None) -> None:
    """Write a state's `state_dict()`, the configuration and the identity of the data; `path` is never half a file."""
    content = {"format": FORMAT, "version": VERSION, "config": to_dict(config), "state": stored}
    if data is not None:
        content["data"] = data
    try:
        with replaced_whole(path) as temporary, temporary.open("wb") as file, _with_checksums():
            torch.save(content, file)
    except RuntimeError as error:  # torch's words for a file that ends too early name neither the file nor the cause
        raise OSError(f"{path}: expected room for a checkpoint, but it could not be written ({error})") from error


@contextlib.contextmanager
def _with_checksums() -> Iterator[None]:
    """Whatever the process has told torch: reading checks them."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(True)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def read_checkpoint(path: Path, mapped: bool = False) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU; no code in the file is run.

    The whole file is compared with the checksums (CRC-32) of its parts, so that a byte that has changed in a tensor is found. mapped: read
    tensors where they are used and compare nothing; a file that was cut off is found all the same, since its table of contents is at the
    end. Raises FileNotFoundError if there is none, ValueError for a damaged file, one of another program, or another version.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    with path.open("rb"):  # a file that must not be read is not a damaged one
        pass
    try:
        _check_archive(path, mapped)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except DAMAGE as error:
        raise ValueError(f"{path}: expected a complete checkpoint of fm_fast, but it cannot be read ({_reason(error)})") from error
    _check_header(path, content)
    _check_config(path, content["config"])
    return content


def _check_archive(path: Path, mapped: bool) -> None:
    """Python's reader compares checksums where torch's does not."""
    with zipfile.ZipFile(path) as archive:
        damaged = None if mapped else archive.testzip()
    if damaged is not None:
        raise ValueError(f"its part {damaged} has changed since it was written")


def _reason(error: Exception) -> str:
    # torch's own text for such a file advises to read it with the protection against foreign code switched off.
    return "it holds other things than tensors and plain values" if isinstance(error, pickle.UnpicklingError) else first_line(error)


def first_line(error: Exception) -> str:
    """What an error says, for a message of one line."""
    return (str(error) or type(error).__name__).splitlines()[0]


def _check_header(path: Path, content: Any) -> None:
    found = content.get("format") if isinstance(content, dict) else type(content).__name__
    if found != FORMAT:
        raise ValueError(f"{path}: expected a checkpoint of fm_fast (format {FORMAT!r}), got {found!r}")
    if content.get("version") != VERSION:
        raise ValueError(f"{path}: expected checkpoint version {VERSION}, got {content.get('version')}")
    if set(content) - LATER_PARTS != PARTS:
        raise ValueError(f"{path}: expected a checkpoint with {', '.join(sorted(PARTS))}, got {', '.join(sorted(map(str, content)))}")


def _check_config(path: Path, values: Any) -> None:
    try:
        from_dict(values)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: expected the settings of a run, got others ({first_line(error)})") from error


def restore(path: Path, content: dict[str, Any], state: TrainState, config: TrainConfig, data: dict[str, Any] | None = None) -> None:
    """Put what :func:`read_checkpoint` found into a fresh state.

    data: the identity of the data that the run is to go on with. Raises ValueError if the run asked for is not the one stored.
    """
    stored = from_dict(content["config"])
    conflicts = [*data_conflicts(stored, content.get("data"), config, data), *resume_conflicts(stored, config)]
    if conflicts:
        raise ValueError(f"{path}: cannot resume with other settings: {'; '.join(conflicts)}")
    with _told_as_damage(path):
        taken = int(content["state"]["step"])
    if taken > config.steps:
        raise ValueError(f"{path}: steps: expected at least the {taken} that this run has taken, got {config.steps}")
    with _told_as_damage(path):
        state.load_state_dict(content["state"])


@contextlib.contextmanager
def _told_as_damage(path: Path) -> Iterator[None]:
    """Whatever is raised where the state is not one: ValueError with the file's name."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: expected the state of a run, got another ({first_line(error)})") from error
