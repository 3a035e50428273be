"""A wrapper that keeps the input and the output of a noise- or score-predicting network at unit size at every time."""

from typing import Any

import torch
from torch import Tensor, nn

from fm_fast.paths import Path


class Preconditioned(nn.Module):
    """A noise prediction o = c_skip x + c_out network(c_in x, t), or the score -o/sigma, after Karras et al. (2022, section 5).

    With x = a x1 + s x0 and data of unit variance, the linear guess of the noise is s x / (a^2 + s^2), and what remains has
    variance a^2 / (a^2 + s^2). So c_skip = s / (a^2 + s^2), c_out = a / sqrt(a^2 + s^2), c_in = 1 / sqrt(a^2 + s^2).
    Without this a network must copy its input to an accuracy of a(t) near t = 0 (0.007 on the VP path), since the velocity
    recovered from its output magnifies the error; and a score grows like 1/sigma near t = 1. Loss and target are unchanged.

    Called like the network, with x [B, ...] and t [B] (clamped to the path's range). Returns x's shape, in t's dtype or wider.
    Raises ValueError for an objective other than "noise", "score" and "scoreflow".
    """

    def __init__(self, network: nn.Module, path: Path, objective: str) -> None:
        super().__init__()
        if objective not in ("noise", "score", "scoreflow"):
            raise ValueError(f"objective: expected noise, score or scoreflow, got {objective!r}")
        self.network = network
        self.path = path
        self.predicts_score = objective != "noise"

    def forward(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        a, s = self._schedule(x, t)
        variance = a.square() + s.square()
        output = self.network(x * variance.rsqrt(), t, **cond)
        noise = s / variance * x + a * variance.rsqrt() * output
        return -noise / s if self.predicts_score else noise

    def _schedule(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        low, high = getattr(self.path, "t_min", 0.0), getattr(self.path, "t_max", 1.0)
        time = t.to(torch.float64).clamp(low, high).reshape(-1, *[1] * (x.ndim - 1))
        return self.path.alpha(time).to(t.dtype), self.path.sigma(time).to(t.dtype)
