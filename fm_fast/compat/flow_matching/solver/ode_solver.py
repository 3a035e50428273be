"""``ODESolver``: samples, trajectories and likelihoods of a velocity model.

On purpose it differs in this:

* A fixed-step method without ``step_size`` needs a ``time_grid`` of more than its two ends, where flow_matching takes one step in silence.
* ``step_size``: a step that contains a time of ``time_grid`` is split there, instead of its ends being interpolated.
* 16-bit states are float32 between evaluations.
* ``compute_likelihood`` draws its probe afresh at every step, which lowers the variance, and takes samples of any shape with
  ``exact_divergence``, and float64. log p is float64, and ``enable_grad`` gives it a gradient.

:func:`fm_fast.sample` and :func:`fm_fast.log_likelihood` have guidance, several probes with standard errors, and more solvers.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fm_fast import _checks
from fm_fast._solver.ode import Stops, solve_ode
from fm_fast._solver.prior import check_density
from fm_fast.compat._methods import MAX_STEPS, accuracy_of, method_named, stops_at, times_of
from fm_fast.compat._options import number
from fm_fast.compat.flow_matching.solver.solver import Solver
from fm_fast.likelihood import log_likelihood
from fm_fast.solvers import EmbeddedRungeKutta, Table

__all__ = ["ODESolver"]

FORWARD, BACKWARD = torch.tensor([0.0, 1.0], device="cpu"), torch.tensor([1.0, 0.0], device="cpu")


class ODESolver(Solver):
    """Solves dx/dt = velocity_model(x=x, t=t, **extras), t without dimensions."""

    def __init__(self, velocity_model: Callable[..., Tensor]) -> None:
        if not callable(velocity_model):
            raise TypeError(f"velocity_model must be callable as velocity_model(x=x, t=t), got {type(velocity_model).__name__}")
        super().__init__()
        self.velocity_model = velocity_model

    def sample(
        self,
        x_init: Tensor,
        step_size: float | None,
        method: str = "euler",
        atol: float = 1e-5,
        rtol: float = 1e-5,
        time_grid: Tensor = FORWARD,
        return_intermediates: bool = False,
        enable_grad: bool = False,
        **model_extras: Any,
    ) -> Tensor:
        """The state at the last time of ``time_grid``; at all of them, [T, B, ...], with ``return_intermediates``.

        Args:
            x_init: [B, ...], floating, the state at the first time.
            step_size: of fixed steps; None: they are the intervals of time_grid, of which there must then be more than one.
            method: one of torchdiffeq's explicit Runge-Kutta methods, or "tsit5".
            atol, rtol: of adaptive methods.
            time_grid: strictly increasing or decreasing times.
            enable_grad: record gradients.
            model_extras: passed on to the model.

        Raises:
            ValueError, TypeError: for any argument out of range or of wrong shape or dtype, naming it.
            RuntimeError: an adaptive method cannot go on.
        """
        _checks.state("x_init", x_init)
        chosen = method_named(method)
        step_size, rtol, atol, time_grid = number(step_size), number(rtol), number(atol), _recorded(time_grid, enable_grad)
        stops = _stops(chosen, method, step_size, time_grid, return_intermediates)
        with torch.set_grad_enabled(enable_grad):
            states = solve_ode(
                lambda t, x: self.velocity_model(x=x, t=t, **model_extras),
                x_init, stops, chosen, accuracy_of(chosen, rtol, atol),
            )  # fmt: skip
        return states if return_intermediates else states[-1]

    def compute_likelihood(
        self,
        x_1: Tensor,
        log_p0: Callable[[Tensor], Tensor],
        step_size: float | None,
        method: str = "euler",
        atol: float = 1e-5,
        rtol: float = 1e-5,
        time_grid: Tensor = BACKWARD,
        return_intermediates: bool = False,
        exact_divergence: bool = False,
        enable_grad: bool = False,
        **model_extras: Any,
    ) -> tuple[Tensor, Tensor]:
        """(x_0, log p(x_1)): the state at time 0, and the log-density [B] in nats.

        Args:
            x_1: data [B, ...], floating.
            log_p0: the log-density [B] of the source.
            step_size, method, atol, rtol, model_extras: as in :meth:`sample`.
            time_grid: strictly decreasing times from 1 to 0.
            return_intermediates: False; the states on the way are those of :meth:`sample` with the same grid.
            exact_divergence: instead of one Rademacher probe.
            enable_grad: log p can be differentiated.

        Raises: as :meth:`sample`, and :func:`fm_fast.log_likelihood`.
        """
        _checks.state("x_1", x_1)
        time_grid = _recorded(time_grid, enable_grad)
        chosen, times = method_named(method), times_of("time_grid", time_grid)
        step_size, rtol, atol = number(step_size), number(rtol), number(atol)
        if return_intermediates:
            raise ValueError("return_intermediates must be False in compute_likelihood; sample with the same time_grid gives the states")
        if times[0] != 1.0 or times[-1] != 0.0:
            raise ValueError(f"time_grid must run from 1 to 0, got {times[0]} to {times[-1]}")
        adaptive = isinstance(chosen, EmbeddedRungeKutta)
        nodes = _stops(chosen, method, step_size, time_grid, False).nodes
        steps = {"rtol": rtol, "atol": atol, "max_steps": MAX_STEPS} if adaptive else {"grid": nodes[::-1].tolist()}
        found = log_likelihood(
            _Timed(self.velocity_model, model_extras), x_1, method=chosen, **steps, kind="exact" if exact_divergence else "rademacher",
            prior=_named(log_p0, len(x_1)), create_graph=enable_grad,
        )  # fmt: skip
        return found.x0.to(x_1.dtype), found.logp


def _named(log_p0: Callable[[Tensor], Tensor], batch: int) -> Callable[[Tensor], Tensor]:
    """The same; errors call it by its name here."""
    if not callable(log_p0):
        raise TypeError(f"log_p0 must be callable as log_p0(x), returning log-densities [B], got {type(log_p0).__name__}")

    def prior(x: Tensor) -> Tensor:
        density = log_p0(x)
        check_density("log_p0", density, batch)
        return density

    return prior


class _Timed(nn.Module):
    """The model as fm_fast calls it, with t [B], of which all are equal."""

    def __init__(self, velocity_model: Callable[..., Tensor], extras: dict[str, Any]) -> None:
        super().__init__()
        self.velocity_model, self.extras = velocity_model, extras

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.velocity_model(x=x, t=(t[0] if len(t) else t.new_zeros(())).to(x.dtype), **self.extras)


def _recorded(time_grid: Tensor, enable_grad: bool) -> Tensor:
    """The same, without its gradient where none is recorded."""
    return time_grid.detach() if isinstance(time_grid, Tensor) and not enable_grad else time_grid


def _stops(
    chosen: Table | EmbeddedRungeKutta, method: str, step_size: float | None, time_grid: Tensor, return_intermediates: bool
) -> Stops:
    times = times_of("time_grid", time_grid)
    wanted: Sequence[int] = range(len(times)) if return_intermediates else (0, len(times) - 1)
    if not isinstance(chosen, EmbeddedRungeKutta):
        if step_size is None and len(times) == 2:
            raise ValueError(f"step_size must be given for the fixed-step method {method!r}, or time_grid hold every step, got two times")
        return stops_at(times, step_size, wanted)
    if step_size is not None:
        warnings.warn(f"step_size has no effect on the adaptive method {method!r}, whose steps follow atol and rtol", stacklevel=3)
    return Stops(times, wanted)
