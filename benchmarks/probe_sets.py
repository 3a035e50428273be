"""Probes of a divergence for the benchmarks of single ops."""

import torch
from torch import Tensor

from benchmarks.op import Setting
from fm_fast._ops import ProbeSet
from fm_fast.random import make_key

SIZES = {"small": (128, 3, 32, 32), "large": (8, 3, 256, 256), "2-D": (1024, 2), "tabular": (1024, 64)}
MODES = ("1 probe", "4 probes", "16 probes")


def count(setting: Setting) -> int:
    return int(setting.mode.split()[0])


def of_step(setting: Setting, step: int | Tensor) -> ProbeSet:
    """Independent Rademacher probes, as many as the mode says."""
    key, none = make_key(0, step, None, setting.shape[0], setting.device), torch.empty(0, dtype=torch.int64, device=setting.device)
    return ProbeSet(key, none, none, 0, count(setting), 1, normal=False)
