"""Images for a super-resolution network to enlarge: originals, of which it is told the means, or images that are small already."""

from dataclasses import replace

from fm_fast.train.config import TrainConfig
from fm_fast.train.data import Dataset


def reduced_side(config: TrainConfig) -> int:
    """Height and width of what the network is told."""
    return config.model.image_size // config.super_resolution


def is_reduced(config: TrainConfig, dataset: Dataset) -> bool:
    """Whether the images are small already. Raises ValueError for another size than that and the network's own."""
    shape = tuple(dataset.images.shape[1:])
    full, low = ((config.model.image_channels, side, side) for side in (config.model.image_size, reduced_side(config)))
    if shape not in (full, low):
        raise ValueError(f"data: expected images of {full} for this network, or of {low} to enlarge as they are, got {shape}")
    return shape == low


def as_originals(config: TrainConfig, dataset: Dataset) -> Dataset:
    """Images of the network's size whose reduced images are the given ones: each pixel becomes a block."""
    factor = config.super_resolution
    blocks = dataset.images.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)
    return replace(dataset, images=blocks, mapped=False)
