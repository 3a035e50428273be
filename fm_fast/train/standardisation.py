"""Real-valued data, such as an autoencoder's latents: what the network sees of them is about of mean 0 and standard deviation 1."""

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

PART = 2**20  # numbers that are looked at together: in float64 they stay in a processor's cache
RESOLUTION, SMALLEST = 1e-7, 1e-30  # of float32: below this share of the mean, or this, a deviation is rounding
DIGITS = 3  # of a measured number: the same from run to run, whatever the order of summation


@dataclass(frozen=True)
class Standardisation:
    """The network sees (value - shift) scale. One number of each for all channels, or one a channel."""

    shift: tuple[float, ...]
    scale: tuple[float, ...]

    @property
    def bits(self) -> float:
        """By how much the density in the data's own units is above that in the network's: log2, the mean over the dimensions."""
        return sum(math.log2(abs(scale)) for scale in self.scale) / len(self.scale)

    def seen(self, values: Tensor) -> Tensor:
        """What the network sees of values [N, C, H, W], which are overwritten: a data set may fill half of the memory.

        Raises ValueError where their dtype does not hold it.
        """
        shift, scale = self._channels(values.device)
        for part in in_parts(values):
            part.copy_((part.float() - shift) * scale)
            if not bool(part.isfinite().all()):
                raise ValueError(f"data_scale: expected numbers with which {values.dtype} holds the data, got {self.scale}")
        return values

    def restored(self, y: Tensor) -> Tensor:
        """The inverse, of a network's samples: float32 [N, C, H, W]."""
        shift, scale = self._channels(y.device)
        return y.float() / scale + shift

    def _channels(self, device: torch.device) -> tuple[Tensor, Tensor]:
        shift, scale = (torch.tensor(numbers, dtype=torch.float32, device=device)[:, None, None] for numbers in (self.shift, self.scale))
        return shift, scale

    def __str__(self) -> str:
        return f"(value - {_listed(self.shift)}) {_listed(self.scale)}"


def in_parts(values: Tensor) -> Iterable[Tensor]:
    """[N, ...] by so many rows that each part is small, whatever the whole is."""
    return values.split(max(1, PART // max(1, values[:1].numel())))


def given(shift: tuple[float, ...], scale: tuple[float, ...], channels: int) -> Standardisation:
    """That of the settings `data_shift`, where there is none 0, and `data_scale`. ValueError for neither one number nor one a channel."""
    for name, numbers in (("data_shift", shift or (0.0,)), ("data_scale", scale)):
        if len(numbers) not in (1, channels):
            raise ValueError(f"{name}: expected one number, or {channels}, one a channel, got {len(numbers)}")
    return Standardisation(shift or (0.0,), scale)


def measured(parts: Iterable[Tensor]) -> Standardisation:
    """Of values [N, C, H, W], which come in parts, at least one: each channel's mean and standard deviation, in a few digits.

    A channel that is constant is not stretched.
    """
    parts = iter(parts)
    beginning = next(parts)
    pivot = beginning[:1].double().mean((0, 2, 3))  # near the mean: a variance is no small difference of large squares then
    first, second, count = torch.zeros_like(pivot), torch.zeros_like(pivot), 0
    for part in itertools.chain([beginning], parts):
        distance = part.double() - pivot[:, None, None]
        first += distance.sum((0, 2, 3))
        second += distance.square().sum((0, 2, 3))
        count += part.numel() // part.shape[1]
    deviation = (second / count - (first / count).square()).clamp(min=0.0).sqrt()
    pairs = [_rounded(*pair) for pair in zip((pivot + first / count).tolist(), deviation.tolist(), strict=True)]
    return Standardisation(tuple(shift for shift, _ in pairs), tuple(scale for _, scale in pairs))


def _rounded(mean: float, deviation: float) -> tuple[float, float]:
    if deviation <= max(RESOLUTION * abs(mean), SMALLEST):
        return mean, 1.0
    return round(mean, DIGITS - math.floor(math.log10(deviation))), float(f"{1.0 / deviation:.{DIGITS}e}")


def _listed(numbers: tuple[float, ...]) -> str:
    return f"{numbers[0]:g}" if len(numbers) == 1 else f"[{', '.join(f'{number:g}' for number in numbers)}]"
