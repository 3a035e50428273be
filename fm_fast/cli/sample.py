"""fm-fast sample: pictures, arrays or files of samples from a checkpoint."""

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fm_fast.cli.options import (
    add_run,
    add_solver,
    are_undivided,
    held_out_data,
    positive,
    require_target,
    solver_of,
    warn_of_training_images,
)
from fm_fast.solvers import ADAPTIVE, METHODS
from fm_fast.train.condition import NULL_CLASS
from fm_fast.train.config import TrainConfig
from fm_fast.train.data import Dataset, levels_of
from fm_fast.train.data.low_resolution import as_originals, is_reduced, reduced_side
from fm_fast.train.evaluation.likelihood import require_fitting
from fm_fast.train.evaluation.sample import BatchDone, enlargements, ignore, sample_classes, sample_enlarged
from fm_fast.train.execution.devices import pick_device
from fm_fast.train.files import replaced_whole
from fm_fast.train.reporting.picture import write_images
from fm_fast.train.reporting.single_images import ImageFiles, require_empty
from fm_fast.train.storage.weights import load_model

# Classes of one picture are put in rows of at most this many samples.
LONGEST_ROW = 20
DEFAULT_OUT = Path("samples.png")


def add_sample(commands: Any) -> None:
    """The command's options."""
    parser = commands.add_parser(
        "sample", help="draw samples from a checkpoint",
        description="Draw samples with the weights of a checkpoint, as a picture, as an array, or as a file each.",
    )  # fmt: skip
    add_run(parser)
    parser.add_argument("--classes", nargs="+", default=["all"], metavar="CLASS", help="class numbers, all, or none (no condition) [all]")
    parser.add_argument("--count", type=positive, default=10, metavar="INT", help="samples of each class [10]")
    parser.add_argument("--data", metavar="SOURCE", help="of a super-resolution run: images to enlarge, --count in all (of the network's"
                        " size: they are reduced first; without labels: --classes none); digits:test, PATH[:train|:test]"
                        " [the run's data, :test]")  # fmt: skip
    parser.add_argument("--out", type=_output_file, metavar="FILE",
                        help="a .png picture, one row a class, or an .npz archive with images (uint8 [N, C, H, W]) and labels"
                        "; of real-valued data float32, in their units [samples.png, or none with --images]")  # fmt: skip
    parser.add_argument("--images", metavar="FOLDER", help="a new or empty folder for a PNG file a sample, 000012-class-3.png and so on, of"
                        " the network's size and 0..255, as other programs read them")  # fmt: skip
    parser.add_argument("--guidance", type=float, metavar="FLOAT", help="guidance weight; 1 is no guidance [that of the run's pictures]")
    parser.add_argument("--churn", type=float, default=0.0, metavar="FLOAT", help="stochastic sampling: the share of a step by which noise"
                        " first takes the state back; fixed steps, not ab2 and ab3 [0, the ODE]")  # fmt: skip
    parser.add_argument("--method", choices=[*METHODS, *ADAPTIVE], metavar="NAME",
                        help=f"solver: {', '.join(METHODS)}; adaptive: {', '.join(ADAPTIVE)} [that of the run's pictures]")  # fmt: skip
    add_solver(parser, steps_help="steps of a fixed-step method [as for the run's pictures]", steps=None)
    parser.set_defaults(run=_sample)


def _output_file(text: str) -> Path:
    if Path(text).suffix not in (".png", ".npz"):
        raise argparse.ArgumentTypeError(f"expected a name that ends in .png or .npz, got {text!r}")
    return Path(text)


@dataclass(frozen=True)
class _Targets:
    """A picture or an archive of all samples, and a folder for each of them; at least one of the two."""

    out: Path | None
    folder: Path | None

    @classmethod
    def of(cls, options: argparse.Namespace) -> "_Targets":
        """What was asked for. Raises OSError or ValueError for what cannot be written."""
        folder = None if options.images is None else require_empty("images", options.images)
        out = options.out or (DEFAULT_OUT if folder is None else None)
        if out is not None:
            require_target("out", out)
        return cls(out, folder)

    def of_batches(self, config: TrainConfig, levels: int | None) -> BatchDone:
        return ignore if self.folder is None else ImageFiles(self.folder, config.model.image_channels, levels).add

    def __str__(self) -> str:
        return ", ".join(str(target) for target in (self.out, self.folder) if target is not None)


def _sample(options: argparse.Namespace) -> None:
    device, targets = pick_device(options.device), _Targets.of(options)
    model, config = load_model(options.checkpoint, options.weights)
    classes, solver, levels = _classes(options.classes, config.model.classes), _solver(options, config), _levels(config)
    started = time.perf_counter()
    if config.super_resolution > 1:
        images = _enlarged(options, targets, model.to(device), config, solver)
    elif options.data is not None:
        raise ValueError(f"data: expected none, because {options.checkpoint} is no super-resolution run, got {options.data}")
    else:
        numbers, each = (options.count, options.seed, options.batch_size, levels), targets.of_batches(config, levels)
        images, labels = sample_classes(model.to(device), config, classes, *numbers, each, **solver)
        _write(targets.out, images, labels, config, options.count)
    seconds = time.perf_counter() - started
    print(f"{targets}: {len(images)} samples by {solver['method']}, guidance {solver['guidance']:g}, in {seconds:.1f} s")


def _enlarged(options: argparse.Namespace, targets: _Targets, model: nn.Module, config: TrainConfig, solver: dict[str, Any]) -> Tensor:
    """Samples of small images, written beside these and, where there are such, the originals.

    A row of a picture holds one image, or an archive all.
    """
    if options.classes not in (["all"], ["none"]):
        raise ValueError(f"classes: expected all or none, because an image brings its own, got {' '.join(options.classes)}")
    originals, reduced = _to_enlarge(options, config)
    each = targets.of_batches(config, originals.levels)
    drawn = sample_enlarged(model, config, originals, options.seed, options.batch_size, each, **solver)
    if targets.out is not None and targets.out.suffix == ".png":
        shown = enlargements(config, originals, drawn, shown=not reduced)
        _write(targets.out, shown, originals.labels, config, len(shown) // len(drawn))
    else:
        _write(targets.out, drawn, originals.labels, config, len(drawn))
    return drawn


def _to_enlarge(options: argparse.Namespace, config: TrainConfig) -> tuple[Dataset, bool]:
    """Images of the network's size with the labels to tell it, and whether they stand for images that were small already."""
    without_class = options.classes == ["none"]
    unlabelled = without_class or config.preparation.unlabelled
    found = held_out_data(options.data, options.count, config, unlabelled=unlabelled, as_is=reduced_side(config))
    if without_class:
        found = replace(found, labels=torch.full_like(found.labels, NULL_CLASS), classes=0)
    reduced = is_reduced(config, found)
    originals = as_originals(config, found) if reduced else found
    require_fitting(config, originals)
    if are_undivided(found, config):
        warn_of_training_images()
    return originals, reduced


def _classes(names: Sequence[str], known: int) -> list[int]:
    """The class numbers that were asked for; [-1] for none."""
    if names == ["none"] or (names == ["all"] and known == 0):
        return [NULL_CLASS]
    if names == ["all"]:
        return list(range(known))
    if known == 0:
        raise ValueError(f"classes: expected none; the run has no classes, got {' '.join(names)}")
    if not all(name.isdecimal() and int(name) < known for name in names):
        raise ValueError(f"classes: expected numbers in 0..{known - 1}, all, or none, got {' '.join(names)}")
    return [int(name) for name in names]


def _solver(options: argparse.Namespace, config: TrainConfig) -> dict[str, Any]:
    """The solve that was asked for, with that of the run's pictures for what was left out."""
    method, without_class = options.method or config.sample_method, options.classes == ["none"]
    solver = solver_of(options, method, config.sample_steps)
    guidance = options.guidance if options.guidance is not None else 1.0 if without_class else config.picture_guidance
    if not math.isfinite(guidance):
        raise ValueError(f"guidance: expected a finite number, got {guidance}")
    if without_class and guidance != 1.0:
        raise ValueError(f"guidance: expected 1 without a class, got {guidance}")
    if guidance != 1.0 and not config.knows_the_null_class:
        raise ValueError(f"guidance: expected 1 for a run with label_drop 0 or without classes, got {guidance}")
    if without_class and config.conditional and not config.knows_the_null_class:
        raise ValueError("classes: expected numbers or all for a run with label_drop 0, which has not learnt to go without, got none")
    return {**solver, "guidance": guidance, "churn": options.churn}


def _levels(config: TrainConfig) -> int | None:
    return levels_of(config.data, bool(config.data_scale))


def _write(out: Path | None, images: Tensor, labels: Tensor, config: TrainConfig, count: int) -> None:
    """Real numbers in the units of the data, but as the network sees them in a picture."""
    if out is None:
        return
    if out.suffix == ".npz":
        with replaced_whole(out) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, images=_in_units(images, config).numpy(), labels=labels.numpy())
    else:
        write_images(out, images, _levels(config), columns=_columns(count))


def _in_units(images: Tensor, config: TrainConfig) -> Tensor:
    units = config.standardisation
    return images if units is None else units.restored(images)


def _columns(count: int) -> int:
    """Images in a row: a divisor of a class's count, so that each row belongs to one class; all where only short rows would do."""
    longest = max(columns for columns in range(1, LONGEST_ROW + 1) if count % columns == 0)
    return longest if 2 * longest >= LONGEST_ROW else count
