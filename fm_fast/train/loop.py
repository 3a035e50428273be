"""A whole run: data, steps, log, pictures, checkpoints, report."""

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from fm_fast.train.checkpoint import resume, save_checkpoint
from fm_fast.train.config import TrainConfig, fit_to_data
from fm_fast.train.data import DataOrder, Dataset, load_dataset
from fm_fast.train.evaluate import Quality, evaluate
from fm_fast.train.interrupt import deferred_interrupt
from fm_fast.train.log import Logger
from fm_fast.train.picture import write_images
from fm_fast.train.sample import sample, starting_noise, to_integers
from fm_fast.train.schedule import learning_rate
from fm_fast.train.step import TrainState, network_of, new_state, training_step

PICTURE_CLASSES = 10


@dataclass(frozen=True)
class Result:
    """What a run leaves: its final state, the training time in seconds, and the quality report (shipped digits only)."""

    state: TrainState
    config: TrainConfig
    seconds: float
    quality: Quality | None


def train(config: TrainConfig, resuming: bool = False) -> Result:
    """Train as configured; writes checkpoint.pt, samples.png and log.jsonl into `config.out`.

    resuming: continue from `config.out`/checkpoint.pt, bit by bit as if the run had not been interrupted (same machine, same
    number of threads). Ctrl-C lets the step finish and writes a checkpoint.
    Raises FileNotFoundError or ValueError for missing or damaged data and checkpoints, FloatingPointError if the loss is not finite.
    """
    device = pick_device(config.device)
    dataset = load_dataset(config.data).to(device)
    config = fit_to_data(config, dataset.images.shape[1:], dataset.classes)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    state = new_state(config, device)
    if resuming:
        resume(out / "checkpoint.pt", state, config)
    print(_headline(config, dataset, state, device), flush=True)
    seconds = _run(state, config, dataset, out)
    quality = _report(state, config, dataset, seconds, out)
    return Result(state, config, seconds, quality)


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


def _run(state: TrainState, config: TrainConfig, dataset: Dataset, out: Path) -> float:
    """All remaining steps; returns the seconds they took, without pictures and checkpoints."""
    logger, started = Logger(out / "log.jsonl", config, state.step), time.perf_counter()
    try:
        return _steps(state, config, dataset, out, logger) - started
    finally:
        logger.close()


def _steps(state: TrainState, config: TrainConfig, dataset: Dataset, out: Path, logger: Logger) -> float:
    order, network, paused = DataOrder(len(dataset), config.seed), network_of(state, config), 0.0
    with deferred_interrupt() as interrupted:
        while state.step < config.steps:
            rate = learning_rate(config, state.step)
            loss = training_step(state, config, dataset, order, network=network)
            logger.step(state.step, loss.mean, rate, loss.by_quartile)
            paused += logger.without_timing(lambda: _interval_files(state, config, dataset, out))
            if interrupted() and state.step < config.steps:
                save_checkpoint(out / "checkpoint.pt", state, config)
                logger.say(f"interrupted after step {state.step}; continue with --resume")
                raise KeyboardInterrupt
    return time.perf_counter() - paused


def _interval_files(state: TrainState, config: TrainConfig, dataset: Dataset, out: Path) -> None:
    last = state.step == config.steps
    if last or _due(state.step, config.checkpoint_every):
        save_checkpoint(out / "checkpoint.pt", state, config)
    if last or _due(state.step, config.sample_every):
        _write_picture(state, config, dataset, out / "samples.png")


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _write_picture(state: TrainState, config: TrainConfig, dataset: Dataset, path: Path) -> None:
    """One row a class (the first ten classes), always from the same noise, so that two pictures show the training between them."""
    columns, device = config.samples_per_class, dataset.images.device
    labels = torch.arange(min(dataset.classes, PICTURE_CLASSES), device=device).repeat_interleave(columns)
    x0 = starting_noise((len(labels), *dataset.images.shape[1:]), config.recipe, config.seed, index=1, device=device)
    x = sample(state.average, x0, labels, config.recipe, config.sample_steps, config.sample_method, config.guidance)
    write_images(path, to_integers(x, dataset.levels), dataset.levels, columns)


def _headline(config: TrainConfig, dataset: Dataset, state: TrainState, device: torch.device) -> str:
    channels, height, width = dataset.images.shape[1:]
    parameters = sum(parameter.numel() for parameter in state.model.parameters())
    return (
        f"{dataset.name}: {len(dataset)} images {channels}x{height}x{width}, {dataset.classes} classes;"
        f" {config.objective}; U-Net of {parameters / 1e6:.2f} M parameters on {device}; steps {state.step}..{config.steps}"
    )


def _report(state: TrainState, config: TrainConfig, dataset: Dataset, seconds: float, out: Path) -> Quality | None:
    print(f"trained in {seconds:.1f} s; wrote {out / 'samples.png'}, {out / 'checkpoint.pt'} and {out / 'log.jsonl'}", flush=True)
    if config.data != "digits" or not config.evaluate:
        return None
    held_out = load_dataset("digits", "test").to(dataset.images.device)
    quality = evaluate(state.average, config.recipe, dataset, held_out, config.seed, config.guidance, config.sample_steps)
    print(quality, flush=True)
    return quality
