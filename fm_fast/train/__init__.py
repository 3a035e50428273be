"""The reference trainer: from a data set to checkpoints, sample pictures and a quality report."""

from fm_fast.train.config import TrainConfig
from fm_fast.train.loop import train

__all__ = ["TrainConfig", "train"]
