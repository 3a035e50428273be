"""The training loss: draw noise and time, move along the path, compare the network's output with the objective's target.

The fused kernels read x1 and the output and write x_t and the gradient; noise and target are never stored.
"""

import os
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fm_fast import _backends, _checks, _modes, _ops, random, reference
from fm_fast._results import Result
from fm_fast._spec import PathSpec, path_spec
from fm_fast.objectives import Objective, loss_coefficients
from fm_fast.paths import Path
from fm_fast.random import Whole
from fm_fast.time_samplers import TimeSampler

WEIGHTED_MEAN = "weighted_mean"
REDUCTIONS = (*reference.REDUCTIONS, WEIGHTED_MEAN)
INSIDE = tuple(os.path.dirname(file) + os.sep for file in (__file__, torch.__file__))


class _Writes(NamedTuple):
    """How often the data (x1 and a given x0) and the point were written to in place; None where torch does not count it."""

    data: int | None = None
    point: int | None = None


def _count_writes(x1: Tensor, x0: Tensor | None, point: Tensor | None) -> _Writes:
    if _modes.is_compiling() or _modes.transforms_active():
        return _Writes()
    try:
        return _Writes(x1._version if x0 is None else x1._version + x0._version, None if point is None else point._version)
    except RuntimeError:  # some were made in inference mode, where nothing is counted
        counted = [x._version for x in (x1, x0) if x is not None and not x.is_inference()]
        return _Writes(sum(counted), None if point is None or point.is_inference() else point._version)


@dataclass(frozen=True, eq=False, repr=False)
class PathSample(Result):
    """A point on the path for every sample, and the loss of a prediction made there.

    Attributes:
        x_t: [B, ...], alpha x1 + sigma x0 (equation 11), the network's input.
        t: [B], float32 (float64 for float64 data).
        coef: [B, 6], the rows (a, s, c1, c0, k, w) of the loss w ||k o - (c1 x1 + c0 x0)||^2.
    """

    x_t: Tensor
    t: Tensor
    coef: Tensor
    _x1: Tensor = field(repr=False)
    _x0: Tensor | None = field(repr=False)
    _key: Tensor = field(repr=False)
    _spec: PathSpec = field(repr=False)
    _backend: str = field(repr=False)
    _point: Tensor | None = field(default=None, repr=False)  # x_t as drawn, also where dataclasses.replace gives another x_t
    _writes: _Writes = field(default=_Writes(), repr=False)  # before the loss

    def loss(self, o: Tensor, weight: Tensor | None = None, reduction: str = "mean") -> Tensor:
        """The loss of the network's output ``o`` [B, ...], as in :func:`flow_matching_loss`.

        Reads x1 (and a given x0) again: RuntimeError if either was changed in place since the draw. On the CPU drawn noise is recovered
        from x_t where that costs at most a few roundings of the target (``recoverable`` in csrc/loss.h) and drawn again elsewhere, also
        where x_t was changed in place. What is not counted must not come before the loss: changes through ``x_t.data`` or NumPy, of tensors
        made in inference mode, and within a compiled function.
        """
        return self._loss("o", o, weight, reduction)

    def _loss(self, name: str, o: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
        _checks.like(name, o, self._x1)
        _checks.one_of("reduction", reduction, REDUCTIONS)
        point = self._unchanged()
        if weight is not None:
            _checks.weight(weight, self._x1)
        if reduction == WEIGHTED_MEAN:
            weight, reduction = _with_mean_one(weight, self.coef.dtype), "mean"
        if _ops.needs_reference(self._backend, self._x1, self._x0, self.coef, weight) or _ops.exports_gradient(o):
            return reference.path_loss(o, *self._plain(), self.coef, weight, reduction)
        return _ops.path_loss(
            o, self._x1, self._x0, self._drawn_point(point), self._key, self.coef, weight, reduction, self._spec, self._backend
        )

    def _unchanged(self) -> int | None:
        """How often the drawn point was written to; RuntimeError if what is read again is no longer what the point was made of."""
        now = self._count_writes()
        if _changed(self._writes.data, now.data):
            raise RuntimeError(
                "x1 or x0 was changed in place since sample_path, and is read again for the loss, x0 or target; give it a copy"
            )
        return now.point

    def _count_writes(self) -> _Writes:
        return _count_writes(self._x1, self._x0, self._point)

    def __getstate__(self) -> dict[str, Any]:
        """For copies, whose tensors count their own writes: what was changed before."""
        return {**self.__dict__, "_writes": tuple(map(_changed, self._writes, self._count_writes()))}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        before = (None if n is None else n - changed for n, changed in zip(self._count_writes(), state["_writes"], strict=True))
        self.__dict__["_writes"] = _Writes(*before)

    def _drawn_point(self, writes: int | None) -> Tensor | None:
        """x_t, if it is certainly still what this draw wrote: dividing the noise out of it costs a CPU less than drawing it again."""
        if self._point is None or writes is None or writes != self._writes.point:
            return None
        return self._point.detach() if self._point.requires_grad else self._point

    @property
    def x0(self) -> Tensor:
        """The noise [B, ...] of this draw, computed again on request, in coef's dtype. RuntimeError as for :meth:`loss`."""
        self._unchanged()
        return self._plain()[1]

    @property
    def target(self) -> Tensor:
        """c1 x1 + c0 x0 [B, ...], computed on request; x1 - (1 - sigma_min) x0 for the OT velocity (equation 23).

        RuntimeError as for :meth:`loss`.
        """
        self._unchanged()
        return reference.target(*self._plain(), self.coef)

    def _noise_backend(self) -> str:
        return "reference" if self._backend == "reference" else _backends.resolve("noise", self._x1.device, None)

    def _plain(self) -> tuple[Tensor, Tensor]:
        spec = self._spec
        return reference.plain_inputs(
            self._x1, self._x0, self._key, spec.flip, spec.levels, spec.dequantise, self.coef.dtype, _ops.drawer(self._noise_backend())
        )


def _with_mean_one(weight: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The weight with which a mean over all elements is the weighted mean: both broadcast, so the weight's own mean is that over all."""
    if weight is None:
        raise ValueError(f"weight must be given with reduction={WEIGHTED_MEAN!r}, got None")
    wide = weight.to(dtype)
    return wide / wide.mean()


def _changed(before: int | None, now: int | None) -> bool:
    return before is not None and now is not None and before != now


def sample_path(
    x1: Tensor,
    *,
    x0: Tensor | None = None,
    t: Tensor | float | None = None,
    path: str | Path = "ot",
    objective: str | Objective = "velocity",
    t_sampler: str | TimeSampler = "uniform",
    dtype: torch.dtype | None = None,
    flip: float = 0.0,
    levels: int = 256,
    dequantise: bool = False,
    seed: Whole | None = None,
    step: Whole | None = None,
    sample_ids: Whole | None = None,
    backend: str | None = None,
) -> PathSample:
    """Draw a point on the path for every sample: the first half of :func:`flow_matching_loss`, for loops that call the model themselves.

    The arguments are those of :func:`flow_matching_loss`. Source: equations 10, 11 and 22 of the paper.

    Naive equivalent for the OT path::

        x0, t = torch.randn_like(x1), torch.rand(x1.shape[0])
        x_t = t * x1 + (1 - t) * x0        # t shaped to broadcast
    """
    _check_inputs(x1, x0, t, dtype, flip, levels, dequantise)
    draws = x0 is None or t is None or flip > 0.0 or dequantise
    _require_step(seed, step, draws)
    if draws and seed is not None and sample_ids is None:
        _warn_if_ranks_draw_alike()
        _warn_if_maps_draw_alike(x1, seed, step)
    spec = path_spec(path, objective, t_sampler, flip, levels, dequantise)
    key = random.make_key(seed, step, sample_ids, x1.shape[0], x1.device, draws)
    chosen = _backends.resolve("path_sample", x1.device, backend)
    out = dtype or (x1.dtype if x1.dtype != torch.uint8 else torch.get_default_dtype())
    wide = torch.float64 if out == torch.float64 else reference.accumulation_dtype(x1, x0)
    times = None if t is None else _as_times(t, x1, spec, wide)
    if _ops.needs_reference(chosen, x1, x0, times):
        return _plain_sample(x1, x0, times, key, spec, out, wide)
    coefficients = None
    if not spec.known_to_kernels:
        if times is None:
            draw = _ops.drawer(_backends.resolve("noise", x1.device, None))
            times = reference.draw_time(key, x1.shape[0], spec.t_sampler, spec.t_range, wide, draw)
        coefficients = loss_coefficients(spec.path, spec.objective, times).to(wide)
        if _ops.needs_reference(chosen, coefficients):
            return _plain_sample(x1, x0, times, key, spec, out, wide)
    x_t, times, coefficients = _ops.path_sample(x1, x0, times, coefficients, key, spec, out, wide, chosen)
    point = x_t if _ops.recovers_noise(x0, chosen) else None
    shown = times if wide is torch.float32 else _as_shown(times, x1, out)
    return PathSample(x_t, shown, coefficients, x1, x0, key, spec, chosen, point, _count_writes(x1, x0, point))


def _plain_sample(
    x1: Tensor, x0: Tensor | None, t: Tensor | None, key: Tensor, spec: PathSpec, dtype: torch.dtype, wide: torch.dtype
) -> PathSample:
    """The same in plain PyTorch, differentiable in x1, x0, t and the path's own parameters."""
    data, noise_x0 = reference.plain_inputs(x1, x0, key, spec.flip, spec.levels, spec.dequantise, wide)
    if t is None:
        t = reference.draw_time(key, x1.shape[0], spec.t_sampler, spec.t_range, wide)
    coefficients = loss_coefficients(spec.path, spec.objective, t).to(wide)
    x_t = reference.path_sample(data, noise_x0, coefficients, dtype)
    mapped = PathSpec(spec.path, spec.objective, spec.t_sampler, spec.t_range)
    writes = _count_writes(data, noise_x0, None)
    return PathSample(x_t, _as_shown(t, x1, dtype), coefficients, data, noise_x0, key, mapped, "reference", None, writes)


def _as_shown(t: Tensor, x1: Tensor, dtype: torch.dtype) -> Tensor:
    """The times as the network gets them: float64 noise makes the loss wide, and not the network's input."""
    return t if torch.float64 in (x1.dtype, dtype) else t.float()


def flow_matching_loss(
    model: Callable[..., Tensor],
    x1: Tensor,
    *,
    x0: Tensor | None = None,
    t: Tensor | float | None = None,
    cond: Mapping[str, Any] | None = None,
    path: str | Path = "ot",
    objective: str | Objective = "velocity",
    t_sampler: str | TimeSampler = "uniform",
    weight: Tensor | None = None,
    reduction: str = "mean",
    dtype: torch.dtype | None = None,
    flip: float = 0.0,
    levels: int = 256,
    dequantise: bool = False,
    seed: Whole | None = None,
    step: Whole | None = None,
    sample_ids: Whole | None = None,
    backend: str | None = None,
) -> Tensor:
    """The conditional flow matching loss of a model on a batch of data (equations 14 and 23; Table 1's objectives).

    Args:
        model: called as ``model(x_t, t, **cond)`` with t of shape [B]; returns a tensor of x1's shape.
        x1: data [B, ...], float64, float32, bfloat16, float16, or uint8, which is mapped to 2 (x1 + 1/2) / levels - 1.
        x0: noise [B, ...] to use instead of drawing it.
        t: times, a number in [0, 1], a scalar tensor or [B], to use instead of drawing them; kept inside the path's own range.
        cond: keyword arguments passed on to the model untouched.
        path: "ot", "vp", "ve", "cosine" or a path object, e.g. ``OT(sigma_min=1e-4)``.
        objective: what the model predicts: "velocity", "noise" (DDPM), "score", "scoreflow" or "data".
        t_sampler: "uniform", "stratified", "logit-normal" or a time sampler object.
        weight: [B], or of as many dimensions as x1 and broadcastable to it: multiplies the squared errors; a mask. The mean still divides
            by the element count.
        reduction: "mean" over all elements, "sum", "none" (the mean of each sample, [B]), or "weighted_mean", which divides by the sum of
            the weights (of each element) instead of the number of elements: the mean over those that a mask leaves; NaN if it leaves none.
        dtype: of x_t; by default x1's, or torch's default dtype for uint8.
        flip: probability of mirroring a sample along its last dimension.
        levels: number of values of uint8 data.
        dequantise: replace the 1/2 of the data map by u ~ U(0, 1).
        seed, step, sample_ids: what the noise is a function of (see ``fm_fast.random``). A seed needs a step. Without a seed, one is drawn
            from torch's generator. sample_ids are the positions in the step's global batch: None (0..B-1; without a seed any B in a
            row), the first id, or int64 [B].
        backend: "reference", "cpp", "triton" or "cuda"; by default the fastest one that can run. Whatever is chosen, the plain PyTorch
            formula runs under ``torch.func`` transforms and forward-mode differentiation, and where x1, x0, t, weight or the path's
            own parameters require a gradient.

    Returns:
        A scalar ([B] for "none"), float32 (float64 for float64 data), differentiable in everything that requires a gradient.

    Raises:
        ValueError, TypeError: for any argument out of range or of wrong shape, dtype or device, naming it.
        RuntimeError: if ``backend`` cannot run here, with the reason.

    Naive equivalent for the OT path::

        x0, t = torch.randn_like(x1), torch.rand(x1.shape[0])
        x_t = t * x1 + (1 - t) * x0        # t shaped to broadcast
        loss = F.mse_loss(model(x_t, t), x1 - x0)
    """
    _checks.condition(cond)
    if not callable(model):
        raise TypeError(f"model must be callable as model(x_t, t, **cond), got {type(model).__name__}")
    sample = sample_path(
        x1, x0=x0, t=t, path=path, objective=objective, t_sampler=t_sampler, dtype=dtype, flip=flip, levels=levels,
        dequantise=dequantise, seed=seed, step=step, sample_ids=sample_ids, backend=backend,
    )  # fmt: skip
    try:
        prediction = model(sample.x_t, sample.t, **(cond or {}))
    except Exception as error:
        _checks.explain_call(error, sample.x_t, sample.t, cond or {})
        raise
    if not isinstance(prediction, Tensor):
        raise TypeError(f"model must return a torch.Tensor of the shape of x1, got {type(prediction).__name__}")
    if prediction.shape != x1.shape:
        raise ValueError(f"model must return the shape of x1, {tuple(x1.shape)}, got {tuple(prediction.shape)}")
    return sample._loss("the output of model", prediction, weight, reduction)


def _check_inputs(
    x1: Tensor, x0: Tensor | None, t: Tensor | float | None, dtype: torch.dtype | None, flip: float, levels: int, dequantise: bool
) -> None:
    _checks.data(x1)
    if x0 is not None:
        _checks.like("x0", x0, x1)
    if t is not None:
        _checks.time(t, x1)
    if dtype is not None:
        _checks.one_of("dtype", dtype, (None, *_checks.FLOATING))
    _checks.probability("flip", flip)
    _checks.data_map(x1, flip, levels, dequantise)


def _require_step(seed: Whole | None, step: Whole | None, draws: bool) -> None:
    if seed is None and step is not None:
        raise ValueError("step was given without a seed; give both, or neither to draw the seed from torch's generator")
    if seed is not None and step is None and draws:
        raise ValueError("seed was given without a step, which would repeat the same noise every call; give step=<training step>")


def _warn_if_ranks_draw_alike() -> None:
    """UserWarning in a process group, whose ranks would all have the samples 0 to B - 1 of the same seed."""
    if random.world_size() == 1 or _modes.is_compiling():
        return
    warnings.warn(
        f"seed was given without sample_ids in a process group of {random.world_size()} ranks, which all draw the same noise then: give "
        "sample_ids=<position of the first sample in the global batch>, such as rank * len(x1), or 0 where that is meant",
        stacklevel=_level_of_caller(),
    )


def _warn_if_maps_draw_alike(x1: Tensor, seed: Whole, step: Whole | None) -> None:
    """UserWarning under vmap over the data, whose calls would all have the samples 0 to B - 1 of the same seed and step."""
    if not _modes.function_transforms_active() or _modes.is_compiling():
        return
    if _modes.is_mapped(x1) and not (_modes.is_mapped(seed) or _modes.is_mapped(step)):
        warnings.warn(
            "seed was given without sample_ids for data under vmap, where all of them draw the same noise then: give "
            "sample_ids=<position of the sample in the batch>, such as torch.arange(len(x1)), mapped as well, or 0 where that is meant",
            stacklevel=_level_of_caller(),
        )


def _level_of_caller() -> int:
    """The stack level, for a warning of who calls this, of the first frame that is neither of this package nor of torch's modules."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(INSIDE):
        frame, level = frame.f_back, level + 1
    return level


def _as_times(t: Tensor | float, x1: Tensor, spec: PathSpec, wide: torch.dtype) -> Tensor:
    """A new tensor [B], since the op writes the clamped times into it."""
    if not isinstance(t, Tensor):
        t = x1.new_full((), t, dtype=wide)
    return t.to(wide).clamp(*spec.t_range).expand(x1.shape[0]).clone()
