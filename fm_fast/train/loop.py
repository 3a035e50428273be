"""A whole run: data, steps, log, pictures, checkpoints, report."""

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from fm_fast.train.checkpoint import restore
from fm_fast.train.config import TrainConfig, fit_to_data
from fm_fast.train.data import DataOrder, Dataset, load_dataset
from fm_fast.train.evaluate import Quality, evaluate
from fm_fast.train.interrupt import deferred_interrupt, stop
from fm_fast.train.log import Logger
from fm_fast.train.picture import write_images
from fm_fast.train.run_folder import RunFolder
from fm_fast.train.sample import sample, starting_noise, to_integers
from fm_fast.train.schedule import learning_rate
from fm_fast.train.step import TrainState, network_of, new_state, training_step
from fm_fast.train.weights import can_write_weights, save_weights

PICTURE_CLASSES = 10


@dataclass(frozen=True)
class Result:
    """What a run leaves: its final state, the training time in seconds, and the quality report (shipped digits only)."""

    state: TrainState
    config: TrainConfig
    seconds: float
    quality: Quality | None


@dataclass(frozen=True)
class Run:
    """What the functions of this file share."""

    state: TrainState
    config: TrainConfig
    dataset: Dataset
    folder: RunFolder


def train(config: TrainConfig, resuming: bool = False, overwriting: bool = False) -> Result:
    """Train as configured; writes checkpoints, weights.safetensors, samples.png and log.jsonl into `config.out`.

    resuming: continue from the newest valid checkpoint in `config.out`, bit by bit as if the run had not been interrupted (same
    machine, same number of threads). overwriting: delete another run's checkpoints there. Ctrl-C and SIGTERM let the step finish and
    write a checkpoint, then raise KeyboardInterrupt and SystemExit(143).
    Raises FileNotFoundError or ValueError for missing or damaged data and checkpoints, FileExistsError where a new run would
    overwrite another's, FloatingPointError if the loss is not finite.
    """
    if resuming and overwriting:
        raise ValueError("resume, overwrite: expected one of them, got both")
    device = pick_device(config.device)
    dataset = load_dataset(config.data, "train", config.preparation).to(device)
    config = fit_to_data(config, dataset.images.shape[1:], dataset.classes)
    run = Run(new_state(config, device), config, dataset, RunFolder(Path(config.out)))
    with run.folder.held(resuming, overwriting):
        if resuming:
            _resume(run)
        print(_headline(run, device), flush=True)
        return _report(run, _run(run))


def _resume(run: Run) -> None:
    found = run.folder.newest_valid()
    restore(found.file, found.content, run.state, run.config)
    for text in found.warnings:
        print(f"warning: {text}", flush=True)
    found.set_damaged_aside()


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA where there is one, else the CPU. Raises ValueError for an unknown name."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: {name!r} was asked for, but torch finds no CUDA device")
    return device


def advance(state: TrainState, config: TrainConfig, dataset: Dataset, steps: int) -> list[torch.Tensor]:
    """`steps` training steps without log or files; returns their losses."""
    order = DataOrder(len(dataset), config.seed)
    return [training_step(state, config, dataset, order).mean for _ in range(steps)]


def _run(run: Run) -> float:
    """All remaining steps; returns the seconds they took, without pictures and checkpoints."""
    logger, started = Logger(run.folder.log, run.config, run.state.step), time.perf_counter()
    try:
        return _steps(run, logger) - started
    finally:
        logger.close()


def _steps(run: Run, logger: Logger) -> float:
    state, config, paused = run.state, run.config, 0.0
    order, network = DataOrder(len(run.dataset), config.seed), network_of(state, config)
    with deferred_interrupt() as stopping:
        while state.step < config.steps:
            rate = learning_rate(config, state.step)
            loss = training_step(state, config, run.dataset, order, network=network)
            logger.step(state.step, loss.mean, rate, loss.by_quartile)
            paused += logger.without_timing(lambda: _interval_files(run))
            if stopping() and state.step < config.steps:
                _save(run)
                logger.say(f"interrupted after step {state.step}; continue with --resume")
                stop(stopping())
    return time.perf_counter() - paused


def _interval_files(run: Run) -> None:
    last = run.state.step == run.config.steps
    if last or _due(run.state.step, run.config.checkpoint_every):
        _save(run)
    if last or _due(run.state.step, run.config.sample_every):
        _write_picture(run)


def _save(run: Run) -> None:
    run.folder.save(run.state, run.config)
    if can_write_weights():
        save_weights(run.folder.weights, run.state.average.state_dict(), run.config, run.state.step)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _write_picture(run: Run) -> None:
    """One row a class (the first ten classes), always from the same noise, so that two pictures show the training between them."""
    config, dataset, columns = run.config, run.dataset, run.config.samples_per_class
    rows = min(dataset.classes, PICTURE_CLASSES)
    labels = torch.arange(rows, device=dataset.device).repeat_interleave(columns) if config.conditional else None
    shape = (rows * columns, *dataset.images.shape[1:])
    x0 = starting_noise(shape, config.recipe, config.seed, index=1, device=dataset.device)
    x = sample(run.state.average, x0, labels, config.recipe, config.sample_steps, config.sample_method, config.guidance)
    write_images(run.folder.samples, to_integers(x, dataset.levels), dataset.levels, columns)


def _headline(run: Run, device: torch.device) -> str:
    dataset, config = run.dataset, run.config
    channels, height, width = dataset.images.shape[1:]
    parameters = sum(parameter.numel() for parameter in run.state.model.parameters())
    return (
        f"{dataset.name}: {len(dataset)} images {channels}x{height}x{width}, {dataset.classes} classes;"
        f" {config.objective}; U-Net of {parameters / 1e6:.2f} M parameters on {device}; steps {run.state.step}..{config.steps}"
    )


def _report(run: Run, seconds: float) -> Result:
    files = [file for file in (run.folder.samples, run.folder.checkpoint(run.config.steps), run.folder.weights) if file.exists()]
    print(f"trained in {seconds:.1f} s; wrote {', '.join(map(str, files))} and {run.folder.log}", flush=True)
    return Result(run.state, run.config, seconds, _quality(run))


def _quality(run: Run) -> Quality | None:
    config, dataset = run.config, run.dataset
    if config.data != "digits" or not (config.evaluate and config.conditional):
        return None
    held_out = load_dataset("digits", "test", config.preparation).to(dataset.device)
    quality = evaluate(run.state.average, config.recipe, dataset, held_out, config.seed, config.guidance, config.sample_steps)
    print(quality, flush=True)
    return quality
