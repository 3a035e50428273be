"""What several commands share: options of a run and of a solver, held-out data, and warnings before the work."""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from fm_fast._solver.settings import MAX_STEPS, TOLERANCE
from fm_fast.grids import NAMED as GRIDS
from fm_fast.solvers import is_adaptive
from fm_fast.train.config import TrainConfig
from fm_fast.train.data import UNDIVIDED, Dataset, levels_of, load_dataset, with_levels
from fm_fast.train.data.identity import same_source
from fm_fast.train.files import is_stream, resolved
from fm_fast.train.storage.weights import AVERAGE

SPLITS = ("train", "test")
# Why fixed-step methods refuse what only adaptive ones take
NOT_FOR_FIXED_STEPS = {
    "rtol": "has no tolerance",
    "atol": "has no tolerance",
    "max_steps": "takes as many as --steps says",
    "per_sample": "takes the same steps for all samples",
}


def add_run(parser: argparse.ArgumentParser) -> None:
    """What every command that reads a checkpoint takes."""
    parser.add_argument("checkpoint", metavar="RUN", help="the folder of a run, a checkpoint of it, or a .safetensors file of its weights")
    which = "of the checkpoint: average, last (as they were after the last step), or one of the ema_widths of the run, e.g. 0.1 [average]"
    parser.add_argument("--weights", type=_width_or_name, default=AVERAGE, metavar="NAME", help=which)
    parser.add_argument("--seed", type=int, default=0, metavar="INT", help="the result is a function of this number and the settings [0]")
    parser.add_argument("--batch-size", type=positive, default=256, metavar="INT", help="images at a time; fixed steps give the same [256]")
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, ... [auto]")


def add_solver(parser: argparse.ArgumentParser, steps_help: str, steps: int | None, default: str = f"{TOLERANCE:g}") -> None:
    """The solver's options but for its name; default: what the help says of tolerances that are not given."""
    parser.add_argument("--steps", type=positive, default=steps, metavar="INT", help=steps_help)
    parser.add_argument("--grid", choices=list(GRIDS), metavar="NAME", default="uniform", help=f"time grid: {', '.join(GRIDS)} [uniform]")
    tolerance = f"tolerance of an adaptive method [{default}]"
    parser.add_argument("--rtol", type=float, metavar="FLOAT", help=f"relative {tolerance}")
    parser.add_argument("--atol", type=float, metavar="FLOAT", help=f"absolute {tolerance}")
    parser.add_argument("--max-steps", type=positive, metavar="INT", help=f"an adaptive method gives up after so many [{MAX_STEPS}]")
    parser.add_argument("--per-sample", action="store_true",
                        help="an adaptive method chooses the steps of each sample by itself, not of a batch together")  # fmt: skip
    add_ends(parser)


def add_ends(parser: argparse.ArgumentParser) -> None:
    """The interval of a solve."""
    parser.add_argument("--t0", type=float, default=0.0, metavar="FLOAT", help="time of the noise, where the solve has one end [0]")
    parser.add_argument("--t1", type=float, default=1.0, metavar="FLOAT", help="time of the data, the other end; 0.999 for likelihoods of a"
                        " network that predicts data (data-ot), ill-conditioned at 1: those of slightly noisy data [1]")  # fmt: skip


def _width_or_name(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


def positive(text: str) -> int:
    """A whole number of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return value


def require_target(name: str, file: Path) -> None:
    """Told before the work that would be lost, not after it: OSError if the file of that option cannot be written."""
    if not file.parent.is_dir():
        raise FileNotFoundError(f"{name}: expected a file in a folder, got {file}: there is no folder {file.parent}")
    try:
        target = resolved(file)
    except OSError as error:
        raise ValueError(f"{name}: expected a file, got {file}: {error}") from error
    if file.is_dir():
        raise IsADirectoryError(f"{name}: expected a file, {file} is a folder")
    # A file is written beside the one that it replaces, a stream is appended to.
    places = [file] if is_stream(file) else [target.parent, *([target] if target.exists() else [])]
    if not places[0].exists():
        raise FileNotFoundError(f"{name}: expected a file in a folder, got {file}: there is no folder {places[0]}")
    if not all(os.access(place, os.W_OK) for place in places):
        raise PermissionError(f"{name}: expected a file that can be written, got {file}")


def solver_of(options: argparse.Namespace, method: str, steps: int) -> dict[str, Any]:
    """The solve that was asked for, where no steps were given with so many. Raises ValueError for options that the method has not."""
    adaptive = is_adaptive(method)
    refused = {"steps": None, "grid": "uniform"} if adaptive else {**dict.fromkeys(NOT_FOR_FIXED_STEPS), "per_sample": False}
    for name, left_out in refused.items():
        value = getattr(options, name)
        if value != left_out:
            kind, reason = ("adaptive", "places its own steps") if adaptive else ("fixed-step", NOT_FOR_FIXED_STEPS[name])
            raise ValueError(f"{name}: expected none for the {kind} method {method}, which {reason}, got {value}")
    accuracy = {name: getattr(options, name) for name in ("rtol", "atol", "max_steps")}
    rest = {name: getattr(options, name) for name in ("grid", "t0", "t1")}
    taken = None if adaptive else options.steps or steps
    return {"method": method, "steps": taken, "per_sample": "shrink" if options.per_sample else False, **accuracy, **rest}


def held_out_data(source: str | None, limit: int | None, config: TrainConfig, **changes: Any) -> Dataset:
    """The first `limit` images, or all, of digits:train, PATH:test, PATH (its test split) or the run's data, prepared as the run does.

    changes: of the preparation of other data than the run's. What is left out of a folder is told.
    """
    source = source or f"{config.data}:test"
    path, split = _parts(source)
    own = same_source(path, config.data)
    dataset = load_dataset(path, split, config.preparation if own else replace(config.preparation, **changes))
    for line in dataset.left_out:
        print(f"fm-fast: {line}", file=sys.stderr)
    found = replace(dataset, name=source, images=dataset.images[:limit], labels=dataset.labels[:limit])
    return with_levels(found, levels_of(config.data, bool(config.data_scale)))


def _parts(source: str) -> tuple[str, str]:
    path, _, split = source.rpartition(":")
    return (path, split) if path and split in SPLITS else (source, "test")


def source_of(source: str) -> str:
    """Without the name of a split."""
    return _parts(source)[0]


def are_undivided(held_out: Dataset, config: TrainConfig) -> bool:
    """Whether the test part that was asked for (of :func:`held_out_data`) is the images that the run was trained on."""
    path, split = _parts(held_out.name)
    return held_out.division == UNDIVIDED and split == "test" and same_source(path, config.data)


def warn_of_training_images() -> None:
    """Where images pass for held-out ones."""
    print("fm-fast: warning: the held-out images are training images; name others with --data, or train with --test-share", file=sys.stderr)


def warn_without_dequantisation(config: TrainConfig) -> None:
    """Bits/dim are of a density, and single grey levels have none."""
    if not config.dequantise and not config.data_scale:
        print("fm-fast: warning: the network was not trained with --dequantise, so its bits/dim say little", file=sys.stderr)
