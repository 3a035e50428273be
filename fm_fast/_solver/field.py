"""The network as a solver sees it: conditions bound, guided where asked for, its output checked once."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from fm_fast import _checks, _modes, _ops, reference
from fm_fast._solver.guidance import ALWAYS, Guidance, doubled_conditions, of_samples
from fm_fast.objectives import Objective, is_built_in, velocity_factors
from fm_fast.paths import Path

Model = Callable[..., Tensor]
# One time of the whole batch, or [B]
Time = float | Tensor


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

    def of(self, samples: Tensor) -> "Field":
        """The field of some samples [n] of the batch."""
        guidance = self.guidance
        cond, doubled = of_samples(self.cond, self.doubled, samples, self.batch, guidance.shared if guidance else ())
        if guidance is not None and isinstance(guidance.scale, Tensor):
            guidance = replace(guidance, scale=guidance.scale[samples])
        return replace(self, batch=len(samples), cond=cond, doubled=doubled, guidance=guidance)

    def recordable(self) -> "Field":
        """The same with copies of the conditions that were made in inference mode, which autograd refuses to keep."""
        if _modes.is_compiling() or not self.cond:
            return self
        cond, doubled, guidance = _recordable(self.cond), _recordable(self.doubled), self.guidance
        if guidance is not None:
            guidance = replace(guidance, scale=_recordable(guidance.scale))
        return replace(self, cond=cond, doubled=doubled, guidance=guidance)

    def scale_at(self, t: Time) -> float | Tensor | None:
        """The scale of guidance: None at one time of the whole batch that is not guided, the only one that is looked at."""
        if self.guidance is None:
            return None
        if self.guidance.interval == ALWAYS:
            return self.guidance.scale
        if isinstance(t, Tensor) and (t.dim() == 1 or _modes.transforms_active()):
            return self.guidance.scale_of_each(t.expand(self.batch))
        return self.guidance.scale if self.guidance.applies(float(t.detach()) if isinstance(t, Tensor) else t) else None

    def output_at(self, x: Tensor, t: Tensor, scale: float | Tensor | None) -> Tensor:
        """The model's output for x [B, ...] at t [B], with guidance mixed in by plain PyTorch unless ``scale`` is None; differentiable.

        A mix is float32 or float64: the difference of its halves, which the scale multiplies, would lose digits in 16 bits.
        """
        if scale is None or self.doubled is None:
            return self._ask(x, t, self.cond)
        twice = torch.cat([x, x])
        both = self._ask(twice, torch.cat([t, t]), self.doubled)
        check_output(both, twice)
        return reference.guided(both.to(reference.accumulation_dtype(both)), scale)

    def _ask(self, x: Tensor, t: Tensor, cond: Mapping[str, Any]) -> Tensor:
        try:
            return self.model(x, t, **cond)
        except Exception as error:
            _checks.explain_call(error, x, t, cond)
            raise

    def checked_output_at(self, x: Tensor, t: Tensor, scale: float | Tensor | None) -> Tensor:
        """The same, checked, in a layout that the ops take."""
        output = self.output_at(x, t, scale)
        check_output(output, x)
        return _ops.native_layout(output)

    def factors_at(self, t: Time, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """(p, r) of the velocity p x + r o, float64; None where the output is the velocity."""
        if is_built_in(self.objective) and self.objective.name == "velocity":
            return None
        times = t if isinstance(t, Tensor) else torch.full((), t, dtype=torch.float64, device=device)
        return velocity_factors(self.path, self.objective, times)


def _recordable(values: Any) -> Any:
    """Tensors, also within dicts, lists and tuples, with copies of those made in inference mode; what holds none stays the same object."""
    if not any(isinstance(x, Tensor) and x.is_inference() for x in tree_leaves(values)):
        return values
    with torch.inference_mode(False):
        return tree_map_only(Tensor, lambda x: x.clone() if x.is_inference() else x, values)


def combined(x: Tensor, output: Tensor, factors: tuple[Tensor, Tensor] | None) -> Tensor:
    """The velocity p x + r o in x's dtype; where it is the output, the output itself in its own."""
    if factors is None:
        return output
    p, r = (reference.per_sample(factor.to(x.dtype), x) if factor.dim() else factor.to(x.dtype) for factor in factors)
    return p * x + r * output.to(x.dtype)


def make_field(
    model: Model, path: Path, objective: Objective, batch: int, cond: Mapping[str, Any] | None, guidance: Guidance | None,
    span: tuple[float, float] | None = None,
) -> Field:  # fmt: skip
    """The field of a call's arguments; span: the earliest and the latest time of a solve.

    Raises TypeError or ValueError for conditions that do not fit.
    """
    if not callable(model):
        raise TypeError(f"model must be callable as model(x, t, **cond), got {type(model).__name__}")
    _checks.condition(cond)
    given = dict(cond or {})
    if guidance is None:
        return Field(model, path, objective, batch, given)
    if not isinstance(guidance, Guidance):
        raise TypeError(f"guidance must be a fm_fast.Guidance (scale and null condition) or None, got {type(guidance).__name__}")
    doubled = doubled_conditions(guidance, given, batch)
    if span is not None and not (guidance.interval[0] < span[1] and guidance.interval[1] > span[0]):
        return Field(model, path, objective, batch, given)  # guidance at an end alone would be that of a single evaluation
    return Field(model, path, objective, batch, given, guidance, doubled)


def check_output(o: object, x: Tensor, name: str = "model") -> None:
    """The model's output for input x: a floating tensor of x's shape on x's device."""
    if not isinstance(o, Tensor):
        raise TypeError(f"{name} must return a torch.Tensor, got {type(o).__name__}")
    if o.shape != x.shape:
        raise ValueError(f"{name} must return the shape of its input, {tuple(x.shape)}, got {tuple(o.shape)}")
    if o.layout != torch.strided:
        raise TypeError(f"{name} must return a dense tensor, got {o.layout}")
    if o.dtype not in _checks.FLOATING:
        raise TypeError(f"{name} must return float64, float32, bfloat16 or float16, got {o.dtype}")
    if o.device != x.device:
        raise ValueError(f"{name} must return a tensor on the device of its input, {x.device}, got {o.device}")
