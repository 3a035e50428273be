"""What AdamWEMA can be made of: errors that name the argument, what was expected and what came."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fm_fast import _checks
from fm_fast.train.optimiser.averaging import Averaging

HALF_TYPES = (torch.bfloat16, torch.float16)


def averagings(averages: Any) -> tuple[Averaging, ...]:
    found = tuple(averages) if isinstance(averages, Iterable) else None
    if found is None or not all(isinstance(average, Averaging) for average in found):
        raise TypeError(f"averages: expected a sequence of Averaging such as [fixed_decay(0.999)], got {averages!r}")
    return found


def check_parameters(parameters: Sequence[Tensor]) -> None:
    if len({id(p) for p in parameters}) != len(parameters):
        raise ValueError("parameters: expected each once, got one of them twice")
    if any(hasattr(p, "device_mesh") for p in parameters):
        raise TypeError("parameters: expected plain tensors, got those of fully_shard (DTensor), which torch.optim.AdamW takes")
    devices, dtypes = {p.device for p in parameters}, {p.dtype for p in parameters}
    if len(devices) > 1:
        raise ValueError(f"parameters: expected one device, got {', '.join(sorted(map(str, devices)))}")
    if dtypes != {torch.float64} and not dtypes <= {torch.float32, *HALF_TYPES}:
        raise ValueError(f"parameters: expected float64, or float32, bfloat16 and float16, got {', '.join(sorted(map(str, dtypes)))}")
    for p in parameters:
        if not _is_gapless(p):
            raise ValueError(f"parameters: expected memory without gaps, got strides {p.stride()} for {tuple(p.shape)}")


def _is_gapless(p: Tensor) -> bool:
    span = 1 + sum((size - 1) * stride for size, stride in zip(p.shape, p.stride(), strict=True))
    return p.numel() == 0 or span == p.numel()


def check_group(group: dict[str, Any]) -> None:
    for name in ("lr", "eps", "weight_decay"):
        if not _is_number(group[name], lambda value: 0.0 <= value < math.inf):
            raise ValueError(f"{name}: expected 0 or more, and finite, got {group[name]!r}")
    betas = group["betas"]
    if (
        not isinstance(betas, (tuple, list))
        or len(betas) != 2
        or not all(_is_number(beta, lambda beta: 0.0 <= beta < 1.0) for beta in betas)
    ):
        raise ValueError(f"betas: expected two numbers in [0, 1), got {betas!r}")
    if not _is_number(group["max_norm"], lambda value: value > 0.0):
        raise ValueError(f"max_norm: expected a positive number, inf for no limit, got {group['max_norm']!r}")


def _is_number(value: object, fits: Callable[[float], bool]) -> bool:
    """Whether this is a number that fits; a tensor's value is not looked at, which would wait for its device."""
    return (isinstance(value, Tensor) and value.numel() == 1) or (_checks.is_number(value) and fits(value))
