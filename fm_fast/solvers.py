"""Solvers as tables: Runge-Kutta methods by their Butcher tableau, with or without an estimate of the error, and Adams-Bashforth methods.

A table is a frozen value object, and its order is computed from it, not claimed. Every table runs through the same loop and the same
fused op, so a table of your own (``RungeKutta(a=..., b=...)``) is as fast as the named ones.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from fm_fast import _checks

HIGHEST_CHECKED_ORDER = 4
PARTS_CHECKED = (0.25, 0.5, 0.75)  # of a step, for states within it
TOLERANCE = 1e-10
ROUNDED = 1e-14  # from 1: by the rounding of a row's weights
# Of the way through a step: a number, or one a sample
Part = TypeVar("Part", float, Tensor)


@dataclass(frozen=True)
class RungeKutta:
    """An explicit Runge-Kutta method: stage i is evaluated at x + h sum_j a_ij k_j, and the step ends at x + h sum_i b_i k_i.

    Args:
        a: one row a stage, row i holding the i weights of the stages before it: ``((), (0.5,))`` for midpoint.
        b: one weight a stage; they sum to 1.

    Stage times are c_i = sum_j a_ij; one outside of the range in which the path's velocity is finite is moved to its end.

    Raises ValueError for rows of the wrong length, numbers that are not finite, and weights that do not sum to 1.

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
        """The stages' times."""
        return tuple(map(_node, self.a))

    def order(self) -> int:
        """The order of convergence, from the order conditions (Butcher's rooted trees); at most 4 is told."""
        return self.order_within(1.0, self.b)

    def order_within(self, theta: float, weights: Sequence[float]) -> int:
        """The same of the state y + h sum_i weights_i k_i, a part theta of the way through a step; 0 where their sum is another."""
        matrix, w, c = self.matrix(), np.array(weights), np.array(self.c)
        ac = matrix @ c
        conditions = {
            1: [(w.sum(), 1)],
            2: [(w @ c, 1 / 2)],
            3: [(w @ c**2, 1 / 3), (w @ ac, 1 / 6)],
            4: [(w @ c**3, 1 / 4), ((w * c) @ ac, 1 / 8), (w @ (matrix @ c**2), 1 / 12), (w @ (matrix @ ac), 1 / 24)],
        }
        order = 0
        while order < HIGHEST_CHECKED_ORDER and all(
            abs(value - wanted * theta ** (order + 1)) < TOLERANCE for value, wanted in conditions[order + 1]
        ):
            order += 1
        return order

    def matrix(self) -> np.ndarray:
        """a as a full strictly lower triangular matrix, float64 [stages, stages]."""
        full = np.zeros((self.stages, self.stages))
        for i, row in enumerate(self.a):
            full[i, :i] = row
        return full


def _node(weights: Sequence[float]) -> float:
    """Their sum, which Python's versions add in different ways; at the step's end exactly where that is meant."""
    try:
        node = math.fsum(weights)
    except (OverflowError, ValueError):  # an infinite sum, or one of both infinities
        return math.inf
    return 1.0 if abs(node - 1.0) < ROUNDED else node


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
        least = min(self.history - 1, HIGHEST_CHECKED_ORDER)
        if self.start.order() < least:
            raise ValueError(f"start must be at least of order {least}, got order {self.start.order()}")

    def order(self) -> int:
        """That of the polynomial; or, where they are less accurate, of the first steps' errors, which stay, as far as their table tells."""
        return min(self.history, self.start.order() + 1)

    def weights(self, times: np.ndarray, end: np.ndarray) -> np.ndarray:
        """Weights [steps, history] of the velocities at times [steps, history], newest first, in the integral from newest to ``end``."""
        newest = times[:, :1]
        scaled = (times - newest) / (end[:, None] - newest)
        powers = np.arange(self.history, dtype=np.float64)
        # The rule is exact for u^0 .. u^(history-1): integrals 1 / (m + 1) over a step of length 1.
        vandermonde = scaled[:, None, :] ** powers[None, :, None]
        moments = np.broadcast_to(1.0 / (powers + 1.0), (len(times), self.history))
        return np.linalg.solve(vandermonde, moments[..., None])[..., 0] * (end[:, None] - newest)


@dataclass(frozen=True)
class EmbeddedRungeKutta:
    """A Runge-Kutta method that knows the error of its step, h sum_i error_i k_i: steps are then as long as a tolerance allows.

    Args:
        table: the method that the solve goes on with. Where the last row of its a is its b, the last stage is the first of the next step.
        error: one weight a stage: b less the weights of a method of another order. They sum to 0.
        order: of the table, by whose root the length of steps is controlled; beyond 4, which is as far as a table tells, taken as given.
        name: for messages.
        dense: weights d of h theta^2 (1 - theta)^2 sum_i d_i k_i, the term that makes the cubic through both ends of a step a quartic of
            order 4: it gives the states within the step, at t + theta h, without an evaluation. Without it methods of order 4 and more,
            and of order 3 with no stage at the step's end, split a step where a state is asked for.

    Raises ValueError for weights of the wrong number, sum or order, and an order that is not the table's.

    Source: Hairer, Nørsett and Wanner, Solving Ordinary Differential Equations I, chapter II.4.
    """

    table: RungeKutta
    error: tuple[float, ...]
    order: int
    name: str = "the embedded method"
    dense: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.table, RungeKutta):
            raise TypeError(f"table must be a RungeKutta table, got {type(self.table).__name__}")
        object.__setattr__(self, "error", _numbers("error", self.error))
        if len(self.error) != self.table.stages or not any(self.error):
            raise ValueError(f"error must have one weight a stage, {self.table.stages}, not all 0, got {self.error}")
        if not abs(sum(self.error)) < TOLERANCE:
            raise ValueError(f"error must sum to 0, got {sum(self.error)}")
        _checks.count("order", self.order)
        known = self.table.order()
        if self.order < known or (self.order > known and known < HIGHEST_CHECKED_ORDER):
            raise ValueError(f"order must be that of the table, {known}, got {self.order}")
        object.__setattr__(self, "dense", _numbers("dense", self.dense))
        if self.dense and not (self.first_same_as_last and len(self.dense) == self.table.stages and abs(sum(self.dense)) < TOLERANCE):
            raise ValueError(
                f"dense must hold {self.table.stages} weights that sum to 0, of a method with a stage at the end, got {self.dense}"
            )
        self._check_order_within()

    def _check_order_within(self) -> None:
        """With ``dense``, states within a step are of the order that the step itself has in the mean: one less, and no more than 4."""
        wanted = min(self.order - 1, HIGHEST_CHECKED_ORDER)
        found = min(self.table.order_within(theta, self.weights_within(theta)) for theta in PARTS_CHECKED) if self.dense else wanted
        if found < wanted:
            raise ValueError(f"dense must give states of order {wanted} within a step, got order {found}")

    @property
    def interpolates(self) -> bool:
        """Whether states within a step cost no evaluation; their order is that of the step, or one less with ``dense``."""
        return bool(self.dense) or self.order <= (3 if self.first_same_as_last else 2)

    def weights_within(self, theta: Part) -> tuple[Part, ...]:
        """Weights w of the state y + h sum_i w_i k_i a part theta of the way through a step, for a method that interpolates.

        Hermite's cubic through values and slopes of both ends, and ``dense`` beside it; without a slope at the end the parabola.

        Source: Hairer, Nørsett and Wanner, Solving Ordinary Differential Equations I, chapter II.6.
        """
        first, last, rest = theta * (1.0 - theta), 0.0 * theta, theta**2
        if self.first_same_as_last:
            first, last, rest = theta * (1.0 - theta) ** 2, theta**2 * (theta - 1.0), theta**2 * (3.0 - 2.0 * theta)
        weights = [rest * b for b in self.table.b]
        weights[0] += first
        weights[-1] += last
        bend = (theta * (1.0 - theta)) ** 2
        return tuple(w + bend * d for w, d in zip(weights, self.dense or (0.0,) * len(weights), strict=True))

    @property
    def first_same_as_last(self) -> bool:
        """Whether the last stage is evaluated at the step's end."""
        return self.table.b == (*self.table.a[-1], 0.0)


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


def _embedded(
    name: str, order: int, a: Sequence[Sequence[float]], b: Sequence[float], error: Sequence[float], dense: Sequence[float] = ()
) -> EmbeddedRungeKutta:
    return EmbeddedRungeKutta(RungeKutta(tuple(map(tuple, a)), tuple(b)), tuple(error), order, name, tuple(dense))


def _going_on(
    name: str, order: int, a: Sequence[Sequence[float]], error: Sequence[float], dense: Sequence[float] = ()
) -> EmbeddedRungeKutta:
    """Of methods whose last stage is at the step's end."""
    return _embedded(name, order, a, (*a[-1], 0.0), error, dense)


# Dormand and Prince (1980); the error is Shampine's (1986), two thirds of theirs. Between the ends as in Hairer's program of the same name.
DOPRI5 = _going_on(
    "dopri5", 5,
    [
        [],
        [1 / 5],
        [3 / 40, 9 / 40],
        [44 / 45, -56 / 15, 32 / 9],
        [19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729],
        [9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656],
        [35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84],
    ],
    [2 / 3 * weight for weight in (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)],
    [-12715105075 / 11282082432, 0.0, 87487479700 / 32700410799, -10690763975 / 1880347072, 701980252875 / 199316789632,
     -1453857185 / 822651844, 69997945 / 29380423],
)  # fmt: skip
# Tsitouras (2011).
TSIT5 = _going_on(
    "tsit5", 5,
    [
        [],
        [0.161],
        [-0.008480655492356989, 0.335480655492357],
        [2.8971530571054935, -6.359448489975075, 4.3622954328695815],
        [5.325864828439257, -11.748883564062828, 7.4955393428898365, -0.09249506636175525],
        [5.86145544294642, -12.92096931784711, 8.159367898576159, -0.071584973281401, -0.028269050394068383],
        [0.09646076681806523, 0.01, 0.4798896504144996, 1.379008574103742, -3.290069515436081, 2.324710524099774],
    ],
    [-0.00178001105222577714, -0.0008164344596567469, 0.007880878010261995, -0.1447110071732629, 0.5823571654525552, -0.45808210592918697,
     1 / 66],
    [-1.0530884977290216, 0.1017, 2.490627285651253, -16.548102889244902, 47.37952196281928, -34.87065786149661, 2.5],
)  # fmt: skip
# Bogacki and Shampine (1989).
BOSH3 = _going_on("bosh3", 3, [[], [1 / 2], [0.0, 3 / 4], [2 / 9, 1 / 3, 4 / 9]], [-5 / 72, 1 / 12, 1 / 9, -1 / 8])
# Fehlberg (1969), going on with the higher order. The two orders differ by 1/512 of a step's change, so the estimate is tens to hundreds of
# times smaller than the error.
FEHLBERG2 = _embedded("fehlberg2", 2, [[], [1 / 2], [1 / 256, 255 / 256]], [1 / 512, 255 / 256, 1 / 512], [-1 / 512, 0.0, 1 / 512])
ADAPTIVE_HEUN = _embedded("adaptive_heun", 2, [[], [1.0]], [1 / 2, 1 / 2], [1 / 2, -1 / 2])
# Prince and Dormand (1981): RK8(7)13M, with a stage at the step's end.
DOPRI8 = _going_on(
    "dopri8", 8,
    [
        [],
        [1 / 18],
        [1 / 48, 1 / 16],
        [1 / 32, 0.0, 3 / 32],
        [5 / 16, 0.0, -75 / 64, 75 / 64],
        [3 / 80, 0.0, 0.0, 3 / 16, 3 / 20],
        [29443841 / 614563906, 0.0, 0.0, 77736538 / 692538347, -28693883 / 1125000000, 23124283 / 1800000000],
        [16016141 / 946692911, 0.0, 0.0, 61564180 / 158732637, 22789713 / 633445777, 545815736 / 2771057229, -180193667 / 1043307555],
        [39632708 / 573591083, 0.0, 0.0, -433636366 / 683701615, -421739975 / 2616292301, 100302831 / 723423059, 790204164 / 839813087,
         800635310 / 3783071287],
        [246121993 / 1340847787, 0.0, 0.0, -37695042795 / 15268766246, -309121744 / 1061227803, -12992083 / 490766935,
         6005943493 / 2108947869, 393006217 / 1396673457, 123872331 / 1001029789],
        [-1028468189 / 846180014, 0.0, 0.0, 8478235783 / 508512852, 1311729495 / 1432422823, -10304129995 / 1701304382,
         -48777925059 / 3047939560, 15336726248 / 1032824649, -45442868181 / 3398467696, 3065993473 / 597172653],
        [185892177 / 718116043, 0.0, 0.0, -3185094517 / 667107341, -477755414 / 1098053517, -703635378 / 230739211,
         5731566787 / 1027545527, 5232866602 / 850066563, -4093664535 / 808688257, 3962137247 / 1805957418, 65686358 / 487910083],
        [403863854 / 491063109, 0.0, 0.0, -5068492393 / 434740067, -411421997 / 543043805, 652783627 / 914296604,
         11173962825 / 925320556, -13158990841 / 6184727034, 3936647629 / 1978049680, -160528059 / 685178525, 248638103 / 1413531060, 0.0],
        [14005451 / 335480064, 0.0, 0.0, 0.0, 0.0, -59238493 / 1068277825, 181606767 / 758867731, 561292985 / 797845732,
         -1041891430 / 1371343529, 760417239 / 1151165299, 118820643 / 751138087, -528747749 / 2220607170, 1 / 4],
    ],
    [14005451 / 335480064 - 13451932 / 455176623, 0.0, 0.0, 0.0, 0.0, -59238493 / 1068277825 + 808719846 / 976000145,
     181606767 / 758867731 - 1757004468 / 5645159321, 561292985 / 797845732 - 656045339 / 265891186,
     -1041891430 / 1371343529 + 3867574721 / 1518517206, 760417239 / 1151165299 - 465885868 / 322736535,
     118820643 / 751138087 - 53011238 / 667516719, -528747749 / 2220607170 - 2 / 45, 1 / 4, 0.0],
)  # fmt: skip
ADAPTIVE = {method.name: method for method in (DOPRI5, TSIT5, DOPRI8, BOSH3, FEHLBERG2, ADAPTIVE_HEUN)}
Method = str | Table | EmbeddedRungeKutta


def is_adaptive(method: object) -> bool:
    return isinstance(method, EmbeddedRungeKutta) or (isinstance(method, str) and method in ADAPTIVE)


def as_method(method: Method) -> Table | EmbeddedRungeKutta:
    """What a name or a table stands for; anything else is an error that lists the names."""
    if isinstance(method, (RungeKutta, AdamsBashforth, EmbeddedRungeKutta)):
        return method
    if isinstance(method, str) and (method in METHODS or method in ADAPTIVE):
        return METHODS[method] if method in METHODS else ADAPTIVE[method]
    raise ValueError(f"method must be one of {', '.join((*METHODS, *ADAPTIVE))}, or a solver table, got {method!r}")
