"""How good a trained network is: the short report at the end of training, and the whole protocol of `fm-fast evaluate`."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fm_fast import _checks, sampling
from fm_fast.train.condition import NULL_CLASS, condition_of, reduced, reduced_if_wanted
from fm_fast.train.config import Recipe, TrainConfig
from fm_fast.train.data import UNDIVIDED, Dataset
from fm_fast.train.evaluation.classifier import Classifier, agreement, features, train_classifier
from fm_fast.train.evaluation.likelihood import DatasetBits, dataset_bits, require_fitting
from fm_fast.train.evaluation.quality import feature_distance, inception, median_distance, nearest_neighbour_accuracy
from fm_fast.train.evaluation.restoration import Restoration, bicubic, restoration, signal_to_noise
from fm_fast.train.evaluation.sample import as_data, sample, starting_noise, to_integers

PER_CLASS = 20
# Noise of the report at the end of training and of the evaluation: index 0 is training's own, 1 that of the run's pictures.
REPORT_NOISE, EVALUATION_NOISE = 2, 3

# The report at the end of training


@dataclass(frozen=True)
class Quality:
    """Shares in [0, 1] and a ratio of distances.

    accuracy: of the classifier on held-out real images. guided, unguided: samples that the classifier assigns to the class asked for.
    novelty: median distance from an unguided sample to its nearest training image, divided by the same for held-out real images;
    about 1 for new images, near 0 for copies.
    """

    accuracy: float
    guided: float
    unguided: float
    novelty: float

    def __str__(self) -> str:
        return (
            f"samples of the class asked for: {self.unguided:.1%} without guidance, {self.guided:.1%} with guidance"
            f" (by a classifier that is right on {self.accuracy:.1%} of held-out real images)\n"
            f"distance to the nearest training image, relative to that of held-out real images: {self.novelty:.2f}"
        )


def evaluate(model: nn.Module, recipe: Recipe, train: Dataset, held_out: Dataset, seed: int, guidance: float, steps: int) -> Quality:
    """Judge PER_CLASS samples of each class, drawn with and without guidance."""
    classifier = train_classifier(train)
    labels = torch.arange(train.classes, device=train.images.device).repeat_interleave(PER_CLASS)
    x0 = starting_noise((len(labels), *train.images.shape[1:]), recipe, seed, REPORT_NOISE, device=train.images.device)
    unguided = as_data(sample(model, x0, labels, recipe, steps), train.levels)
    guided = as_data(sample(model, x0, labels, recipe, steps, guidance=guidance), train.levels)
    return Quality(
        accuracy=agreement(classifier, held_out.images, held_out.labels),
        guided=agreement(classifier, guided, labels),
        unguided=agreement(classifier, unguided, labels),
        novelty=median_distance(unguided, train.images) / median_distance(held_out.images, train.images),
    )


@dataclass(frozen=True)
class Enlargement:
    """Mean peak signal-to-noise ratios in dB, of unguided samples and of bicubic interpolation, against the originals.

    held_out: whether these are no training images.

    Not what a flow is good at: the mean of all images that fit, which is blurred, has the best ratio (Table 2 of the paper).
    """

    samples: float
    bicubic: float
    held_out: bool = True

    def __str__(self) -> str:
        images = "held-out" if self.held_out else "training"
        return f"enlarged {images} images: {self.samples:.1f} dB from the originals; by bicubic interpolation: {self.bicubic:.1f} dB"


def evaluate_enlargement(model: nn.Module, config: TrainConfig, originals: Dataset, seed: int, steps: int) -> Enlargement:
    """One sample of every image."""
    x0 = starting_noise(tuple(originals.images.shape), config.recipe, seed, REPORT_NOISE, device=originals.images.device)
    levels = originals.grey_levels
    low = reduced(originals.images, levels, config.super_resolution)
    drawn = sample(model, x0, originals.labels if config.model.classes else None, config.recipe, steps, low_resolution=low)
    enlarged = (to_integers(images, levels) for images in (drawn, bicubic(low, originals.images.shape[2:])))
    found = (float(signal_to_noise(images, originals.images, levels).mean()) for images in enlarged)
    return Enlargement(*found, held_out=originals.division != UNDIVIDED)


# The protocol of `fm-fast evaluate`


@dataclass(frozen=True)
class Samples:
    """Unguided samples, one for each held-out image and of its class.

    images: [N, C, H, W], as the data; labels: int64 [N], those that the network was told. nfe_of_batches: calls of the network for each
    batch of `batch_size` samples (the last may be smaller); the solver's error norm is over a batch, so the count belongs to its size.
    nfe_of_each: int64 [N], calls until a sample was at its end, where each had steps of its own, else None.
    """

    images: Tensor
    labels: Tensor
    nfe_of_batches: tuple[int, ...]
    batch_size: int
    nfe_of_each: Tensor | None = None

    @property
    def nfe(self) -> float:
        """Mean over the samples of the calls that they, or their batch, took."""
        if self.nfe_of_each is not None:
            return float(self.nfe_of_each.double().mean())
        sizes = [min(self.batch_size, len(self.images) - first) for first in range(0, len(self.images), self.batch_size)]
        return sum(count * size for count, size in zip(self.nfe_of_batches, sizes, strict=True)) / len(self.images)


@dataclass(frozen=True)
class SampleQuality:
    """Samples against held-out images; each `real_` value is the same number for training images in place of samples.

    agreement: share of samples that a small classifier, trained on the training images, assigns to the class asked for; None without
    classes. frechet: Fréchet distance of that classifier's features. It is not FID, and comparable only for one data set and
    number of images. nearest_neighbour: accuracy of the 1-nearest-neighbour two-sample test, 0.5 where they cannot be told apart.
    novelty: median distance to the nearest training image, relative to that of held-out images; near 0 for copies; None if the held-out
    images are training images. fid: Inception distance to the held-out images, inception_score: of the samples; None if not asked for.
    """

    agreement: float | None
    real_agreement: float
    frechet: float
    real_frechet: float
    nearest_neighbour: float
    real_nearest_neighbour: float
    novelty: float | None
    fid: float | None
    inception_score: float | None


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What one row of the paper's Table 1 holds, for one network, and of Table 2 in `restoration`, of a super-resolution network alone.

    bits: None where they were not asked for.
    """

    bits: DatasetBits | None
    samples: Samples
    quality: SampleQuality
    restoration: Restoration | None
    seconds: float


def evaluate_network(
    model: nn.Module,
    config: TrainConfig,
    train: Dataset,
    held_out: Dataset,
    *,
    seed: int = 0,
    batch_size: int = 256,
    tolerance: float = 1e-5,
    unconditional: bool = False,
    with_fid: bool = False,
    with_bits: bool = True,
    solver: Mapping[str, Any] | None = None,
    ends: tuple[float, float] = (0.0, 1.0),
    **likelihood: Any,
) -> Evaluation:
    """Bits/dim of the held-out images, NFE of dopri5 and the quality of as many samples (sections 6.1 and E.2 of the paper).

    tolerance: of dopri5, absolute and relative, for samples and likelihoods. ends: t0 of both solves, and t1 of the likelihoods; samples
    always end at 1, since what is drawn for an earlier time has noise in it. solver: arguments of
    :func:`fm_fast.sample` that take dopri5's place for the samples (Figure 7). likelihood: other arguments of
    :func:`fm_fast.bits_per_dim`, such as ``draws`` and ``probes``; a ``method`` with its ``steps`` or tolerances takes dopri5's place
    there. Raises ValueError for data that the network was not made for, fewer than two images, or no positive tolerance.
    """
    _checks.positive_number("tolerance", tolerance)
    if min(len(train), len(held_out)) < 2:
        raise ValueError(f"data, limit: expected at least 2 training and 2 held-out images, got {len(train)} and {len(held_out)}")
    require_fitting(config, held_out)
    started, (t0, t1) = time.perf_counter(), ends
    dopri5 = {"method": "dopri5", "rtol": tolerance, "atol": tolerance}
    chosen = {"t0": t0, "t1": t1, **({} if "method" in likelihood else dopri5), **likelihood}
    bits = dataset_bits(model, config, held_out, batch_size, seed, unconditional, **chosen) if with_bits else None
    by = {"t0": t0, **(dopri5 if solver is None else solver)}
    samples = draw_samples(model, config, held_out, seed, batch_size, unconditional, **by)
    quality = sample_quality(samples, train_classifier(train), train, held_out, with_fid)
    factor = config.super_resolution
    restored = restoration(samples.images, held_out.images, held_out.grey_levels, factor) if factor > 1 else None
    return Evaluation(bits, samples, quality, restored, time.perf_counter() - started)


def draw_samples(
    model: nn.Module, config: TrainConfig, like: Dataset, seed: int, batch_size: int, unconditional: bool = False, **solver: Any
) -> Samples:
    """As many samples as `like` has images, with its labels (or the null class) and reduced images, without guidance.

    solver: arguments of :func:`fm_fast.sample`.
    """
    knows_classes = config.model.classes > 0
    labels = torch.full_like(like.labels, NULL_CLASS) if unconditional or not knows_classes else like.labels
    parts, counts, each = [], [], []
    for first, rows in _batches(labels, batch_size):
        x0 = starting_noise((len(rows), *like.images.shape[1:]), config.recipe, seed, EVALUATION_NOISE, rows.device, first)
        low = reduced_if_wanted(config, like.images[first : first + len(rows)].to(rows.device), like.levels)
        solved = sampling.sample(
            model, x0, cond=condition_of(config, rows, low, unconditional), path=config.recipe.path, objective=config.recipe.objective,
            **solver,
        )  # fmt: skip
        parts.append(as_data(solved.x, like.levels))
        counts.append(solved.nfe)
        each += [] if solved.nfe_of_each is None else [solved.nfe_of_each]
    return Samples(torch.cat(parts), labels, tuple(counts), batch_size, torch.cat(each) if each else None)


def _batches(labels: Tensor, batch_size: int) -> Iterator[tuple[int, Tensor]]:
    for first in range(0, len(labels), batch_size):
        yield first, labels[first : first + batch_size]


def sample_quality(samples: Samples, classifier: Classifier, train: Dataset, held_out: Dataset, with_fid: bool = False) -> SampleQuality:
    """Judge samples, one for each held-out image; the first training images, at most as many, stand for perfect samples."""
    count = min(len(held_out), len(train))
    originals = held_out.images.to(held_out.device)
    real, references = train.images[:count].to(held_out.device), originals[:count]
    usual = median_distance(originals, train.images)
    known = bool((samples.labels != NULL_CLASS).all())
    fid, inception_score = inception(samples.images, originals, train.grey_levels) if with_fid else (None, None)
    return SampleQuality(
        agreement=agreement(classifier, samples.images, samples.labels) if known else None,
        real_agreement=agreement(classifier, originals, held_out.labels),
        frechet=_feature_distance(classifier, samples.images[:count], references),
        real_frechet=_feature_distance(classifier, real, references),
        nearest_neighbour=nearest_neighbour_accuracy(samples.images[:count], references),
        real_nearest_neighbour=nearest_neighbour_accuracy(real, references),
        novelty=median_distance(samples.images, train.images) / usual if usual > 0.0 else None,
        fid=fid,
        inception_score=inception_score,
    )


def _feature_distance(classifier: Classifier, images: Tensor, references: Tensor) -> float:
    return feature_distance(features(classifier, images), features(classifier, references))
