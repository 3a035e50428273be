"""fm-fast likelihood: bits per dimension of a data set under a checkpoint, with its standard error."""

import argparse
import json
from pathlib import Path
from typing import Any

from fm_fast._solver.probes import KINDS
from fm_fast.cli.options import (
    add_run,
    add_solver,
    are_undivided,
    held_out_data,
    positive,
    require_target,
    solver_of,
    warn_of_training_images,
    warn_without_dequantisation,
)
from fm_fast.solvers import ADAPTIVE, METHODS
from fm_fast.train.config import TrainConfig
from fm_fast.train.data import Dataset
from fm_fast.train.evaluation.likelihood import DatasetBits, dataset_bits
from fm_fast.train.execution.devices import pick_device
from fm_fast.train.files import replaced_whole
from fm_fast.train.storage.weights import load_model

STEPS = 100


def add_likelihood(commands: Any) -> None:
    """The command's options."""
    parser = commands.add_parser(
        "likelihood", help="bits per dimension of data under a checkpoint",
        description="Bits per dimension of data under the weights of a checkpoint, by the paper's protocol: dequantisation, the"
        " flow's ODE back to noise, the divergence by random probes. The network should have been trained with --dequantise.",
    )  # fmt: skip
    add_run(parser)
    parser.add_argument("--data", metavar="SOURCE", help="digits:train, digits:test or PATH[:train|:test] [the run's data, :test]")
    parser.add_argument("--limit", type=positive, metavar="INT", help="the first so many images only [all]")
    parser.add_argument("--unconditional", action="store_true", help="do not tell the network the labels")
    parser.add_argument("--method", choices=[*METHODS, *ADAPTIVE], metavar="NAME", default="midpoint",
                        help=f"solver: {', '.join(METHODS)}; adaptive: {', '.join(ADAPTIVE)} [midpoint]")  # fmt: skip
    add_solver(parser, steps_help=f"steps of a fixed-step method [{STEPS}]", steps=None)
    parser.add_argument("--probes", type=positive, default=1, metavar="INT", help="probe vectors an evaluation of the divergence [1]")
    parser.add_argument("--kind", choices=KINDS, default="auto", metavar="NAME", help=f"kind of probes: {', '.join(KINDS)} [auto]")
    parser.add_argument("--replicates", type=positive, default=1, metavar="INT", help="independent repetitions of all probes [1]")
    parser.add_argument(
        "--draws", type=positive, default=1, metavar="INT", help="dequantisation draws an image; the paper uses 10 to 50 [1]"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result, with every image's, to this file")
    parser.add_argument("--progress", action="store_true", help="show a progress bar (needs tqdm; fixed-step methods)")
    parser.set_defaults(run=_likelihood)


def _likelihood(options: argparse.Namespace) -> None:
    device, solver = pick_device(options.device), _solver(options)
    if options.json is not None:
        require_target("json", options.json)
    model, config = load_model(options.checkpoint, options.weights)
    dataset = held_out_data(options.data, options.limit, config)
    warn_without_dequantisation(config)
    if are_undivided(dataset, config):
        warn_of_training_images()
    print(_headline(options, config, dataset, solver), flush=True)
    result = dataset_bits(model.to(device), config, dataset.to(device), options.batch_size, options.seed, options.unconditional, **solver)
    print(_report(result))
    if options.json is not None:
        with replaced_whole(options.json) as temporary:
            temporary.write_text(json.dumps(_record(options, dataset, solver, result)) + "\n", encoding="utf-8")


def _solver(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of bits_per_dim. Raises ValueError for probes that an exact divergence does not take."""
    for name in ("probes", "replicates") if options.kind == "exact" else ():
        if getattr(options, name) != 1:
            raise ValueError(f"{name}: expected none with --kind exact, which computes the divergence, got {getattr(options, name)}")
    names = ("probes", "kind", "replicates", "draws", "progress")
    return {**solver_of(options, options.method, STEPS), **{name: getattr(options, name) for name in names}}


def _headline(options: argparse.Namespace, config: TrainConfig, dataset: Dataset, solver: dict[str, Any]) -> str:
    channels, height, width = dataset.images.shape[1:]
    steps = "" if solver["steps"] is None else f", {solver['steps']} steps"
    levels = "real numbers" if dataset.levels is None else f"{dataset.levels} levels"
    condition = "without labels" if options.unconditional else "given their labels"
    return (
        f"{dataset.name}: {len(dataset)} images {channels}x{height}x{width} with {levels}, {condition}; {config.objective};"
        f" {solver['method']}{steps}; probes: {solver['kind']}, {solver['probes']} x {solver['replicates']}; draws: {solver['draws']}"
    )


def _report(result: DatasetBits) -> str:
    probes = "" if result.probe_std_err is None else f"; {result.probe_std_err:.2g} of it by the probes"
    error = f" +- {result.mean_std_err:.4f} (standard error of the mean over the images{probes})" if len(result.bpd) > 1 else ""
    return (
        f"bits/dim: {result.mean:.4f}{error}\n"
        f"{result.nfe:g} evaluations and {result.nvjp:g} vector-Jacobian products an image; {result.seconds:.1f} s"
    )


def _record(options: argparse.Namespace, dataset: Dataset, solver: dict[str, Any], result: DatasetBits) -> dict[str, Any]:
    return {
        "checkpoint": str(options.checkpoint), "weights": options.weights, "data": dataset.name, "images": len(dataset),
        "levels": dataset.levels,
        "unconditional": options.unconditional, "seed": options.seed, **solver, "bits_per_dim": result.mean,
        "std_err": result.mean_std_err if len(dataset) > 1 else None, "probe_std_err": result.probe_std_err,
        "nfe": result.nfe, "nvjp": result.nvjp, "seconds": result.seconds, "bits_per_dim_of_images": result.bpd.tolist(),
    }  # fmt: skip
