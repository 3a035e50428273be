"""fm-fast evaluate: bits/dim, NFE and sample quality of a checkpoint, as in a row of the paper's Table 1."""

import argparse
import json
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fm_fast._solver.settings import TOLERANCE
from fm_fast.cli.options import (
    add_run,
    add_solver,
    are_undivided,
    held_out_data,
    positive,
    require_target,
    solver_of,
    source_of,
    warn_of_training_images,
    warn_without_dequantisation,
)
from fm_fast.solvers import ADAPTIVE, METHODS, is_adaptive
from fm_fast.train.config import TrainConfig
from fm_fast.train.data import Dataset, levels_of, load_dataset, with_levels
from fm_fast.train.data.identity import same_source
from fm_fast.train.evaluation.evaluate import Evaluation, evaluate_network
from fm_fast.train.evaluation.quality import require_torch_fidelity
from fm_fast.train.evaluation.restoration import WINDOW, Restoration
from fm_fast.train.execution.devices import pick_device
from fm_fast.train.files import replaced_whole
from fm_fast.train.storage.weights import load_model

NOT_FID = "a distance of a small classifier's features, trained on this data set; it is not FID"


def add_evaluate(commands: Any) -> None:
    """The command's options."""
    parser = commands.add_parser(
        "evaluate", help="bits/dim, NFE and sample quality of a checkpoint",
        description="Bits per dimension of held-out images and NFE by dopri5, as in the paper's Table 1, and the quality of as many"
        " samples: agreement with a small classifier, Fréchet distance of its features (not FID), 1-nearest-neighbour two-sample test;"
        " of a super-resolution run also PSNR and SSIM, as in Table 2.",
    )  # fmt: skip
    add_run(parser)
    parser.add_argument("--data", metavar="SOURCE", help="held-out images: digits:test or PATH[:train|:test] [the run's data, :test]")
    parser.add_argument("--limit", type=positive, metavar="INT", help="the first so many held-out images only [all]")
    parser.add_argument("--unconditional", action="store_true", help="do not tell the network the labels")
    parser.add_argument("--draws", type=positive, default=1, metavar="INT", help="dequantisation draws an image; the paper: 10 to 50 [1]")
    parser.add_argument("--probes", type=positive, default=1, metavar="INT", help="probe vectors of the divergence, fixed for a solve [1]")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, metavar="FLOAT", help="absolute and relative, of dopri5 [1e-5]")
    parser.add_argument("--method", choices=[*METHODS, *ADAPTIVE], metavar="NAME", default="dopri5",
                        help=f"solver of the samples; bits/dim stay those of dopri5: {', '.join(METHODS)}; adaptive:"
                        f" {', '.join(ADAPTIVE)} [dopri5]")  # fmt: skip
    add_solver(parser, steps_help="steps of a fixed-step method [as for the run's pictures]", steps=None, default="that of --tolerance")
    parser.add_argument("--no-bits", dest="bits", action="store_false", help="the samples alone: bits/dim take most of the time")
    parser.add_argument("--fid", action="store_true", help="also FID and the inception score (needs torch-fidelity, downloads its network)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result to this file")
    parser.set_defaults(run=_evaluate)


def _evaluate(options: argparse.Namespace) -> None:
    device = pick_device(options.device)
    _check(options)
    model, config = load_model(options.checkpoint, options.weights)
    if options.fid and config.data_scale:
        raise ValueError("fid: expected none for a run of real numbers, which are no pictures")
    solver = _solver(options, config)
    held_out = held_out_data(options.data, options.limit, config)
    train = _training_data(options, config)
    if options.bits:
        warn_without_dequantisation(config)
    kind = _kind_of(config, train, held_out)
    print(f"{held_out.name}: {len(held_out)} {kind} images; {config.objective}; {_solves(options, solver)}", flush=True)
    result = evaluate_network(
        model.to(device), config, train.to(device), held_out.to(device), seed=options.seed, batch_size=options.batch_size,
        tolerance=options.tolerance, unconditional=options.unconditional, with_fid=options.fid, ends=(options.t0, options.t1),
        draws=options.draws, probes=options.probes, solver=solver, with_bits=options.bits,
    )  # fmt: skip
    print(report(result), flush=True)
    if options.json is not None:
        content = _settings(options, config, held_out) | solver | record(result)
        with replaced_whole(options.json) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _training_data(options: argparse.Namespace, config: TrainConfig) -> Dataset:
    """Of the run; or where they have been moved, the training part of the data that were named instead, which is told."""
    try:
        return load_dataset(config.data, "train", config.preparation)
    except FileNotFoundError:
        if options.data is None or same_source(source_of(options.data), config.data):
            raise
    found = with_levels(load_dataset(source_of(options.data), "train", config.preparation), levels_of(config.data, bool(config.data_scale)))
    print(f"fm-fast: warning: the run's data, {config.data}, are not there: training images are those of {found.name}", file=sys.stderr)
    return found


def _check(options: argparse.Namespace) -> None:
    """What the end of the work needs, and what would have no effect."""
    for name, default in () if options.bits else _of_likelihoods(options).items():
        if getattr(options, name) != default:
            raise ValueError(f"{name}: expected none with --no-bits, which asks for no likelihoods, got {getattr(options, name)}")
    if options.json is not None:
        require_target("json", options.json)
    if options.fid:
        require_torch_fidelity()


def _of_likelihoods(options: argparse.Namespace) -> dict[str, float]:
    """Options that the samples do not follow, by name with their defaults. An adaptive method has the tolerance unless it has its own."""
    follow_tolerance = is_adaptive(options.method) and None in (options.rtol, options.atol)
    return {"draws": 1, "probes": 1, "t1": 1.0} | ({} if follow_tolerance else {"tolerance": TOLERANCE})


def _solver(options: argparse.Namespace, config: TrainConfig) -> dict[str, Any]:
    """That of the samples, which has the tolerance of the likelihoods unless it has its own; its ends are those of `evaluate_network`."""
    solver = solver_of(options, options.method, config.sample_steps)
    del solver["t0"], solver["t1"]
    if not is_adaptive(options.method):
        return solver
    return solver | {name: options.tolerance for name in ("rtol", "atol") if solver[name] is None}


def _solves(options: argparse.Namespace, solver: dict[str, Any]) -> str:
    """Of the likelihoods and of the samples."""
    bits = f"bits/dim by dopri5, tolerance {options.tolerance:g}; " if options.bits else ""
    steps = f"rtol {solver['rtol']:g}, atol {solver['atol']:g}" if solver["steps"] is None else f"{solver['steps']} steps"
    return f"{bits}samples by {solver['method']}, {steps}"


def _kind_of(config: TrainConfig, train: Dataset, held_out: Dataset) -> str:
    """What the images are; with a warning."""
    if not are_undivided(held_out, config) and not torch.equal(held_out.images, train.images[: len(held_out)]):
        return "held-out"
    warn_of_training_images()
    return "training"


def report(result: Evaluation) -> str:
    """For people."""
    bits, samples, quality = result.bits, result.samples, result.quality
    agreement = "unknown without classes" if quality.agreement is None else f"{quality.agreement:.1%}"
    novelty = "unknown, they are training images" if quality.novelty is None else f"{quality.novelty:.2f}"
    counted = f"of their batch's; {len(samples.nfe_of_batches)} batches of {samples.batch_size} or fewer"
    return (
        ("" if bits is None else f"bits/dim: {bits.mean:.4f} +- {bits.mean_std_err:.4f} (standard error of the mean over the images)\n")
        + f"NFE: {samples.nfe:.1f} (mean over {len(samples.images)} samples"
        f" {counted if samples.nfe_of_each is None else 'with steps of their own'})\n"
        f"classifier agreement: {agreement} (held-out real images: {quality.real_agreement:.1%})\n"
        f"feature Fréchet distance: {quality.frechet:.4f} (real images: {quality.real_frechet:.4f}; {NOT_FID})\n"
        f"1-NN two-sample accuracy: {quality.nearest_neighbour:.3f} (real images: {quality.real_nearest_neighbour:.3f};"
        " 0.5: cannot be told apart)\n"
        f"distance to the nearest training image, relative to that of held-out images: {novelty}\n"
        + (f"FID: {quality.fid:.2f}\ninception score: {quality.inception_score:.2f}\n" if quality.fid is not None else "")
        + ("" if result.restoration is None else _restored(result.restoration))
        + f"{result.seconds:.1f} s"
    )


def _restored(found: Restoration) -> str:
    side = found.window
    smaller = "" if side == WINDOW else f"; windows of {side}x{side} pixels, because {WINDOW}x{WINDOW} do not fit the images"
    return (
        f"PSNR: {found.samples.psnr:.2f} dB (bicubic interpolation: {found.bicubic.psnr:.2f} dB)\n"
        f"SSIM: {found.samples.ssim:.3f} (bicubic interpolation: {found.bicubic.ssim:.3f}{smaller})\n"
    )


def _settings(options: argparse.Namespace, config: TrainConfig, held_out: Dataset) -> dict[str, Any]:
    names = ("weights", "seed", "batch_size", "unconditional", "draws", "probes", "tolerance", "t0", "t1")
    given = {name: getattr(options, name) for name in names}
    return {"checkpoint": str(options.checkpoint), "data": held_out.name, "objective": config.objective, **given}


def record(result: Evaluation) -> dict[str, Any]:
    """For programs."""
    bits, samples = result.bits, result.samples
    return {
        "bits_per_dim": bits and bits.mean,
        "std_err": None if bits is None or math.isnan(bits.mean_std_err) else bits.mean_std_err,
        "likelihood_nfe": bits and bits.nfe,
        "nfe": samples.nfe, "nfe_of_batches": list(samples.nfe_of_batches), "samples": len(samples.images),
        **asdict(result.quality), "frechet_is": NOT_FID, "seconds": result.seconds,
        "restoration": None if result.restoration is None else asdict(result.restoration),
    }  # fmt: skip
