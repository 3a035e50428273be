"""``odeint`` and ``odeint_adjoint`` with torchdiffeq's arguments.

::

    from fm_fast.compat.torchdiffeq import odeint, odeint_adjoint   # was: from torchdiffeq import ...

An evaluation costs one fused op and a copy beside the field. dopri5 and bosh3 take torchdiffeq's steps. On purpose it differs in this:

* "step_size", "grid_constructor": a step that contains one of ``t`` is split there, instead of its ends being interpolated. dopri8 splits
  its steps too, which costs evaluations where ``t`` is long.
* fehlberg2 and adaptive_heun evaluate the slope at each step's end anew, where torchdiffeq takes the last stage's for it: up to twice the
  evaluations.
* 16-bit states are float32 between evaluations.
* ``func`` must return the shape of y; slopes of another are not broadcast.
* ``max_num_steps`` holds for all intervals of ``t`` together: as many times it as there are intervals. The error where they do not suffice
  calls it max_steps.
* ``rtol`` and ``atol`` must both be positive.
* The last step is cut at ``t[-1]``, where torchdiffeq's goes beyond it and is interpolated. ``func`` is never called outside of ``t``. That
  takes as many evaluations or fewer, by the steps in vain beyond the end. The error there is a step's, not an interpolation's: more often
  smaller than larger, with bosh3 up to 30 times.
* Options that tune how adaptive steps are chosen, "first_step", "min_step", "safety", "ifactor", "dfactor" and "dtype", have no effect, nor
  has "interp"; a warning names them. An option that no method has is an error. "grid_constructor" is called with ``func``, ``y0`` and ``t``
  as they were given, also of a tuple.
* Gradients are recorded where they are enabled, as there, but not of ``t``, which must then not require one; sampling belongs under
  ``torch.no_grad()``. What has no part in the states gets no gradient (None), where torchdiffeq's is zero for all of a tuple and, with
  ``odeint_adjoint``, for all parameters.
* ``odeint_adjoint`` solves nothing backwards: it keeps the states, evaluates ``func`` once more in the backward pass, and gives the exact
  gradient of the steps that were taken, for all that needs one, whatever ``adjoint_params`` holds.

The options "max_step", "step_t", "jump_t", "norm" and "perturb", tolerances of each part of a tuple, complex states, ``event_fn``,
callbacks and implicit, Adams and SciPy's methods are not covered, and say so. There is no ``odeint_event`` and no ``odeint_dense``.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fm_fast import _checks
from fm_fast._solver.ode import Stops, solve_ode, solve_ode_in_parts
from fm_fast.compat._methods import accuracy_of, method_named, rounding_of, stops_at, stops_on, times_of
from fm_fast.compat._options import Options, number, read_options, same
from fm_fast.solvers import EmbeddedRungeKutta

__all__ = ["odeint", "odeint_adjoint"]

Tensors = tuple[Tensor, ...]
State = TypeVar("State", Tensor, Tensors)

CALLBACKS = [f"callback_{event}{adjoint}" for event in ("step", "accept_step", "reject_step") for adjoint in ("", "_adjoint")]
CALLER = 4  # of a public function, seen from what reads the options


def odeint(
    func: Callable[[Tensor, State], State],
    y0: State,
    t: Tensor,
    *,
    rtol: float | Tensor = 1e-7,
    atol: float | Tensor = 1e-9,
    method: str | None = None,
    options: Mapping[str, Any] | None = None,
    event_fn: None = None,
) -> State:
    """The states at the times ``t`` of dy/dt = func(t, y) from y0.

    Args:
        func: called as ``func(t, y)`` with t without dimensions, in y's dtype.
        y0: a floating tensor of any shape, or a tuple of some of one dtype, as func then takes and returns them.
        t: [T >= 1], strictly increasing or decreasing; y0 is the state at the first.
        rtol, atol: of adaptive methods; the error's norm is over the whole state, or the largest of a tuple's.
        method: "dopri5" (default), "dopri8", "bosh3", "fehlberg2", "adaptive_heun", "tsit5"; with fixed steps "euler", "midpoint", "heun2",
            "heun3", "rk4" (the 3/8 rule).
        options: "step_size" or "grid_constructor" of fixed steps, which are else the intervals of ``t``; "max_num_steps" of adaptive ones.
            Those of the other kind of methods have no effect, and a warning names them.

    Returns:
        [T, *y0.shape], in y0's dtype; of a tuple a tuple of these.

    Raises:
        ValueError, TypeError: for any argument out of range or of wrong shape or dtype, naming it.
        RuntimeError: an adaptive method cannot go on.
    """
    _check_covered(func, event_fn)
    return _solve(func, y0, t, rtol, atol, _or_default(method), options)


def odeint_adjoint(
    func: Callable[[Tensor, State], State],
    y0: State,
    t: Tensor,
    *,
    rtol: float | Tensor = 1e-7,
    atol: float | Tensor = 1e-9,
    method: str | None = None,
    options: Mapping[str, Any] | None = None,
    event_fn: None = None,
    adjoint_rtol: float | Tensor | None = None,
    adjoint_atol: float | Tensor | None = None,
    adjoint_method: str | None = None,
    adjoint_options: Mapping[str, Any] | None = None,
    adjoint_params: Iterable[Tensor] | None = None,
) -> State:
    """:func:`odeint` with gradients for the memory of the states and slopes alone, whatever ``func`` needs for its own gradient.

    ``func`` is evaluated once more for each evaluation, in the backward pass. It need not be a module: whatever requires a gradient gets
    it. Nothing is solved backwards, so arguments that begin with adjoint have no effect; a warning names those that are not at
    torchdiffeq's defaults.
    """
    _check_covered(func, event_fn)
    own = {name: value for name, value in (options or {}).items() if name != "norm"}
    settings = {
        "adjoint_rtol": (adjoint_rtol, rtol),
        "adjoint_atol": (adjoint_atol, atol),
        "adjoint_method": (adjoint_method, _or_default(method)),
        "adjoint_options": (adjoint_options, own),
    }
    ignored = [name for name, (value, default) in settings.items() if value is not None and not same(value, default)]
    _warn_of(ignored + ["adjoint_params"] * (adjoint_params is not None and not _are_all(adjoint_params, func)))
    recorded = _evaluated_again(func) if torch.is_grad_enabled() else func
    return _solve(recorded, y0, t, rtol, atol, _or_default(method), options)


def _or_default(method: str | None) -> str:
    return "dopri5" if method is None else method


def _warn_of(ignored: list[str]) -> None:
    if ignored:
        reason = "gradients are those of the steps taken, for all that requires one, and nothing is solved backwards"
        warnings.warn(f"without effect on odeint_adjoint: {', '.join(ignored)}; {reason}", stacklevel=3)


def _are_all(params: Iterable[Tensor], func: object) -> bool:
    """Whether these are the parameters of func that require a gradient, torchdiffeq's default, beside some that do not."""
    own = func.parameters() if isinstance(func, nn.Module) else None
    return own is not None and {id(x) for x in params if x.requires_grad} == {id(x) for x in own if x.requires_grad}


def _evaluated_again(func: Any) -> Callable[[Tensor, Any], Any]:
    def rerun(t: Tensor, y: Any) -> Any:
        return checkpoint(lambda t, y: func(t.clone(), y), t, y, use_reentrant=False)  # func may write into its time

    return rerun


def _solve(
    func: Any, y0: Any, t: Tensor, rtol: float | Tensor, atol: float | Tensor, method: str, options: Mapping[str, Any] | None
) -> Any:
    _check_state(y0)
    chosen = method_named(method)
    asked = read_options(options, method, isinstance(chosen, EmbeddedRungeKutta), CALLER)
    single = isinstance(t, Tensor) and t.shape == (1,)
    stops = _stops(asked, func, y0, torch.cat([t, t + 1]) if single else t, single)
    accuracy = accuracy_of(chosen, _one("rtol", rtol), _one("atol", atol), asked.max_num_steps * (len(stops.wanted) - 1))
    if single:
        return y0[None].clone() if isinstance(y0, Tensor) else tuple(part[None].clone() for part in y0)
    if isinstance(y0, Tensor):
        return solve_ode(func, y0, stops, chosen, accuracy, "func")
    return solve_ode_in_parts(lambda t, y: _checked(func(t, y), y), y0, stops, chosen, accuracy, "func")


def _one(name: str, tolerance: Any) -> Any:
    if isinstance(tolerance, tuple | list) and tolerance and all(same(each, tolerance[0]) for each in tolerance):
        return number(tolerance[0])
    if isinstance(tolerance, tuple | list) or (isinstance(tolerance, Tensor) and tolerance.numel() != 1):
        raise TypeError(f"{name} must be one number: tolerances of each part or element are not covered, got {type(tolerance).__name__}")
    return number(tolerance)


def _stops(asked: Options, func: object, y0: object, t: Tensor, single: bool) -> Stops:
    times = times_of("t", t)
    wanted = range(len(times))
    if asked.grid_constructor is None or single:
        return stops_at(times, asked.step_size, wanted)
    grid = asked.grid_constructor(func, y0, t)
    return stops_on(times, grid, rounding_of(t, grid) if isinstance(grid, Tensor) else 0.0, wanted)


def _check_state(y0: object) -> None:
    parts = {f"y0[{i}]": part for i, part in enumerate(y0)} if isinstance(y0, tuple) else {"y0": y0}
    if not parts:
        raise ValueError("y0 must hold at least one tensor, got an empty tuple")
    for name, part in parts.items():
        _checks.tensor(name, part)
        assert isinstance(part, Tensor)
        _checks.floating(name, part)
        if isinstance(y0, tuple) and (part.numel() == 0 or part.dtype != y0[0].dtype or part.device != y0[0].device):
            expected = f"elements, of {y0[0].dtype} on {y0[0].device} as y0[0] is"
            raise ValueError(f"{name} must have {expected}, got {tuple(part.shape)} of {part.dtype} on {part.device}")


def _checked(slopes: Any, y: Tensors) -> Tensors:
    shapes = [tuple(part.shape) for part in y]
    if not isinstance(slopes, tuple | list) or [tuple(slope.shape) for slope in slopes if isinstance(slope, Tensor)] != shapes:
        raise ValueError(f"func must return a tuple of tensors of the shapes {shapes}, got {_described(slopes)}")
    for i, (slope, part) in enumerate(zip(slopes, y, strict=True)):
        if not slope.is_floating_point() or slope.device != part.device:
            raise TypeError(f"func must return floating tensors on {part.device}, got {slope.dtype} on {slope.device} for y[{i}]")
    return tuple(slopes)


def _described(slopes: Any) -> str:
    if not isinstance(slopes, tuple | list):
        return type(slopes).__name__
    return str([tuple(slope.shape) if isinstance(slope, Tensor) else type(slope).__name__ for slope in slopes])


def _check_covered(func: object, event_fn: object) -> None:
    if event_fn is not None:
        raise ValueError("event_fn must be None: events are not covered")
    found = [name for name in CALLBACKS if hasattr(func, name)]
    if found:
        raise ValueError(f"func must have none of torchdiffeq's callbacks, which are not covered, got {', '.join(found)}")
