"""Training times drawn where a likelihood-weighted loss has its weight."""

import torch
from torch import Tensor

from fm_fast._philox import GOLDEN
from fm_fast.objectives import OBJECTIVES, as_objective, schedule, time_range
from fm_fast.paths import Path
from fm_fast.random import Whole, noise
from fm_fast.train.config import Recipe

BISECTIONS = 50


def log_snr(path: Path, t: Tensor) -> Tensor:
    """ln(alpha^2 / sigma^2): rises along the path."""
    point = schedule(path, t)
    return 2.0 * (point.a.log() - point.s.log())


def importance_times(recipe: Recipe, batch: int, seed: int, step: Whole, first_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Times with density proportional to ScoreFlow's weight, and the factor by which the loss must be multiplied: float32 [batch] each.

    The weight w(t) = 2 (a'/a - s'/s) is the derivative of the log signal-to-noise ratio, so drawing that ratio uniformly draws t with
    density w / Z. The factor Z / ((t_max - t_min) w) keeps the expectation of the loss that of uniform times; its variance falls, because
    the product of weight and factor is constant (Song et al. 2021, "Maximum likelihood training of score-based diffusion models").
    The numbers are those of stratified times in the noise contract.
    """
    path = recipe.path
    ends = _on_device(time_range(path, as_objective(recipe.objective)), device)
    low, high = log_snr(path, ends)
    t = _inverse_log_snr(path, low + (high - low) * _stratified(batch, seed, step, first_id, device), ends)
    weight = OBJECTIVES["scoreflow"].target(schedule(path, t)).w
    return t.float(), ((high - low) / ((ends[1] - ends[0]) * weight)).float()


def _on_device(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    """float64 [n], written as arguments of fills: torch.tensor would copy them from the host and wait."""
    return torch.stack([torch.full((), number, dtype=torch.float64, device=device) for number in numbers])


def _stratified(batch: int, seed: int, step: Whole, first_id: int, device: torch.device) -> Tensor:
    word = noise((1,), seed=seed, step=step, stream="t", sample_ids=0, kind="word", device=device)
    ids = torch.arange(first_id, first_id + batch, device=device)
    return ((word + ids * GOLDEN) % 2**32 + 0.5).to(torch.float64) * 2.0**-32


def _inverse_log_snr(path: Path, value: Tensor, ends: Tensor) -> Tensor:
    """The times at which the log signal-to-noise ratio has these values, by bisection: it has no closed form on every path."""
    low, high = ends[0].expand_as(value), ends[1].expand_as(value)
    for _ in range(BISECTIONS):
        middle = 0.5 * (low + high)
        rising = log_snr(path, middle) < value
        low, high = torch.where(rising, middle, low), torch.where(rising, high, middle)
    return 0.5 * (low + high)
