"""Learning-rate schedules: each a function of (configuration, step), where step counts the finished steps.

All rise linearly over ``warmup`` steps to ``learning_rate``; what follows differs. Rise and fall start and end at FLOOR, which no step
uses: the first step is one warm-up step above it, and the step after the last would reach it.
"""

import math
from collections.abc import Callable

from fm_fast.train.config import TrainConfig

FLOOR = 1e-8  # Lipman et al. 2023, appendix E


def learning_rate(config: TrainConfig, step: int) -> float:
    """The learning rate of the step that follows ``step`` others."""
    floor = min(FLOOR, config.learning_rate)
    share = min(_rise(config, step), SCHEDULES[config.schedule](config, step))
    return floor + (config.learning_rate - floor) * share


def constant(config: TrainConfig, step: int) -> float:
    """1."""
    return 1.0


def linear(config: TrainConfig, step: int) -> float:
    """From 1 after the warm-up to 0 after the last step: the polynomial decay of power 1 of Lipman et al. 2023."""
    return 1.0 - _progress(config, step)


def cosine(config: TrainConfig, step: int) -> float:
    """Half a cosine wave from 1 after the warm-up to 0 after the last step (Loshchilov & Hutter 2017, "SGDR")."""
    return 0.5 * (1.0 + math.cos(math.pi * _progress(config, step)))


def inverse_sqrt(config: TrainConfig, step: int) -> float:
    """sqrt(warmup / n) at step n = 1, 2, ... beyond the warm-up (Vaswani et al. 2017, "Attention is all you need")."""
    return math.sqrt(max(config.warmup, 1) / max(config.warmup, step + 1))


SCHEDULES: dict[str, Callable[[TrainConfig, int], float]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "inverse_sqrt": inverse_sqrt,
}


def _rise(config: TrainConfig, step: int) -> float:
    return (step + 1) / max(config.warmup, 1)


def _progress(config: TrainConfig, step: int) -> float:
    """The share of the steps after the warm-up that are finished, in [0, 1]."""
    return min(max((step - config.warmup) / max(config.steps - config.warmup, 1), 0.0), 1.0)
