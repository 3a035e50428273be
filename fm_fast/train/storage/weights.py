"""The averaged network of a run as safetensors, which any program can read, and back: from such a file, a checkpoint or a folder.

A checkpoint also has the weights themselves and the averages of other widths.
"""

import hashlib
import json
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fm_fast.train.config import TrainConfig, from_dict, to_dict
from fm_fast.train.files import replaced_whole
from fm_fast.train.step import build_model
from fm_fast.train.storage.checkpoint import first_line, read_checkpoint
from fm_fast.train.storage.run_folder import RunFolder

FORMAT = "fm_fast.weights"
VERSION = "1"
SUFFIX = ".safetensors"
AVERAGE, LAST = "average", "last"
Stored = dict[str, Any]  # as in a checkpoint: "config", plain values, and "state", of which at least "average"


def can_write_weights() -> bool:
    """Whether the package safetensors is installed."""
    return find_spec("safetensors") is not None


def save_weights(path: Path, weights: dict[str, Tensor], config: TrainConfig, step: int) -> None:
    """Write the weights with their names; `path` is never half a file.

    The file's metadata hold the configuration, the step and a checksum of all that is read back, which the format has not by itself.
    Raises OSError if it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    described = json.dumps(to_dict(config))
    metadata = {"format": FORMAT, "version": VERSION, "step": str(step), "config": described, "sha256": _digest(described, tensors)}
    try:
        with replaced_whole(path) as temporary:
            save_file(tensors, temporary, metadata)
    except SafetensorError as error:
        raise OSError(f"{path}: expected room for the weights, but they could not be written ({first_line(error)})") from error


def _digest(config: str, weights: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(config.encode())
    for name in sorted(weights):
        value = weights[name].contiguous()
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load_model(path: str | Path, weights: str | float = AVERAGE) -> tuple[nn.Module, TrainConfig]:
    """A network of a run, ready for sampling (evaluation mode, no gradients), and the run's configuration.

    path: a checkpoint, a .safetensors file of this library, or the folder of a run, whose newest valid checkpoint counts.
    weights: "average", those of `ema_decay`; "last", the weights themselves, as they were after the last step; or one of the run's
    `ema_widths`, whose average it is. A .safetensors file has only the first.
    Checkpoints are compared with their checksums, and so are .safetensors files that have one (the first that were written have none).
    Raises FileNotFoundError for what is missing, ValueError for damaged files, those of other programs, and weights that they have not.
    """
    file, stored = _read(Path(path))
    try:
        config = from_dict(stored["config"])
        model = build_model(config)
        known = _kinds(stored["state"], config.ema_widths, [name for name, _ in model.named_parameters()])
        if weights in known:
            model.load_state_dict(known[weights])
    except (LookupError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{file}: expected the settings and weights of a network, got others ({first_line(error)})") from error
    if weights not in known:
        raise ValueError(f"weights: expected {' or '.join(map(str, known))}, which {file} holds, got {weights}")
    return model.eval().requires_grad_(False), config


def _kinds(state: dict[str, Any], widths: tuple[float, ...], names: list[str]) -> dict[str | float, dict[str, Tensor]]:
    """All weights of a state; the optimiser has the averages of widths after that of `ema_decay`, of parameters by their place."""
    found: dict[str | float, dict[str, Tensor]] = {AVERAGE: state["average"]}
    if "model" in state:
        entries, found[LAST] = state["optimiser"]["state"], state["model"]
        for number, width in enumerate(widths, start=1):
            found[width] = found[AVERAGE] | {name: entries[i]["averages"][number] for i, name in enumerate(names)}
    return found


def _read(path: Path) -> tuple[Path, Stored]:
    """What was read, and its content."""
    folder = RunFolder(path)
    if path.is_dir() and not folder.checkpoints() and folder.weights.is_file():
        path = folder.weights  # a folder without checkpoints may hold the averaged weights alone
    if path.is_dir():
        found = folder.newest_valid()
        for text in found.warnings:
            warnings.warn(text, stacklevel=3)
        return found.file, found.content
    return path, _read_weights(path) if path.suffix == SUFFIX else read_checkpoint(path)


def _read_weights(path: Path) -> Stored:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if not can_write_weights():
        raise ImportError(f"{path}: reading it needs safetensors: pip install safetensors, or 'fm_fast[train]'")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a complete safetensors file, but it cannot be read ({first_line(error)})") from error
    found = (metadata.get("format"), metadata.get("version"))
    if found != (FORMAT, VERSION):
        raise ValueError(f"{path}: expected weights of fm_fast (format {FORMAT!r}, version {VERSION!r}), got {found}")
    if "sha256" in metadata and metadata["sha256"] != _digest(metadata.get("config", ""), weights):
        raise ValueError(f"{path}: expected the weights as they were written, but their checksum differs: the file is damaged")
    try:
        return {"config": json.loads(metadata["config"]), "state": {"average": weights}}
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path}: expected the settings of a run in its metadata, got others ({first_line(error)})") from error
