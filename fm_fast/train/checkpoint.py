"""A checkpoint: the whole state of a run and its configuration in one file, which reading never executes."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from fm_fast.train.config import TrainConfig, from_dict, resume_conflicts, to_dict
from fm_fast.train.files import replaced_whole
from fm_fast.train.step import TrainState

FORMAT = "fm_fast.checkpoint"
VERSION = 2
PARTS = {"format", "version", "config", "state"}


def save_checkpoint(path: Path, stored: dict[str, Any], config: TrainConfig) -> None:
    """Write a state's `state_dict()` and the configuration; `path` is never half a file."""
    content = {"format": FORMAT, "version": VERSION, "config": to_dict(config), "state": stored}
    with replaced_whole(path) as temporary, temporary.open("wb") as file:
        torch.save(content, file)


def read_checkpoint(path: Path, mapped: bool = False) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU; no code in the file is run. mapped: read tensors where they are used, unchecked.

    Raises FileNotFoundError if there is none, ValueError for a damaged file, one of another program, or another version.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: expected a complete checkpoint of fm_fast, but it cannot be read ({first_line(error)})") from error
    _check_header(path, content)
    _check_config(path, content["config"])
    return content


def first_line(error: Exception) -> str:
    """What an error says, for a message of one line."""
    return (str(error) or type(error).__name__).splitlines()[0]


def _check_header(path: Path, content: Any) -> None:
    found = content.get("format") if isinstance(content, dict) else type(content).__name__
    if found != FORMAT:
        raise ValueError(f"{path}: expected a checkpoint of fm_fast (format {FORMAT!r}), got {found!r}")
    if content.get("version") != VERSION:
        raise ValueError(f"{path}: expected checkpoint version {VERSION}, got {content.get('version')}")
    if set(content) != PARTS:
        raise ValueError(f"{path}: expected a checkpoint with {', '.join(sorted(PARTS))}, got {', '.join(sorted(map(str, content)))}")


def _check_config(path: Path, values: Any) -> None:
    try:
        from_dict(values)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: expected the settings of a run, got others ({first_line(error)})") from error


def restore(path: Path, content: dict[str, Any], state: TrainState, config: TrainConfig) -> None:
    """Put what :func:`read_checkpoint` found into a fresh state. Raises ValueError if the run asked for is not the one stored."""
    conflicts = resume_conflicts(from_dict(content["config"]), config)
    if conflicts:
        raise ValueError(f"{path}: cannot resume with other settings: {'; '.join(conflicts)}")
    taken = content["state"]["step"]
    if taken > config.steps:
        raise ValueError(f"{path}: steps: expected at least the {taken} that this run has taken, got {config.steps}")
    state.load_state_dict(content["state"])


def resume(path: Path, state: TrainState, config: TrainConfig) -> None:
    """Load a checkpoint into a fresh state. Raises as :func:`read_checkpoint` and :func:`restore` do."""
    restore(path, read_checkpoint(path), state, config)
