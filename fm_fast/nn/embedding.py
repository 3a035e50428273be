"""Embeddings of the time and of the class label."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LONGEST_PERIOD = 10_000.0


def sinusoidal_embedding(t: Tensor, dimension: int, scale: float = 1000.0) -> Tensor:
    """Cosines and sines of t at geometrically spaced frequencies.

    t: float [B], times in [0, 1]. dimension: even number of features. scale: factor of t; with 1000 the fastest of the sinusoids
    (1 rad a unit) tells apart times that differ by about 1e-3. Returns float32 [B, dimension], cosines first.
    """
    half = dimension // 2
    exponents = torch.arange(half, device=t.device, dtype=torch.float32) / half
    angles = scale * t.float()[:, None] * torch.exp(-math.log(LONGEST_PERIOD) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def dtype_of(layer: nn.Module, otherwise: torch.dtype) -> torch.dtype:
    """Of a layer's weight, or of the one that it is wrapped around, as adapters are; ``otherwise`` where it shows none (quantised ones)."""
    own = getattr(layer, "weight", None)
    if isinstance(own, Tensor) and own.is_floating_point():
        return own.dtype
    named = [(name.rpartition(".")[2] != "weight", p.dtype) for name, p in layer.named_parameters() if p.is_floating_point()]
    return min(named, key=lambda entry: entry[0])[1] if named else otherwise


class TimeEmbedding(nn.Module):
    """Sinusoids of t followed by a two-layer perceptron: float [B] -> [B, width]."""

    def __init__(self, dimension: int, width: int, scale: float) -> None:
        super().__init__()
        self.dimension, self.scale = dimension, scale
        self.first = nn.Linear(dimension, width)
        self.second = nn.Linear(width, width)

    def forward(self, t: Tensor) -> Tensor:
        features = sinusoidal_embedding(t, self.dimension, self.scale)
        features = features.to(dtype_of(self.first, features.dtype))
        return self.second(F.silu(self.first(features)))


class ClassEmbedding(nn.Module):
    """One learnt vector a class, and one for the null class (label -1): int64 [B] -> [B, width].

    Row 0 of the table is the null class, so that a label outside -1..classes-1 falls outside the table and
    raises IndexError instead of meaning something else.
    """

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(classes + 1, width)

    def forward(self, y: Tensor) -> Tensor:
        return self.table(y + 1)
