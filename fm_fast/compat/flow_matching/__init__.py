"""The call surface of facebookresearch/flow_matching, under its own module names: ``path``, ``path.scheduler``, ``solver`` and ``utils``.

::

    from fm_fast.compat.flow_matching.path import CondOTProbPath      # was: from flow_matching.path import ...
    from fm_fast.compat.flow_matching.solver import ODESolver

Discrete paths and manifolds are not covered.
"""

from fm_fast.compat.flow_matching import path, solver, utils

__all__ = ["path", "solver", "utils"]
