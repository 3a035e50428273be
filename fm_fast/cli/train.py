"""fm-fast train: a run of the reference U-Net."""

import argparse
import functools
from dataclasses import Field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

from fm_fast.train.config import TrainConfig
from fm_fast.train.loop import train
from fm_fast.train.presets import PRESETS, SUMMARIES
from fm_fast.train.storage.run_folder import RunFolder
from fm_fast.train.storage.weights import load_model

# Settings that a run takes from the one that it begins with
TASK = ("objective", "super_resolution", "preconditioned", "sigma_min", "data_shift", "data_scale")
# Fields of the network that the data decides.
FROM_DATA = ("image_size", "image_channels", "classes", "low_resolution_channels")


def add_train(commands: Any) -> None:
    """The command's options: every setting of a run."""
    parser = commands.add_parser(
        "train", help="train the reference U-Net",
        description="Train the reference U-Net. `fm-fast train digits` uses the shipped digits, `fm-fast train --data PATH` your images.\n"
        "Defaults in brackets are those of digits; other presets have their own. Several processes, one a device:\n"
        "torchrun --nproc-per-node N --no-python fm-fast train ...",
        epilog="presets:\n" + "\n".join(f"  {name:20} {SUMMARIES[name]}" for name in PRESETS),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("preset", nargs="?", choices=sorted(PRESETS), help="settings to start from [images with --data]")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--resume", action="store_true", help="continue the run in the folder --out from its newest valid"
                       " checkpoint; what is not given stays as it was")  # fmt: skip
    start.add_argument("--overwrite", action="store_true", help="delete another run's files in the folder --out, after"
                       " the first step")  # fmt: skip
    _add_fields(parser, TrainConfig, PRESETS["digits"])
    parser.set_defaults(run=_train)


def _add_fields(parser: argparse.ArgumentParser, config_type: type, defaults: Any, prefix: str = "") -> None:
    """One option a field; a field that is a dataclass becomes options with its name and a dot in front."""
    hints = get_type_hints(config_type)
    for entry in fields(config_type):
        default = getattr(defaults, entry.name)
        if is_dataclass(default):
            _add_fields(parser, hints[entry.name], default, f"{prefix}{entry.name}.")
        elif entry.name not in FROM_DATA:
            _add_option(parser, entry, hints[entry.name], default, prefix)


def _add_option(parser: argparse.ArgumentParser, entry: Field, hint: Any, default: Any, prefix: str) -> None:
    name, text = f"{prefix}{entry.name}", f"{entry.metadata['help']} [{default}]".replace("%", "%%")
    option = f"--{name.replace('_', '-')}"
    # An option that is not given leaves no trace, so that it does not override the preset.
    if hint is bool:
        parser.add_argument(option, dest=name, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
    elif get_args(hint):
        numbers = functools.partial(_numbers, get_args(hint)[0])
        parser.add_argument(option, dest=name, type=numbers, metavar="N,N", default=argparse.SUPPRESS, help=text)
    else:
        parser.add_argument(option, dest=name, type=hint, metavar=hint.__name__.upper(), default=argparse.SUPPRESS, help=text)


def _numbers(kind: type, text: str) -> tuple[Any, ...]:
    """ "1,2,2" -> (1, 2, 2)."""
    try:
        return tuple(kind(part) for part in text.split(",") if part)
    except ValueError as error:
        numbers = "whole numbers" if kind is int else "numbers"
        raise argparse.ArgumentTypeError(f"invalid list of {numbers}: {text!r}, expected N,N with commas between them") from error


def config_from(options: argparse.Namespace) -> TrainConfig:
    """The given options, for the rest the preset's, or with --resume the stored run's. Raises ValueError if no data or folder is named."""
    given = _given(options)
    base = (
        _resumed(options.preset, given)
        if options.resume
        else _begun(_preset(options.preset, given), given.get("init_from"), given.get("objective"))
    )
    try:
        model = replace(base.model, **{name.removeprefix("model."): value for name, value in given.items() if "." in name})
    except ValueError as error:
        raise ValueError(f"model.{error}") from error
    return replace(base, model=model, **{name: value for name, value in given.items() if "." not in name})


def _given(options: argparse.Namespace) -> dict[str, Any]:
    """The settings that the command line names."""
    return {name: value for name, value in vars(options).items() if name not in ("run", "preset", "resume", "overwrite")}


def _preset(name: str | None, given: dict[str, Any]) -> TrainConfig:
    if name is None and "data" not in given:
        raise ValueError(f"train: expected a preset ({', '.join(PRESETS)}) or --data PATH")
    return PRESETS[name or ("images" if given["data"] != "digits" else "digits")]


def _begun(preset: TrainConfig, source: str | None, objective: str | None) -> TrainConfig:
    """The preset with the network and the task of the run to begin with."""
    if not source:
        return preset
    stored = load_model(source)[1]
    # Of another objective, which is refused later, they would be taken for mistakes of their own.
    task = TASK if objective in (None, stored.objective) else ("super_resolution", "data_shift", "data_scale")
    return replace(preset, model=stored.model, **{name: getattr(stored, name) for name in task})


def _resumed(name: str | None, given: dict[str, Any]) -> TrainConfig:
    """The settings of the run in the folder --out, or the preset's; of a preset's own settings its data count as asked for."""
    preset = PRESETS.get(name or "")
    if "init_from" in given:
        raise ValueError("resume, init_from: expected one of them, got both")
    if preset is None and "out" not in given:
        raise ValueError(f"train: expected --out FOLDER, or a preset ({', '.join(PRESETS)}), with --resume")
    out = given.get("out", preset and preset.out)
    return replace(RunFolder(Path(out)).settings(), out=out, **({"data": preset.data} if preset and preset.data else {}))


def _train(options: argparse.Namespace) -> None:
    config = config_from(options)
    if not config.data:
        preset = f" with preset {options.preset}" if options.preset else ""
        raise ValueError(f"data: expected --data PATH{preset}, got {config.data!r}")
    # A run that was begun before such settings were refused may still name them again.
    train(config, options.resume, options.overwrite, () if options.resume else _given(options))
