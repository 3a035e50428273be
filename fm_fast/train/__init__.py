"""The reference trainer: from a data set to checkpoints, sample pictures and a quality report."""

from fm_fast.train.config import TrainConfig
from fm_fast.train.loop import train
from fm_fast.train.optimiser import AdamWEMA
from fm_fast.train.presets import PRESETS
from fm_fast.train.weights import load_model

__all__ = ["PRESETS", "AdamWEMA", "TrainConfig", "load_model", "train"]
