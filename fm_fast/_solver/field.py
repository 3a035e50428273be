"""The network as a solver sees it: conditions bound, guided where asked for, its output checked once."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fm_fast import _checks, _modes, _ops, reference
from fm_fast.objectives import Objective, velocity_factors
from fm_fast.paths import Path

Model = Callable[..., Tensor]


@dataclass(frozen=True, eq=False)
class Guidance:
    """Classifier-free guidance: the output u + scale (c - u), c with the condition and u without, from one doubled batch.

    Attributes:
        scale: 1 is the conditional model alone, 0 the unconditional one.
        null: what the condition becomes in the unconditional half, by name: a tensor that broadcasts to it, or a number (``{"y": -1}``).
            Names left out keep their value in both halves.
        interval: times (begin, end) of the evaluations that are guided; outside, the conditional model runs alone, on half the batch.

    Source: Ho and Salimans (2022); the interval, Kynkäänniemi et al. (2024). The velocity is linear in the output, so mixing
    outputs mixes velocities.
    """

    scale: float
    null: Mapping[str, Any]
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        _checks.finite_number("scale", self.scale)
        if not isinstance(self.null, Mapping):
            raise TypeError(f"null must be a mapping of condition values, got {type(self.null).__name__}")
        if not self.null:
            raise ValueError("null must name at least one condition with its null value, or both halves of the batch are the same")
        if not _is_interval(self.interval):
            raise ValueError(f"interval must be (begin, end) with 0 <= begin <= end <= 1, got {self.interval}")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Guidance):
            return NotImplemented
        mine, others = (self.scale, tuple(self.interval), set(self.null)), (other.scale, tuple(other.interval), set(other.null))
        return mine == others and all(_equal(value, other.null[name]) for name, value in self.null.items())

    def applies(self, t: float) -> bool:
        return self.interval[0] <= t <= self.interval[1]


def _equal(one: Any, other: Any) -> bool:
    """Whether two null values are the same; tensors by shape, dtype and values."""
    if isinstance(one, np.ndarray) or isinstance(other, np.ndarray):
        return type(one) is type(other) and np.array_equal(one, other)
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)
    return not isinstance(one, Tensor) and not isinstance(other, Tensor) and bool(one == other)


def _is_interval(value: Any) -> bool:
    try:
        begin, end = value
        return bool(0.0 <= begin <= end <= 1.0)
    except (TypeError, ValueError):
        return False


@dataclass(frozen=True)
class Field:
    """A model with its conditions, on a batch of ``batch`` samples.

    ``cond`` holds the conditions of the batch, ``doubled`` those of the guided double batch (None without guidance).
    """

    model: Model
    path: Path
    objective: Objective
    batch: int
    cond: Mapping[str, Any]
    guidance: Guidance | None = None
    doubled: Mapping[str, Any] | None = None

    def guided_at(self, t: float | Tensor) -> bool:
        """Whether guidance applies at this time; a tensor is looked at only where there is guidance."""
        if self.guidance is None:
            return False
        return self.guidance.applies(float(t.detach()) if isinstance(t, Tensor) else t)

    def output_at(self, x: Tensor, t: Tensor, guided: bool) -> Tensor:
        """The model's output for x [B, ...] at t [B], with guidance mixed in by plain PyTorch if ``guided``; differentiable."""
        if not guided or self.doubled is None or self.guidance is None:
            return self.model(x, t, **self.cond)
        twice = torch.cat([x, x])
        both = self.model(twice, torch.cat([t, t]), **self.doubled)
        check_output(both, twice)
        return reference.guided(both, self.guidance.scale)

    def checked_output_at(self, x: Tensor, t: Tensor, guided: bool) -> Tensor:
        """The same, checked, in a layout that the ops take."""
        output = self.output_at(x, t, guided)
        check_output(output, x)
        return _ops.native_layout(output)

    def velocity(self, x: Tensor, t: Tensor, output: Tensor) -> Tensor:
        """p(t) x + r(t) o in x's dtype."""
        p, r = velocity_factors(self.path, self.objective, t)
        p, r = (reference.per_sample(values.to(x.dtype), x) for values in (p, r))
        return p * x + r * output.to(x.dtype)


def make_field(
    model: Model, path: Path, objective: Objective, batch: int, cond: Mapping[str, Any] | None, guidance: Guidance | None
) -> Field:
    """The field of a call's arguments. Raises TypeError or ValueError for conditions that do not fit."""
    if not callable(model):
        raise TypeError(f"model must be callable as model(x, t, **cond), got {type(model).__name__}")
    _checks.condition(cond)
    given = dict(cond or {})
    if guidance is None:
        return Field(model, path, objective, batch, given)
    if not isinstance(guidance, Guidance):
        raise TypeError(f"guidance must be a fm_fast.Guidance (scale and null condition) or None, got {type(guidance).__name__}")
    unknown = set(guidance.null) - set(given)
    if unknown:
        raise ValueError(f"guidance.null must name conditions of cond ({', '.join(given) or 'none'}), got {', '.join(sorted(unknown))}")
    doubled = {name: _doubled(name, value, guidance.null.get(name, value), batch) for name, value in given.items()}
    return Field(model, path, objective, batch, given, guidance, doubled)


def _doubled(name: str, value: Any, null: Any, batch: int) -> Any:
    """A condition of the double batch: the given values, then the null values."""
    if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == batch:
        other = _null_like(name, null, value)
        try:
            return torch.cat([value, other.expand_as(value)])
        except RuntimeError:
            shapes = f"{tuple(value.shape)}, got {tuple(other.shape)}"
            raise ValueError(f"guidance.null[{name!r}] must broadcast to the condition's shape {shapes}") from None
    if null is value or (not isinstance(null, Tensor) and not isinstance(value, Tensor) and _equal(null, value)):
        return value
    raise ValueError(f"guidance.null[{name!r}]: only conditions that are tensors with one entry a sample ([{batch}, ...]) can be replaced")


def _null_like(name: str, null: object, value: Tensor) -> Tensor:
    """The null value as the condition holds it; ValueError where it cannot, as a byte cannot hold -1."""
    if not (_checks.is_number(null) or isinstance(null, Tensor)):
        raise TypeError(f"guidance.null[{name!r}] must be a tensor or a number, got {type(null).__name__}")
    given = null if isinstance(null, Tensor) else torch.tensor(float(null), dtype=torch.float64, device="cpu")
    held = given.to(value)
    if not value.is_floating_point() and _modes.values_readable(given, held) and not bool((held == given).all()):
        raise ValueError(f"guidance.null[{name!r}] must be a value that the condition, {value.dtype}, can hold, got {null}")
    return held


def check_output(o: object, x: Tensor) -> None:
    """The model's output for input x: a floating tensor of x's shape on x's device."""
    if not isinstance(o, Tensor):
        raise TypeError(f"model must return a torch.Tensor, got {type(o).__name__}")
    if o.shape != x.shape:
        raise ValueError(f"model must return the shape of its input, {tuple(x.shape)}, got {tuple(o.shape)}")
    if o.layout != torch.strided:
        raise TypeError(f"model must return a dense tensor, got {o.layout}")
    if o.dtype not in _checks.FLOATING:
        raise TypeError(f"model must return float64, float32, bfloat16 or float16, got {o.dtype}")
    if o.device != x.device:
        raise ValueError(f"model must return a tensor on the device of its input, {x.device}, got {o.device}")
