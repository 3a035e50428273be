"""What several commands share: options of a run and of a solver, held-out data, and warnings before the work."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from fm_fast.grids import NAMED as GRIDS
from fm_fast.solvers import is_adaptive
from fm_fast.train.config import TrainConfig
from fm_fast.train.data import Dataset, load_dataset

SPLITS = ("train", "test")


def add_run(parser: argparse.ArgumentParser) -> None:
    """What every command that reads a checkpoint takes."""
    parser.add_argument("checkpoint", metavar="RUN", help="the folder of a run, a checkpoint of it, or a .safetensors file of its weights")
    parser.add_argument("--seed", type=int, default=0, metavar="INT", help="the result is a function of this number and the settings [0]")
    parser.add_argument("--batch-size", type=positive, default=256, metavar="INT", help="images at a time; fixed steps give the same [256]")
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, ... [auto]")


def add_solver(parser: argparse.ArgumentParser, steps_help: str, steps: int | None) -> None:
    """The solver's options but for its name."""
    parser.add_argument("--steps", type=positive, default=steps, metavar="INT", help=steps_help)
    parser.add_argument("--grid", choices=list(GRIDS), metavar="NAME", default="uniform", help=f"time grid: {', '.join(GRIDS)} [uniform]")
    parser.add_argument("--rtol", type=float, default=1e-5, metavar="FLOAT", help="relative tolerance of an adaptive method [1e-5]")
    parser.add_argument("--atol", type=float, default=1e-5, metavar="FLOAT", help="absolute tolerance of an adaptive method [1e-5]")


def positive(text: str) -> int:
    """A whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def require_folder(file: Path) -> None:
    """Told before the work that would be lost, not after it."""
    if not file.parent.is_dir():
        raise FileNotFoundError(f"{file}: there is no folder {file.parent}")


def require_no_steps(method: str, steps: int | None) -> None:
    """An adaptive method chooses its own."""
    if is_adaptive(method) and steps is not None:
        raise ValueError(f"steps: expected none for the adaptive method {method}, got {steps}")


def held_out_data(source: str | None, limit: int | None, config: TrainConfig) -> Dataset:
    """The first `limit` images, or all, of digits:train, PATH:test, PATH (its test split) or the run's data, prepared as the run does."""
    source = source or f"{config.data}:test"
    path, _, split = source.rpartition(":")
    path, split = (path, split) if path and split in SPLITS else (source, "test")
    dataset = load_dataset(path, split, config.preparation)
    return replace(dataset, name=source, images=dataset.images[:limit], labels=dataset.labels[:limit])


def warn_without_dequantisation(config: TrainConfig) -> None:
    """Bits/dim are of a density, and single grey levels have none."""
    if not config.dequantise:
        print("fm-fast: warning: the network was not trained with --dequantise, so its bits/dim say little", file=sys.stderr)
