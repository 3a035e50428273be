"""Fixed-step solvers as tables: explicit Runge-Kutta methods by their Butcher tableau, and Adams-Bashforth methods.

A table is a frozen value object, and its order is computed from it, not claimed. Every table runs through the same loop and the same
fused op, so a table of your own (``RungeKutta(a=..., b=...)``) is as fast as the named ones.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from fm_fast import _checks

HIGHEST_CHECKED_ORDER = 4
TOLERANCE = 1e-10


@dataclass(frozen=True)
class RungeKutta:
    """An explicit Runge-Kutta method: stage i is evaluated at x + h sum_j a_ij k_j, and the step ends at x + h sum_i b_i k_i.

    Args:
        a: one row a stage, row i holding the i weights of the stages before it: ``((), (0.5,))`` for midpoint.
        b: one weight a stage; they sum to 1.

    Stage times are c_i = sum_j a_ij. Raises ValueError for rows of the wrong length, numbers that are not finite, and weights that
    do not sum to 1.

    Source: Hairer, Nørsett and Wanner, Solving Ordinary Differential Equations I, chapter II.1, where the named ones stand too (Ralston's:
    Ralston, 1962).
    """

    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "a", _numbers("a", self.a, rows=True))
        object.__setattr__(self, "b", _numbers("b", self.b))
        lengths = [len(row) for row in self.a]
        if lengths != list(range(len(self.b))) or not self.b:
            raise ValueError(f"a must have one row a weight of b, row i with i numbers, got rows of {lengths} for {len(self.b)} weights")
        if not np.isfinite(sum(self.c)):
            raise ValueError(f"a must be finite, got {self.a}")
        if not abs(sum(self.b) - 1.0) < TOLERANCE:
            raise ValueError(f"b must sum to 1, got {sum(self.b)}")

    @property
    def stages(self) -> int:
        return len(self.b)

    @property
    def c(self) -> tuple[float, ...]:
        return tuple(sum(row) for row in self.a)

    def order(self) -> int:
        """The order of convergence, from the order conditions (Butcher's rooted trees); at most 4 is told."""
        matrix, b, c = self.matrix(), np.array(self.b), np.array(self.c)
        ac = matrix @ c
        conditions = {
            2: [(b @ c, 1 / 2)],
            3: [(b @ c**2, 1 / 3), (b @ ac, 1 / 6)],
            4: [(b @ c**3, 1 / 4), ((b * c) @ ac, 1 / 8), (b @ (matrix @ c**2), 1 / 12), (b @ (matrix @ ac), 1 / 24)],
        }
        order = 1
        while order < HIGHEST_CHECKED_ORDER and all(abs(value - wanted) < TOLERANCE for value, wanted in conditions[order + 1]):
            order += 1
        return order

    def matrix(self) -> np.ndarray:
        """a as a full strictly lower triangular matrix, float64 [stages, stages]."""
        full = np.zeros((self.stages, self.stages))
        for i, row in enumerate(self.a):
            full[i, :i] = row
        return full


def _numbers(name: str, values: Any, rows: bool = False) -> tuple[Any, ...]:
    """Numbers, or rows of numbers, as tuples of floats."""
    try:
        return tuple(tuple(float(value) for value in row) for row in values) if rows else tuple(float(value) for value in values)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a sequence of {'rows of ' if rows else ''}numbers, got {values!r}") from None


@dataclass(frozen=True)
class AdamsBashforth:
    """A multistep method of one evaluation a step: the polynomial through the last ``history`` velocities, integrated over the step.

    Steps of unequal length have exact weights too. The first history - 1 steps are those of the Runge-Kutta method ``start``.

    Source: Hairer, Nørsett and Wanner, Solving Ordinary Differential Equations I, chapters III.1 and III.5.
    """

    history: int
    start: RungeKutta

    def __post_init__(self) -> None:
        _checks.count("history", self.history)
        if not isinstance(self.start, RungeKutta):
            raise TypeError(f"start must be a RungeKutta table, got {type(self.start).__name__}")
        if self.history < 2:
            raise ValueError(f"history must be at least 2, got {self.history}")
        if self.start.order() < min(self.history - 1, HIGHEST_CHECKED_ORDER):
            raise ValueError(f"start must be at least of order {self.history - 1}, got order {self.start.order()}")

    def order(self) -> int:
        return self.history

    def weights(self, times: np.ndarray, end: np.ndarray) -> np.ndarray:
        """Weights [steps, history] of the velocities at times [steps, history], newest first, in the integral from newest to ``end``."""
        newest = times[:, :1]
        scaled = (times - newest) / (end[:, None] - newest)
        powers = np.arange(self.history)
        # The rule is exact for u^0 .. u^(history-1): integrals 1 / (m + 1) over a step of length 1.
        vandermonde = scaled[:, None, :] ** powers[None, :, None]
        moments = np.broadcast_to(1.0 / (powers + 1.0), (len(times), self.history))
        return np.linalg.solve(vandermonde, moments[..., None])[..., 0] * (end[:, None] - newest)


Table = RungeKutta | AdamsBashforth

MIDPOINT = RungeKutta(((), (1 / 2,)), (0.0, 1.0))
KUTTA3 = RungeKutta(((), (1 / 2,), (-1.0, 2.0)), (1 / 6, 2 / 3, 1 / 6))
METHODS: dict[str, Table] = {
    "euler": RungeKutta(((),), (1.0,)),
    "midpoint": MIDPOINT,
    "heun2": RungeKutta(((), (1.0,)), (1 / 2, 1 / 2)),
    "ralston": RungeKutta(((), (2 / 3,)), (1 / 4, 3 / 4)),
    "rk4": RungeKutta(((), (1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6)),
    "rk4_38": RungeKutta(((), (1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)), (1 / 8, 3 / 8, 3 / 8, 1 / 8)),
    "ab2": AdamsBashforth(2, MIDPOINT),
    "ab3": AdamsBashforth(3, KUTTA3),
}
# Adaptive methods, run by torchdiffeq.
ADAPTIVE = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")


def is_adaptive(method: Any) -> bool:
    return isinstance(method, str) and method in ADAPTIVE


def as_table(method: str | Table) -> Table:
    """The table that a name or a table stands for; anything else is an error that lists the names."""
    if isinstance(method, (RungeKutta, AdamsBashforth)):
        return method
    if isinstance(method, str) and method in METHODS:
        return METHODS[method]
    raise ValueError(f"method must be one of {', '.join((*METHODS, *ADAPTIVE))}, or a solver table, got {method!r}")
