"""A whole run: data, steps, log, pictures, checkpoints, report."""

import contextlib
import os
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from fm_fast.train.config import TrainConfig, fit_to_data, from_dict
from fm_fast.train.data import DataOrder, Dataset, OrderAhead, load_dataset
from fm_fast.train.data.identity import identity_of
from fm_fast.train.evaluation.evaluate import Enlargement, Quality, evaluate, evaluate_enlargement
from fm_fast.train.evaluation.judge import Judge, judge_of
from fm_fast.train.evaluation.likelihood import require_fitting
from fm_fast.train.evaluation.sample import as_data, enlargements, sample, sample_enlarged, starting_noise
from fm_fast.train.execution.allocator import keep_freed_memory
from fm_fast.train.execution.devices import autotuning, flops_per_image
from fm_fast.train.execution.distributed import StopVote, Team, joined, state_of, team_network
from fm_fast.train.execution.graph import GraphedStep, is_wanted
from fm_fast.train.execution.interrupt import deferred_interrupt, stop
from fm_fast.train.files import as_folder, is_full
from fm_fast.train.remarks import refuse_without_effect, remarks
from fm_fast.train.reporting.curve import can_draw, draw_curves, draw_quality
from fm_fast.train.reporting.log import Logger, require_sinks, tell
from fm_fast.train.reporting.picture import write_images
from fm_fast.train.step import Model, StepLoss, TrainState, training_step
from fm_fast.train.storage.checkpoint import read_checkpoint, restore
from fm_fast.train.storage.initial import initial_weights
from fm_fast.train.storage.run_folder import RunFolder
from fm_fast.train.storage.weights import can_write_weights, save_weights

PICTURE_CLASSES = 10
SHOWN = 100  # images that a super-resolution run is judged by; the first ten are in its pictures


@dataclass(frozen=True)
class Result:
    """What a run leaves: its final state, the training time in seconds, and the quality report (shipped digits and super-resolution)."""

    state: TrainState
    config: TrainConfig
    seconds: float
    quality: Quality | Enlargement | None


@dataclass(frozen=True)
class Run:
    """What the functions of this file share."""

    state: TrainState
    config: TrainConfig
    dataset: Dataset
    data: dict[str, Any]  # the identity of the dataset
    folder: RunFolder
    team: Team
    shown: Dataset | None = None  # held-out images that the pictures of a super-resolution run enlarge
    judge: Judge | None = None  # of the samples' quality in the course of the run


def train(config: TrainConfig, resuming: bool = False, overwriting: bool = False, asked: Collection[str] = ()) -> Result:
    """Train as configured.

    Writes checkpoints, weights.safetensors, samples.png, loss.png and log.jsonl into `config.out`, and where `config.quality_every` asks
    for them quality.jsonl and quality.png. Under torchrun every process calls this, and the first writes.

    Args:
        resuming: continue from the newest valid checkpoint in `config.out`, bit by bit as if the run had not been interrupted on the same
            machine with the same number of threads and processes; else up to the order of summation, as also on a GPU, whose
            convolutions may add in another order at every run.
        overwriting: delete another run's files there after the first step, so that a run that fails before deletes nothing.
        asked: names of settings that are refused, not only remarked on, where they have no effect (train/remarks.py).

    Raises:
        FileNotFoundError, ValueError: missing or damaged data and checkpoints, or both of resuming and overwriting.
        FileExistsError: a new run would overwrite another's.
        FloatingPointError: the loss is not finite.
        KeyboardInterrupt, SystemExit: Ctrl-C; SIGTERM (143) and SIGHUP (129). The step finishes and a checkpoint is written before.
    """
    if resuming and overwriting:
        raise ValueError("resume, overwrite: expected one of them, got both")
    out = as_folder("out", config.out)
    as_folder("cache", os.path.expanduser(config.cache))
    require_sinks(config)
    with joined(config.device) as team, autotuning(config.autotune):
        is_wanted(config, team.device, team.share.world)  # raises before the work where it cannot be
        config, dataset = _loaded(config, team)
        share = len(team.share.samples(config.batch_size))
        refuse_without_effect(config, asked, share)
        folder = RunFolder(out)
        with folder.held(resuming, overwriting) if team.first else contextlib.nullcontext():
            run = _prepared(config, dataset, folder, team, begun=resuming)
            if resuming:
                _resume(run)
            if team.first:
                folder.tidy()
            _say(run, "\n".join([_headline(run), *remarks(config, dataset, share)]))
            begun = run.state.step
            return _report(run, _run(run), begun)


def _loaded(config: TrainConfig, team: Team) -> tuple[TrainConfig, Dataset]:
    """The training data, and the configuration with what they decide."""
    with team.first_alone():
        dataset = load_dataset(config.data, "train", config.preparation).to(team.device)
    return fit_to_data(config, dataset.images.shape[1:], dataset.classes, dataset.standardisation), dataset


def _prepared(config: TrainConfig, dataset: Dataset, folder: RunFolder, team: Team, begun: bool) -> Run:
    """Before the first step, or before a checkpoint is loaded if the run has begun."""
    weights, source = initial_weights(config) if config.init_from and not begun else (None, "")
    state = state_of(config, team, weights)  # with the other processes, before the first does what it does alone
    shown, judge = _shown(config, team), _judge(config, dataset, team)
    if source and team.first:
        tell(source)
    return Run(state, config, dataset, identity_of(dataset), folder, team, shown, judge)


def _shown(config: TrainConfig, team: Team) -> Dataset | None:
    if config.super_resolution == 1 or not team.first:
        return None
    held_out = load_dataset(config.data, "test", config.preparation)
    require_fitting(config, held_out)
    return replace(held_out, images=held_out.images[:SHOWN], labels=held_out.labels[:SHOWN], mapped=False).to(team.device)


def _judge(config: TrainConfig, dataset: Dataset, team: Team) -> Judge | None:
    return judge_of(config, dataset) if config.quality_every > 0 and team.first else None


def _say(run: Run, text: str) -> None:
    if run.team.first:
        tell(text)


def _resume(run: Run) -> None:
    found = run.folder.newest_valid() if run.team.first else None
    file = run.team.agreed(found and found.file)
    assert file is not None
    content = found.content if found else read_checkpoint(file)
    restore(file, content, run.state, run.config, run.data)
    planned = content["config"]["steps"]
    if planned != run.config.steps:
        _say(run, f"warning: the run was to take {planned} steps and now takes {run.config.steps}, which also changes its learning rates")
    if found:
        for text in found.warnings:
            tell(f"warning: {text}")
        found.set_damaged_aside()
    if run.state.step == run.config.steps and from_dict(content["config"]) != run.config:
        _save(run, tell)  # no later step will bring the new settings, such as the place of the data, into a checkpoint


def _run(run: Run) -> float:
    """All remaining steps; returns the seconds they took, without pictures and checkpoints."""
    if run.team.device.type == "cpu":
        keep_freed_memory()
    skipped = run.state.optimiser.skipped
    logger = Logger(run.folder, run.config, run.state.step, run.team, flops_per_image(run.config.model), skipped)
    started = time.perf_counter()
    try:
        return _steps(run, logger) - started
    finally:
        logger.close()


def _steps(run: Run, logger: Logger) -> float:
    state, config, team, paused = run.state, run.config, run.team, 0.0
    vote = StopVote(team)
    with deferred_interrupt() as asked, team_network(state, config, team) as network:
        take_step = _stepper(run, network, logger)
        while state.step < config.steps:
            rate = config.rate.after(state.step)
            loss = take_step()
            if state.step == 1 and team.first:
                run.folder.clear()
            logger.step(state.step, loss.mean, rate, loss.by_quartile, loss.gradient_norm)
            paused += logger.without_timing(lambda: _interval_files(run, logger))
            signal = vote(asked())
            if signal and state.step < config.steps:
                vote.close()
                _save(run, logger.say)
                logger.say(f"interrupted after step {state.step}; continue with --resume")
                stop(signal)
        vote.close()
    return time.perf_counter() - paused


def _stepper(run: Run, network: Model, logger: Logger) -> Callable[[], StepLoss]:
    """What takes the next step: by replay of a graph where that is wanted and possible."""
    state, config, dataset, team = run.state, run.config, run.dataset, run.team
    order = OrderAhead(len(dataset), config.seed, config.batch_size) if dataset.mapped else DataOrder(len(dataset), config.seed)
    if is_wanted(config, team.device, team.share.world):
        return GraphedStep(state, config, dataset, order, network, say=logger.say)
    return lambda: training_step(state, config, dataset, order, team.share, network)


def _interval_files(run: Run, logger: Logger) -> None:
    last = run.state.step == run.config.steps
    if last:
        _save(run, logger.say)
    elif _due(run.state.step, run.config.checkpoint_every):
        with _dispensable("checkpoint", logger.say, is_full):
            _save(run, logger.say)
    if last or _due(run.state.step, run.config.sample_every):
        with _dispensable("pictures", logger.say):
            _write_pictures(run)
    if run.config.quality_every > 0 and (last or _due(run.state.step, run.config.quality_every)):
        with _dispensable("quality", logger.say):
            _measure_quality(run, logger)


@contextlib.contextmanager
def _dispensable(what: str, say: Callable[[str], None], also: Callable[[OSError], bool] = lambda error: True) -> Iterator[None]:
    """What a run goes on without: files that cannot be written, and samples that are not finite, are told. also: which errors of files."""
    try:
        yield
    except (OSError, FloatingPointError) as error:
        if isinstance(error, OSError) and not also(error):
            raise
        say(f"warning: no {what} of this step: {error}; the run goes on")


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _save(run: Run, say: Callable[[str], None]) -> None:
    """Every process helps to gather what is in shards; the first writes. The weights alone are in the checkpoint, too."""
    stored = run.state.state_dict()
    if run.team.first:
        run.folder.save(stored, run.config, run.data)
        if can_write_weights():
            with _dispensable(run.folder.weights.name, say):
                save_weights(run.folder.weights, stored["average"], run.config, run.state.step)


def _write_pictures(run: Run) -> None:
    average = run.state.averaged()
    if run.team.first:
        _write_samples(run, average)
        if can_draw():
            draw_curves(run.folder.log, run.folder.curve)


def _measure_quality(run: Run, logger: Logger) -> None:
    average = run.state.averaged()
    if run.judge is not None:
        logger.quality(run.state.step, run.judge.measure(average, run.config))
        if can_draw():
            draw_quality(run.folder.quality, run.folder.quality_curve)


def _write_samples(run: Run, average: nn.Module) -> None:
    """One row a class (the first ten classes), always from the same noise, so that two pictures show the training between them."""
    if run.shown is not None:
        return _write_enlargements(run, average, run.shown)
    config, dataset, columns = run.config, run.dataset, run.config.samples_per_class
    rows = min(dataset.classes, PICTURE_CLASSES)
    labels = torch.arange(rows, device=dataset.device).repeat_interleave(columns) if config.conditional else None
    shape = (rows * columns, *dataset.images.shape[1:])
    x0 = starting_noise(shape, config.recipe, config.seed, index=1, device=dataset.device)
    x = sample(average, x0, labels, config.recipe, config.sample_steps, config.sample_method, config.picture_guidance)
    write_images(run.folder.samples, as_data(x, dataset.levels), dataset.levels, columns)


def _write_enlargements(run: Run, average: nn.Module, shown: Dataset) -> None:
    """A row an image: as the network sees it, samples, and the original."""
    config, each = run.config, run.config.samples_per_class
    first = replace(shown, images=shown.images[:PICTURE_CLASSES], labels=shown.labels[:PICTURE_CLASSES])
    several = replace(first, images=first.images.repeat_interleave(each, 0), labels=first.labels.repeat_interleave(each))
    solver = {"steps": config.sample_steps, "method": config.sample_method, "guidance": config.picture_guidance}
    drawn = sample_enlarged(average, config, several, config.seed, SHOWN, **solver)
    write_images(run.folder.samples, enlargements(config, first, drawn, each), shown.levels, each + 2)


def _headline(run: Run) -> str:
    dataset, config, team = run.dataset, run.config, run.team
    channels, height, width = dataset.images.shape[1:]
    parameters = sum(parameter.numel() for parameter in run.state.model.parameters())
    real = "" if dataset.standardisation is None else f" of real numbers, seen as {dataset.standardisation}"
    processes = f" in each of {team.share.world} processes ({config.parallel})" if team.share.world > 1 else ""
    return (
        f"{dataset.name}: {len(dataset)} images {channels}x{height}x{width}{real}, {dataset.classes} classes;"
        f" {config.objective}; U-Net of {parameters / 1e6:.2f} M parameters on {team.device.type}{processes};"
        f" steps {run.state.step}..{config.steps}"
    )


def _report(run: Run, seconds: float, begun: int) -> Result:
    folder, taken = run.folder, run.config.steps - begun
    pictures = (folder.samples, folder.curve, folder.quality_curve)
    files = [file for file in (*pictures, folder.checkpoint(run.config.steps), folder.weights) if file.exists()]
    done = f"trained in {seconds:.1f} s; wrote" if taken else "no step was left to take; there are"
    _say(run, f"{done} {', '.join(map(str, files))} and {folder.log}")
    return Result(run.state, run.config, seconds, _quality(run, run.state.averaged()))


def _quality(run: Run, average: nn.Module) -> Quality | Enlargement | None:
    config, dataset = run.config, run.dataset
    if run.shown is not None and config.evaluate:
        enlargement = evaluate_enlargement(average, config, run.shown, config.seed, config.sample_steps)
        tell(str(enlargement))
        return enlargement
    if run.shown is not None or config.data != "digits" or not (config.evaluate and config.conditional and run.team.first):
        return None
    held_out = load_dataset("digits", "test", config.preparation).to(dataset.device)
    quality = evaluate(average, config.recipe, dataset, held_out, config.seed, config.picture_guidance, config.sample_steps)
    tell(str(quality))
    return quality
