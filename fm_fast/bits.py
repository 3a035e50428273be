"""Bits per dimension of integer data by the paper's protocol (appendix C and E.2)."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fm_fast import _checks, _modes, random
from fm_fast._results import Result
from fm_fast._solver.field import Model
from fm_fast.likelihood import Likelihood, log_likelihood
from fm_fast.random import Whole

LARGEST_LEVELS = 65536


@dataclass(frozen=True, eq=False, repr=False)
class BitsPerDim(Result):
    """Bits per dimension of a batch.

    Attributes:
        bpd: [B], float64.
        std_err: [B], what the probes leave uncertain; None where they cannot tell.
        logp: [draws, B], log-densities in the model's space, nats.
        nfe, nvjp: calls of the model and vector-Jacobian products, all draws together.
    """

    bpd: Tensor
    std_err: Tensor | None
    logp: Tensor
    nfe: int
    nvjp: int

    @property
    def mean(self) -> float:
        """Over the batch."""
        return float(self.bpd.mean())

    @property
    def mean_std_err(self) -> float:
        """Standard error of the mean, from the spread over the batch: data, dequantisation and probes together. nan for one sample."""
        return standard_error(self.bpd)


def standard_error(values: Tensor) -> float:
    """Of the mean of values [B], from their spread; nan for one."""
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan


def bits_per_dim(
    model: Model,
    x_int: Tensor,
    *,
    levels: int = 256,
    draws: int = 1,
    seed: Whole | None = None,
    sample_ids: Whole | None = None,
    dtype: torch.dtype | None = None,
    **arguments: Any,
) -> BitsPerDim:
    """Bits per dimension of integer data, dequantised ``draws`` times (equation 47; the paper uses 10 to 50 draws).

    Each draw is y = 2 (x + u) / levels - 1 with u ~ U(0, 1), the data map of ``flow_matching_loss(..., dequantise=True)``, with which the
    model should have been trained. The log-densities of the draws are averaged as densities, and the result is
    -log p(y) / (D log 2) + log2(levels / 2): + 7 for 256 levels. All draws share their probes: with probes of their own, the average
    would favour the draws whose estimate errs upwards.

    Equivalent with one draw, for samples of D numbers::

        y = 2 * (x_int + torch.rand(x_int.shape)) / levels - 1
        bpd = -log_likelihood(model, y, **arguments).logp / (D * math.log(2)) + math.log2(levels / 2)

    Args:
        model: as in :func:`fm_fast.log_likelihood`.
        x_int: [B, ...], whole numbers 0 .. levels - 1, of an integer dtype.
        levels: number of values of the data.
        draws: dequantisation draws, each a solve of its own; more of them tighten the bound.
        seed, sample_ids: what dequantisation and probes are a function of (see ``fm_fast.random``).
        dtype: of the model's input, float32 by default; float64 solves in float64.
        arguments: of :func:`fm_fast.log_likelihood`: ``steps``, ``method``, ``probes``, ``kind``, ``cond`` and so on.

    Raises:
        ValueError, TypeError: for any argument out of range, naming it; the errors of :func:`fm_fast.log_likelihood`.
    """
    _check(x_int, levels, draws, arguments)
    shape, device = tuple(x_int.shape), x_int.device
    seed = random.fresh_seed(device) if seed is None else seed
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    results = []
    for draw in range(draws):
        u = random.noise(shape, seed=seed, step=draw, stream="dequantise", sample_ids=sample_ids, dtype=wide, device=device)
        y = (x_int.to(wide) + u) * (2.0 / levels) - 1.0
        results.append(log_likelihood(model, y, seed=seed, step=0, sample_ids=sample_ids, dtype=dtype, **arguments))
    return _result(results, math.prod(shape[1:]), levels)


def _check(x_int: Tensor, levels: int, draws: int, arguments: dict[str, Any]) -> None:
    _checks.tensor("x_int", x_int)
    if x_int.is_floating_point() or x_int.is_complex() or x_int.dtype == torch.bool:
        raise TypeError(f"x_int must hold whole numbers, got {x_int.dtype}; data in [-1, 1] goes to log_likelihood")
    if x_int.dim() < 2 or math.prod(x_int.shape[1:]) == 0:
        raise ValueError(f"x_int must be [B, ...] with at least one element a sample, got shape {tuple(x_int.shape)}")
    _checks.count("levels", levels)
    _checks.count("draws", draws)
    if not 2 <= levels <= LARGEST_LEVELS:
        raise ValueError(f"levels must lie in [2, {LARGEST_LEVELS}], got {levels}")
    _check_values(x_int, levels)
    if arguments.get("error_estimate"):
        raise ValueError("error_estimate is a matter of log_likelihood; a bits_per_dim result does not hold it")
    if "step" in arguments:
        raise TypeError("step counts the draws here; use seed and sample_ids to choose the noise")


def _check_values(x_int: Tensor, levels: int) -> None:
    if not _modes.values_readable(x_int) or x_int.numel() == 0:
        return
    # torch finds no extremes of unsigned numbers of more than 8 bits.
    low, high = (int(extreme) for extreme in torch.aminmax(x_int if x_int.dtype == torch.uint8 else x_int.to(torch.int64)))
    if low < 0 or high >= levels:
        raise ValueError(f"x_int must lie in 0..{levels - 1} for levels={levels}, got {low}..{high}")


def _result(results: list[Likelihood], size: int, levels: int) -> BitsPerDim:
    logp = torch.stack([result.logp for result in results])
    nats = size * math.log(2.0)
    bpd = math.log2(levels / 2.0) - (torch.logsumexp(logp, 0) - math.log(len(results))) / nats
    errors = [result.std_err for result in results]
    std_err = None
    if all(error is not None for error in errors):
        # d logsumexp / d logp_k is the softmax weight of draw k; the draws share their probes, so their errors add up.
        weights = torch.softmax(logp.detach(), 0)
        std_err = (weights * torch.stack(errors)).sum(0) / nats  # type: ignore[arg-type]
    return BitsPerDim(bpd, std_err, logp, sum(result.nfe for result in results), sum(result.nvjp for result in results))
