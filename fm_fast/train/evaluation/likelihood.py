"""Bits per dimension of a data set under a trained network, in batches."""

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fm_fast.bits import BitsPerDim, bits_per_dim, standard_error
from fm_fast.likelihood import log_likelihood
from fm_fast.train.condition import condition_of, reduced_if_wanted
from fm_fast.train.config import TrainConfig
from fm_fast.train.data import Dataset


@dataclass(frozen=True, eq=False)
class DatasetBits:
    """bpd: float64 [N], on the CPU; std_err: [N], what the probes leave uncertain, or None. nfe and nvjp are those of one image."""

    bpd: Tensor
    std_err: Tensor | None
    nfe: float
    nvjp: float
    seconds: float

    @property
    def mean(self) -> float:
        return float(self.bpd.mean())

    @property
    def mean_std_err(self) -> float:
        """Standard error of the mean, from the spread over the images: data, dequantisation and probes together; nan for one image."""
        return standard_error(self.bpd)

    @property
    def probe_std_err(self) -> float | None:
        """The probes' share of it, where they can tell."""
        return None if self.std_err is None else float(self.std_err.square().sum().sqrt() / len(self.std_err))


def dataset_bits(
    model: nn.Module, config: TrainConfig, dataset: Dataset, batch_size: int, seed: int, unconditional: bool = False, **arguments: Any
) -> DatasetBits:
    """Bits/dim of every image, given its label (or the null class) and, in super-resolution, its reduced image.

    Of real numbers, -log2 of their density in their own units a dimension, which may be negative and depends on the units.

    ``arguments`` are those of :func:`fm_fast.bits_per_dim`. An image's result depends on its position in the data set and the seed, not on
    the size of a batch (fixed-step methods). Raises ValueError for images or labels that the network was not made for.
    """
    require_fitting(config, dataset)
    results, started = [], time.perf_counter()
    for first in range(0, len(dataset), batch_size):
        rows = slice(first, first + batch_size)
        images, labels = dataset.images[rows].to(dataset.device), dataset.labels[rows]
        condition = condition_of(config, labels, reduced_if_wanted(config, images, dataset.levels), unconditional)
        results.append(
            _bits(
                model, images, dataset, cond=condition, path=config.recipe.path, objective=config.recipe.objective, seed=seed,
                sample_ids=first, **arguments,
            )
        )  # fmt: skip
    return _merged(results, time.perf_counter() - started)


def _bits(model: nn.Module, images: Tensor, dataset: Dataset, draws: int = 1, **arguments: Any) -> BitsPerDim:
    units = dataset.standardisation
    if units is None:
        return bits_per_dim(model, images, levels=dataset.grey_levels, draws=draws, **arguments)
    if draws != 1:
        raise ValueError(f"draws: expected 1 for real numbers, which are not dequantised, got {draws}")
    found, nats = log_likelihood(model, images.float(), **arguments), math.prod(images.shape[1:]) * math.log(2.0)
    std_err = None if found.std_err is None else found.std_err / nats
    return BitsPerDim(-found.logp / nats - units.bits, std_err, found.logp[None], found.nfe, found.nvjp)


def require_fitting(config: TrainConfig, dataset: Dataset) -> None:
    """Raises ValueError for images or labels that the network was not made for."""
    channels, height, width = dataset.images.shape[1:]
    expected = (config.model.image_channels, config.model.image_size, config.model.image_size)
    if (channels, height, width) != expected:
        raise ValueError(f"data: expected images of {expected} for this network, got {(channels, height, width)}")
    if 0 < config.model.classes < dataset.classes:
        raise ValueError(f"data: expected at most {config.model.classes} classes for this network, got {dataset.classes}")


def _merged(results: list[BitsPerDim], seconds: float) -> DatasetBits:
    sizes = [len(result.bpd) for result in results]
    errors = [result.std_err for result in results]
    std_err = None if any(error is None for error in errors) else torch.cat([error.cpu() for error in errors if error is not None])
    nfe, nvjp = (sum(n * size for n, size in zip(counts, sizes, strict=True)) / sum(sizes) for counts in _counts(results))
    return DatasetBits(torch.cat([result.bpd.cpu() for result in results]), std_err, nfe, nvjp, seconds)


def _counts(results: list[BitsPerDim]) -> tuple[list[int], list[int]]:
    return [result.nfe for result in results], [result.nvjp for result in results]
