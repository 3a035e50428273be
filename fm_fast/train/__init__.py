"""The reference trainer: from a data set to checkpoints, sample pictures and a quality report.

To be read in this order: config.py (what a run is), data/ (what it learns from), step.py (what one step does), optimiser/, loop.py (the
run as a whole). Beside them stand execution/ (devices, processes, CUDA graphs), storage/ (folders, checkpoints, weights), evaluation/ and
reporting/.
"""

from fm_fast.train.config import TrainConfig
from fm_fast.train.data import Dataset, load_dataset
from fm_fast.train.loop import train
from fm_fast.train.optimiser.adamw_ema import AdamWEMA
from fm_fast.train.presets import PRESETS
from fm_fast.train.storage.weights import load_model

__all__ = ["PRESETS", "AdamWEMA", "Dataset", "TrainConfig", "load_dataset", "load_model", "train"]
