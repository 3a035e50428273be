"""Tables 1 and 4 on small images: five objectives, one network, one number of steps; bits/dim, NFE and sample quality.

The paper's data, networks and FID need many GPUs; here the digits or Fashion-MNIST at half its size stand in. Numbers are comparable with
each other, not with the paper's.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fm_fast.bits import bits_per_dim
from fm_fast.reproduce.checkerboard import NAMES
from fm_fast.reproduce.results import Parts, summary, write_json
from fm_fast.reproduce.threads import one_thread
from fm_fast.train.config import TrainConfig
from fm_fast.train.data import Dataset, load_dataset
from fm_fast.train.evaluation.classifier import train_classifier
from fm_fast.train.evaluation.evaluate import draw_samples, sample_quality
from fm_fast.train.evaluation.likelihood import dataset_bits
from fm_fast.train.loop import train
from fm_fast.train.presets import PRESETS
from fm_fast.train.storage.run_folder import RunFolder
from fm_fast.train.storage.weights import load_model

# Held-out images for sample quality (as many samples), for bits/dim, and for bits/dim against the number of draws.
SAMPLES, BITS_IMAGES, DRAW_IMAGES = 200, 48, 8
BATCH = 64
DRAWS = (1, 5, 10)
# Of dopri5; the looser one where only the difference between numbers of draws matters.
TOLERANCE, DRAWS_TOLERANCE = 1e-5, 1e-3
DOPRI5: dict[str, Any] = {"method": "dopri5", "rtol": TOLERANCE, "atol": TOLERANCE}


@dataclass(frozen=True)
class Row:
    """One objective. The fields of sample quality are those of :class:`fm_fast.train.evaluation.evaluate.SampleQuality`.

    bits_per_dim, std_err: of the first BITS_IMAGES held-out images, one dequantisation draw. nfe: of dopri5 at atol = rtol = 1e-5, one
    batch of SAMPLES. draws, bits_by_draws: bits/dim of the first DRAW_IMAGES against the number of dequantisation draws.
    """

    objective: str
    bits_per_dim: float
    std_err: float
    nfe: float
    agreement: float
    real_agreement: float
    frechet: float
    real_frechet: float
    nearest_neighbour: float
    real_nearest_neighbour: float
    novelty: float
    draws: tuple[int, ...]
    bits_by_draws: tuple[float, ...]


def bits_for_draws(logp: Tensor, counts: Sequence[int], dimensions: int, levels: int) -> tuple[float, ...]:
    """Mean bits/dim against the number K of dequantisation draws (equation 47), from log-densities [draws, B], draws a multiple of each K.

    Each K uses all draws, in groups of K: the same expectation as the first K alone, with less noise.
    """
    values = []
    for count in counts:
        groups = logp.reshape(-1, count, logp.shape[1])
        bound = torch.logsumexp(groups, dim=1) - math.log(count)
        values.append(math.log2(levels / 2.0) - float(bound.mean()) / (dimensions * math.log(2.0)))
    return tuple(values)


def settings(data: str, source: Path | None = None, alike: bool = False) -> TrainConfig:
    """The run for "digits" or "fashion": Fashion-MNIST in `source`, or where Debian's package puts it, averaged to 14 x 14 pixels.

    alike: nothing but the path and the loss depends on the objective, as in the paper; else each has what suits it (train/config.py).
    Raises ValueError for a source of the digits, which are shipped.
    """
    if data == "digits" and source is not None:
        raise ValueError(f"source: expected none for the digits, which are part of fm_fast, got {source}")
    digits = replace(PRESETS["digits"], batch_size=BATCH, dequantise=True, evaluate=False)
    if alike:
        digits = replace(digits, preconditioned="off", t_sampler="uniform")
    if data == "digits":
        return digits
    return replace(digits, data=str(source or "fashion"), pool=2, model=replace(digits.model, attention_sizes=(7,)))


def row(objective: str, config: TrainConfig) -> Row:
    """Train, or continue to train, and measure. The run is a folder of its own, which `fm-fast evaluate` and `sample` read too."""
    with one_thread():
        return _row(objective, config)


def _row(objective: str, config: TrainConfig) -> Row:
    train(config, resuming=bool(RunFolder(Path(config.out)).checkpoints()))
    model, config = load_model(config.out)
    seed, training = config.seed, load_dataset(config.data, "train", config.preparation)
    held_out = first(load_dataset(config.data, "test", config.preparation), SAMPLES)
    samples = draw_samples(model, config, held_out, seed, SAMPLES, **DOPRI5)
    quality = sample_quality(samples, train_classifier(training), training, held_out)
    bits = dataset_bits(model, config, first(held_out, BITS_IMAGES), BITS_IMAGES, seed, **DOPRI5)
    assert quality.agreement is not None and quality.novelty is not None
    return Row(
        objective=objective, bits_per_dim=bits.mean, std_err=bits.mean_std_err, nfe=samples.nfe,
        draws=DRAWS, bits_by_draws=_bits_by_draws(model, config, first(held_out, DRAW_IMAGES), seed),
        **{name: value for name, value in asdict(quality).items() if name not in ("fid", "inception_score")},
    )  # fmt: skip


def first(data: Dataset, count: int) -> Dataset:
    """The data set's first images."""
    return replace(data, images=data.images[:count], labels=data.labels[:count])


def _bits_by_draws(model: torch.nn.Module, config: TrainConfig, data: Dataset, seed: int) -> tuple[float, ...]:
    recipe, levels = config.recipe, data.grey_levels
    result = bits_per_dim(
        model, data.images, levels=levels, draws=max(DRAWS), cond={"y": data.labels}, path=recipe.path, objective=recipe.objective,
        method="dopri5", rtol=DRAWS_TOLERANCE, atol=DRAWS_TOLERANCE, seed=seed,
    )  # fmt: skip
    return bits_for_draws(result.logp, DRAWS, math.prod(data.images.shape[1:]), levels)


def table_name(data: str, alike: bool) -> str:
    """Of the table's files."""
    return f"table1-{_variant(data, alike)}"


def _variant(data: str, alike: bool) -> str:
    return f"{data}-alike" if alike else data


def reproduce_table1(
    out: Path, data: str, seed: int, steps: int, source: Path | None = None, jobs: int = 1, alike: bool = False
) -> list[Row]:
    """All five objectives, `jobs` at a time; writes a run and a part for each, <table_name>.json and <table_name>.md into `out`."""
    name = table_name(data, alike)
    config = replace(settings(data, source, alike), seed=seed, steps=steps)
    parts = Parts(out / "parts", {"data": config.data, "seed": seed, "steps": steps})
    # The name of a run's folder tells its settings: a run is continued only where they are the same.
    folders = {objective: out / f"{_variant(data, alike)}-{objective}-{steps}-steps-seed-{seed}" for objective in NAMES}
    runs = {objective: replace(config, objective=objective, out=str(folder)) for objective, folder in folders.items()}
    arguments = {f"{name}-{objective}": (objective, run) for objective, run in runs.items()}
    rows = parts.get_all(Row, row, arguments, jobs)
    command = f"fm-fast reproduce table1 --data {data} --seed {seed} --steps {steps}{' --alike' if alike else ''}"
    sizes = {"samples": SAMPLES, "images_for_bits": BITS_IMAGES, "images_for_draws": DRAW_IMAGES}
    tolerances = {"tolerance": TOLERANCE, "draws_tolerance": DRAWS_TOLERANCE}
    content = summary(command, parts.seconds(arguments), **sizes, **tolerances, results=[asdict(entry) for entry in rows])
    write_json(out / f"{name}.json", content)
    (out / f"{name}.md").write_text(as_text(rows) + "\n", encoding="utf-8")
    return rows


def as_text(rows: Sequence[Row]) -> str:
    """Tables 1 and 4 in Markdown."""
    real = rows[0]
    draws = " / ".join(map(str, real.draws))
    lines = [
        f"| objective | bits/dim | NFE | class agreement | feature Fréchet (not FID) | 1-NN accuracy | bits/dim, K = {draws} draws |",
        "|---|---|---|---|---|---|---|",
    ]
    for entry in rows:
        by_draws = " / ".join(f"{value:.3f}" for value in entry.bits_by_draws)
        lines.append(
            f"| {NAMES[entry.objective]} | {entry.bits_per_dim:.3f} ± {entry.std_err:.3f} | {entry.nfe:.0f} | {entry.agreement:.1%}"
            f" | {entry.frechet:.3f} | {entry.nearest_neighbour:.3f} | {by_draws} |"
        )
    lines.append(f"| real images | | | {real.real_agreement:.1%} | {real.real_frechet:.3f} | {real.real_nearest_neighbour:.3f} | |")
    return "\n".join(lines)
