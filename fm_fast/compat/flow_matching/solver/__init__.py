"""``ODESolver``, and ``Solver``, its base."""

from fm_fast.compat.flow_matching.solver.ode_solver import ODESolver
from fm_fast.compat.flow_matching.solver.solver import Solver

__all__ = ["ODESolver", "Solver"]
