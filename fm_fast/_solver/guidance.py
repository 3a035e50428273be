"""Classifier-free guidance: a doubled batch, the second half of which has null values in place of its conditions."""

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fm_fast import _checks, _modes

ALWAYS = (0.0, 1.0)


@dataclass(frozen=True, eq=False)
class Guidance:
    """Classifier-free guidance: the output u + scale (c - u), c with the condition and u without, from one doubled batch.

    Attributes:
        scale: 1 is the conditional model alone, 0 the unconditional one. A number, or a tensor [B] of one a sample (which plain PyTorch
            mixes, differentiably).
        null: what the condition becomes in the unconditional half, by name: a tensor that broadcasts to it, or a number (``{"y": -1}``).
            Names left out keep their value in both halves. A condition that is a dict takes a dict of null values.
        interval: times (begin, end) that are guided; outside, the conditional model runs alone, on half the batch. The velocity jumps at
            its ends. Steps of adaptive methods end there, and multistep methods start anew. A fixed step is guided if its middle lies
            within: place the ends where steps end (``save=interval`` does; in a likelihood, a ``grid`` of times), or the step with an
            end inside is of first order.
        shared: names of conditions that all samples share. Of others, every tensor whose first size is that of the batch is taken to have
            one entry a sample, and is doubled with it, also within dicts, lists and tuples.

    Source: Ho and Salimans (2022); the interval, Kynkäänniemi et al. (2024). The velocity is linear in the output, so mixing
    outputs mixes velocities.
    """

    scale: float | Tensor
    null: Mapping[str, Any]
    interval: tuple[float, float] = ALWAYS
    shared: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_scale(self.scale)
        if not isinstance(self.null, Mapping):
            raise TypeError(f"null must be a mapping of condition values, got {type(self.null).__name__}")
        if not self.null:
            raise ValueError("null must name at least one condition with its null value, or both halves of the batch are the same")
        object.__setattr__(self, "interval", _checked_interval(self.interval))
        object.__setattr__(self, "shared", _checked_names(self.shared))
        if set(self.shared) & set(self.null):
            raise ValueError(f"shared must not name what has a null value, got {', '.join(sorted(set(self.shared) & set(self.null)))}")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Guidance):
            return NotImplemented
        mine, others = ((g.interval, set(g.shared)) for g in (self, other))
        return mine == others and _equal(self.scale, other.scale) and _equal(self.null, other.null)

    def applies(self, t: float) -> bool:
        return self.interval[0] <= t <= self.interval[1]

    def scale_of_each(self, t: Tensor) -> float | Tensor:
        """The scale at times [B]: 1, which leaves the conditional model alone, outside of the interval."""
        if self.interval == ALWAYS:
            return self.scale
        scale = self.scale if isinstance(self.scale, Tensor) else torch.full((), self.scale, dtype=torch.float64, device=t.device)
        return torch.where((t >= self.interval[0]) & (t <= self.interval[1]), scale, torch.ones_like(scale))


def guided_times(guidance: object) -> tuple[float, float]:
    """The interval of what is to be a Guidance or None."""
    return guidance.interval if isinstance(guidance, Guidance) else ALWAYS


def _check_scale(scale: object) -> None:
    if not isinstance(scale, Tensor):
        _checks.finite_number("scale", scale)
        return
    _checks.floating("scale", scale)
    if scale.dim() != 1:
        raise ValueError(f"scale must be a number or have shape [B], got {tuple(scale.shape)}")
    if _modes.values_readable(scale) and not bool(scale.isfinite().all()):
        raise ValueError("scale must be finite, got values that are not")


def _equal(one: Any, other: Any) -> bool:
    """Whether two null values are the same; tensors by shape, dtype and values."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return set(one) == set(other) and all(_equal(value, other[name]) for name, value in one.items())
    if isinstance(one, np.ndarray) or isinstance(other, np.ndarray):
        return isinstance(one, np.ndarray) and isinstance(other, np.ndarray) and np.array_equal(one, other)
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)
    return not isinstance(one, Tensor) and not isinstance(other, Tensor) and bool(one == other)


def _checked_interval(value: Any) -> tuple[float, float]:
    with contextlib.suppress(TypeError, ValueError, RuntimeError):
        begin, end = value
        if 0.0 <= begin <= end <= 1.0:
            return float(begin), float(end)
    raise ValueError(f"interval must be (begin, end) with 0 <= begin <= end <= 1, got {value}")


def _checked_names(value: Any) -> tuple[str, ...]:
    """What can be read once only, as a generator, is read here."""
    names: tuple[Any, ...] = tuple(value) if isinstance(value, Iterable) and not isinstance(value, (str, Tensor)) else (value,)
    if isinstance(value, str) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"shared must be names of conditions, got {value!r}")
    return names


def doubled_conditions(guidance: Guidance, given: Mapping[str, Any], batch: int) -> dict[str, Any]:
    """The conditions of the double batch: with the given values, then with the null values. ValueError, TypeError if they do not fit."""
    if isinstance(guidance.scale, Tensor) and guidance.scale.shape[0] != batch:
        raise ValueError(f"guidance.scale must be a number or have shape [{batch}], got {tuple(guidance.scale.shape)}")
    for name, chosen in (("null", guidance.null), ("shared", guidance.shared)):
        _require_known(f"guidance.{name}", chosen, given)
    return {
        name: value if name in guidance.shared else _doubled(name, value, guidance.null.get(name, value), batch)
        for name, value in given.items()
    }


def of_samples(given: Any, doubled: Any, samples: Tensor, batch: int, shared: tuple[str, ...] = ()) -> tuple[Any, Any]:
    """The conditions of some samples of a batch, and of their double batch (None without guidance).

    Tensors whose first size is that of the batch have one entry a sample, also within dicts, lists and tuples, but for the named ones.
    """
    if isinstance(given, Mapping):
        halves = doubled or dict.fromkeys(given)
        parts = {k: (v, halves[k]) if k in shared else of_samples(v, halves[k], samples, batch) for k, v in given.items()}
        return {k: one for k, (one, _) in parts.items()}, {k: two for k, (_, two) in parts.items()} if doubled is not None else None
    if isinstance(given, (list, tuple)):
        pairs = [of_samples(*pair, samples, batch) for pair in zip(given, doubled or [None] * len(given), strict=True)]
        one, two = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        return (one, two) if isinstance(given, list) else (_as_tuple(given, one), _as_tuple(given, two))
    if isinstance(given, Tensor) and given.is_nested:
        raise TypeError('cond must hold no nested tensors with per_sample="shrink", which takes samples out of them; pad them')
    if not isinstance(given, Tensor) or given.dim() == 0 or given.shape[0] != batch:
        return given, doubled
    return given[samples], None if doubled is None else doubled[torch.cat([samples, samples + batch])]


def _require_known(what: str, names: Iterable[str], given: Mapping[str, Any]) -> None:
    unknown = set(names) - set(given)
    if unknown:
        known = ", ".join(map(str, given)) or "none"
        raise ValueError(f"{what} must name conditions of cond ({known}), got {', '.join(sorted(map(str, unknown)))}")


def _doubled(name: str, value: Any, null: Any, batch: int) -> Any:
    """A condition of the double batch: the given values, then the null values."""
    if isinstance(value, Mapping):
        if not isinstance(null, Mapping):
            raise TypeError(f"guidance.null[{name!r}] must be a mapping, as the condition is, got {type(null).__name__}")
        _require_known(f"guidance.null[{name!r}]", null, value)
        return {key: _doubled(f"{name}.{key}", part, null.get(key, part), batch) for key, part in value.items()}
    if isinstance(value, (list, tuple)) and null is value:
        parts = [_doubled(f"{name}.{i}", part, part, batch) for i, part in enumerate(value)]
        return parts if isinstance(value, list) else _as_tuple(value, parts)
    if isinstance(value, Tensor) and value.is_nested:
        raise TypeError(f"cond[{name!r}] must not be nested where guidance doubles it; pad it, or name it in guidance.shared")
    if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == batch:
        other = _null_like(name, null, value)
        try:
            return torch.cat([value, other.expand_as(value)])
        except RuntimeError:
            shapes = f"{tuple(value.shape)}, got {tuple(other.shape)}"
            raise ValueError(
                f"guidance.null[{name!r}] must broadcast to the condition's shape {shapes}; for others, give a model of "
                "your own that calls the network twice and mixes"
            ) from None
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


def _as_tuple(like: tuple[Any, ...], parts: list[Any]) -> tuple[Any, ...]:
    """Of the kind of ``like``, which may have named fields."""
    return type(like)(*parts) if hasattr(like, "_fields") else tuple(parts)
