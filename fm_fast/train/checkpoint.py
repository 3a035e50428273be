"""Checkpoints: one file with the whole state of a run, written so that an interruption never leaves half a file."""

import os
import pickle
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fm_fast.train.config import TrainConfig, from_dict, resume_conflicts, to_dict
from fm_fast.train.step import TrainState, build_model

FORMAT = "fm_fast.checkpoint"
VERSION = 1


def save_checkpoint(path: Path, state: TrainState, config: TrainConfig) -> None:
    """Write the state beside `path` and rename it into place: whatever happens, `path` is the old file or the new one."""
    content = {"format": FORMAT, "version": VERSION, "config": to_dict(config), "state": state.state_dict()}
    descriptor, temporary = tempfile.mkstemp(prefix=path.name, suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU; no code in the file is run.

    Raises FileNotFoundError if there is none, ValueError for a damaged file, one of another program, or another version.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: expected a complete checkpoint of fm_fast, but it cannot be read ({_first_line(error)})") from error
    _check_header(path, content)
    return content


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _check_header(path: Path, content: Any) -> None:
    found = content.get("format") if isinstance(content, dict) else type(content).__name__
    if found != FORMAT:
        raise ValueError(f"{path}: expected a checkpoint of fm_fast (format {FORMAT!r}), got {found!r}")
    if content["version"] != VERSION:
        raise ValueError(f"{path}: expected checkpoint version {VERSION}, got {content['version']}")


def resume(path: Path, state: TrainState, config: TrainConfig) -> None:
    """Load a checkpoint into a fresh state. Raises ValueError if the run asked for is not the one that was stored."""
    content = read_checkpoint(path)
    conflicts = resume_conflicts(from_dict(content["config"]), config)
    if conflicts:
        raise ValueError(f"{path}: cannot resume with other settings: {'; '.join(conflicts)}")
    state.load_state_dict(content["state"])


def load_model(path: str | Path) -> tuple[nn.Module, TrainConfig]:
    """The averaged network of a checkpoint, ready for sampling (evaluation mode, no gradients), and its configuration.

    path: the file, or the folder of the run. Raises FileNotFoundError or ValueError as :func:`read_checkpoint` does.
    """
    file = Path(path) / "checkpoint.pt" if Path(path).is_dir() else Path(path)
    content = read_checkpoint(file)
    try:
        config = from_dict(content["config"])
        model = build_model(config)
        model.load_state_dict(content["state"]["average"])
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{file}: expected the settings and weights of a network, got others ({_first_line(error)})") from error
    return model.eval().requires_grad_(False), config
