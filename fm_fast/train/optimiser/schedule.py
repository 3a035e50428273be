"""Learning-rate schedules: each gives the share of the peak after a number of finished steps.

All rise linearly over ``warmup`` steps to the peak; what follows differs. Rise and fall start and end at FLOOR, which no step uses: the
first step is one warm-up step above it, and the step after the last would reach it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

FLOOR = 1e-8  # Lipman et al. 2023, appendix E


@dataclass(frozen=True)
class LearningRate:
    """Of a run of so many steps: a schedule by name, and its peak."""

    schedule: str
    peak: float
    warmup: int
    steps: int

    def after(self, step: int) -> float:
        """The learning rate of the step that follows ``step`` others."""
        floor = min(FLOOR, self.peak)
        share = min(self._rise(step), SCHEDULES[self.schedule](self, step))
        return floor + (self.peak - floor) * share

    def progress(self, step: int) -> float:
        """The share of the steps after the warm-up that are finished, in [0, 1]."""
        return min(max((step - self.warmup) / max(self.steps - self.warmup, 1), 0.0), 1.0)

    def _rise(self, step: int) -> float:
        return (step + 1) / max(self.warmup, 1)


def constant(rate: LearningRate, step: int) -> float:
    """1."""
    return 1.0


def linear(rate: LearningRate, step: int) -> float:
    """From 1 after the warm-up to 0 after the last step: the polynomial decay of power 1 of Lipman et al. 2023."""
    return 1.0 - rate.progress(step)


def cosine(rate: LearningRate, step: int) -> float:
    """Half a cosine wave from 1 after the warm-up to 0 after the last step (Loshchilov & Hutter 2017, "SGDR")."""
    return 0.5 * (1.0 + math.cos(math.pi * rate.progress(step)))


def inverse_sqrt(rate: LearningRate, step: int) -> float:
    """sqrt(warmup / n) at step n = 1, 2, ... beyond the warm-up (Vaswani et al. 2017, "Attention is all you need")."""
    return math.sqrt(max(rate.warmup, 1) / max(rate.warmup, step + 1))


SCHEDULES: dict[str, Callable[[LearningRate, int], float]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "inverse_sqrt": inverse_sqrt,
}
