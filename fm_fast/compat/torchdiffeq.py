"""``odeint`` with torchdiffeq's arguments.

::

    from fm_fast.compat.torchdiffeq import odeint   # was: from torchdiffeq import odeint

An evaluation costs one fused op and a copy beside the field. dopri5 and bosh3 take torchdiffeq's steps. On purpose it differs in this:

* ``step_size``: a step that contains one of ``t`` is split there, instead of its ends being interpolated. dopri8 splits its steps too,
  which costs evaluations where ``t`` is long.
* fehlberg2 and adaptive_heun go on with the slope at the step's end.
* 16-bit states are float32 between evaluations.
* ``max_num_steps`` holds for all intervals of ``t`` together: as many times it as there are intervals.
* Gradients are recorded where they are enabled, as there, but not of ``t``; sampling belongs under ``torch.no_grad()``.

Tuples of tensors, events, callbacks, adjoints and implicit, Adams and SciPy's methods are not covered, and say so.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from fm_fast import _checks
from fm_fast._solver.ode import Stops, solve_ode
from fm_fast.compat._methods import MAX_STEPS, accuracy_of, method_named, stops_at, times_of
from fm_fast.solvers import EmbeddedRungeKutta

__all__ = ["odeint"]

CALLBACKS = [f"callback_{event}{adjoint}" for event in ("step", "accept_step", "reject_step") for adjoint in ("", "_adjoint")]


def odeint(
    func: Callable[[Tensor, Tensor], Tensor],
    y0: Tensor,
    t: Tensor,
    *,
    rtol: float = 1e-7,
    atol: float = 1e-9,
    method: str | None = None,
    options: Mapping[str, Any] | None = None,
    event_fn: None = None,
) -> Tensor:
    """The states at the times ``t`` of dy/dt = func(t, y) from y0.

    Args:
        func: called as ``func(t, y)`` with t without dimensions, in y's dtype.
        y0: a floating tensor of any shape.
        t: [T], strictly increasing or decreasing; y0 is the state at the first.
        rtol, atol: of adaptive methods; the error's norm is over the whole state.
        method: "dopri5" (default), "dopri8", "bosh3", "fehlberg2", "adaptive_heun", "tsit5"; with fixed steps "euler", "midpoint", "heun2",
            "heun3", "rk4" (the 3/8 rule).
        options: "step_size" of fixed steps, which are else the intervals of ``t``; "max_num_steps" of adaptive ones.

    Returns:
        [T, *y0.shape], in y0's dtype.

    Raises:
        ValueError, TypeError: for any argument out of range or of wrong shape or dtype, naming it.
        RuntimeError: an adaptive method cannot go on.
    """
    _check_state(y0)
    _check_covered(func, event_fn)
    chosen, times = method_named(method or "dopri5"), times_of("t", t)
    wanted = range(len(times))
    if isinstance(chosen, EmbeddedRungeKutta):
        given = _options(options, chosen.name, "max_num_steps", MAX_STEPS)
        _checks.count("options['max_num_steps']", given)
        stops, max_steps = Stops(times, wanted), given * (len(times) - 1)
    else:
        stops, max_steps = stops_at(times, _options(options, str(method), "step_size", None), wanted), MAX_STEPS
    return solve_ode(func, y0, stops, chosen, accuracy_of(chosen, rtol, atol, max_steps))


def _check_state(y0: object) -> None:
    if isinstance(y0, tuple):
        raise TypeError("y0 must be a tensor, got a tuple; concatenate its parts")
    _checks.tensor("y0", y0)
    assert isinstance(y0, Tensor)
    _checks.floating("y0", y0)


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
