"""``odeint`` and ``odeint_adjoint`` with torchdiffeq's arguments.

::

    from fm_fast.compat.torchdiffeq import odeint, odeint_adjoint   # was: from torchdiffeq import ...

An evaluation costs one fused op and a copy beside the field. dopri5 and bosh3 take torchdiffeq's steps. On purpose it differs in this:

* ``step_size``: a step that contains one of ``t`` is split there, instead of its ends being interpolated. dopri8 splits its steps too,
  which costs evaluations where ``t`` is long.
* fehlberg2 and adaptive_heun evaluate the slope at each step's end anew, where torchdiffeq takes the last stage's for it: up to twice the
  evaluations.
* 16-bit states are float32 between evaluations.
* ``func`` must return the shape of y; slopes of another are not broadcast.
* ``max_num_steps`` holds for all intervals of ``t`` together: as many times it as there are intervals.
* Gradients are recorded where they are enabled, as there, but not of ``t``; sampling belongs under ``torch.no_grad()``.
* ``odeint_adjoint`` solves nothing backwards: it keeps the states, evaluates ``func`` once more in the backward pass, and gives the exact
  gradient of the steps that were taken, for all that needs one.

Tolerances of each part of a tuple, events, callbacks and implicit, Adams and SciPy's methods are not covered, and say so.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fm_fast import _checks
from fm_fast._solver.ode import Stops, solve_ode, solve_ode_in_parts
from fm_fast.compat._methods import MAX_STEPS, accuracy_of, method_named, stops_at, times_of
from fm_fast.solvers import EmbeddedRungeKutta

__all__ = ["odeint", "odeint_adjoint"]

Tensors = tuple[Tensor, ...]
State = TypeVar("State", Tensor, Tensors)

ADJOINT = ("adjoint_rtol", "adjoint_atol", "adjoint_method", "adjoint_options")
CALLBACKS = [f"callback_{event}{adjoint}" for event in ("step", "accept_step", "reject_step") for adjoint in ("", "_adjoint")]


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
        options: "step_size" of fixed steps, which are else the intervals of ``t``; "max_num_steps" of adaptive ones.

    Returns:
        [T, *y0.shape], in y0's dtype; of a tuple a tuple of these.

    Raises:
        ValueError, TypeError: for any argument out of range or of wrong shape or dtype, naming it.
        RuntimeError: an adaptive method cannot go on.
    """
    _check_state(y0)
    _check_covered(func, event_fn)
    chosen = method_named(method or "dopri5")
    single = isinstance(t, Tensor) and t.shape == (1,)
    times = times_of("t", torch.cat([t, t + 1]) if single else t)
    wanted = range(len(times))
    if isinstance(chosen, EmbeddedRungeKutta):
        given = _options(options, chosen.name, "max_num_steps", MAX_STEPS)
        _checks.count("options['max_num_steps']", given)
        stops, max_steps = Stops(times, wanted), given * (len(times) - 1)
    else:
        stops, max_steps = stops_at(times, _number(_options(options, str(method), "step_size", None)), wanted), MAX_STEPS
    accuracy = accuracy_of(chosen, _number(rtol), _number(atol), max_steps)
    field: Any = func
    if single:
        alone: Any = y0[None].clone() if isinstance(y0, Tensor) else tuple(part[None].clone() for part in y0)
        return alone
    if isinstance(y0, Tensor):
        return solve_ode(field, y0, stops, chosen, accuracy, "func")
    return solve_ode_in_parts(lambda t, y: _checked(field(t, y), y), y0, stops, chosen, accuracy, "func")


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
    adjoint_params: object = None,
    **adjoint: Any,
) -> State:
    """:func:`odeint` with gradients for the memory of the states and slopes alone, whatever ``func`` needs for its own gradient.

    ``func`` is evaluated once more for each evaluation, in the backward pass. It need not be a module, and ``adjoint_params`` need not be
    given: whatever requires a gradient gets it. Tolerances, methods and options of an adjoint's own solve must be None.
    """
    _check_covered(func, event_fn)
    unknown, solving = [name for name in adjoint if name not in ADJOINT], [name for name in adjoint if adjoint[name] is not None]
    if unknown:
        raise TypeError(f"odeint_adjoint got unknown arguments {', '.join(unknown)}")
    if solving:
        raise ValueError(f"{', '.join(solving)} must be None: gradients are those of the steps taken, and nothing is solved backwards")
    call: Any = func

    def rerun(t: Tensor, y: State) -> Any:
        return checkpoint(lambda t, y: call(t.clone(), y), t, y, use_reentrant=False)  # func may write into its time

    recorded = rerun if torch.is_grad_enabled() else func
    return odeint(recorded, y0, t, rtol=rtol, atol=atol, method=method, options=options)


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


def _number(value: Any) -> Any:
    """Of a tensor that holds one number, as programs pass them, the number."""
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def _check_covered(func: object, event_fn: object) -> None:
    if event_fn is not None:
        raise ValueError("event_fn must be None: events are not covered")
    found = [name for name in CALLBACKS if hasattr(func, name)]
    if found:
        raise ValueError(f"func must have none of torchdiffeq's callbacks, which are not covered, got {', '.join(found)}")


def _options(options: Mapping[str, Any] | None, method: str, known: str, default: Any) -> Any:
    """The one option that the method has; ValueError for any other."""
    given = dict(options or {})
    value = given.pop(known, default)
    if given:
        raise ValueError(f"options must hold nothing but {known!r} for the method {method!r}, got {', '.join(map(repr, given))}")
    return value
