"""What an adaptive solve keeps to, and what comes of it, whether its steps are those of the batch or of each sample's own."""

from typing import NamedTuple

from torch import Tensor

from fm_fast import _ops
from fm_fast._solver.arithmetic import Arithmetic, Fused, Plain, Tolerance
from fm_fast._solver.derivative import Parts
from fm_fast._solver.settings import Settings
from fm_fast.solvers import EmbeddedRungeKutta


class Rules(NamedTuple):
    """The method, its accuracy and its arithmetic.

    plain: states are computed by plain PyTorch, which gradients follow. mark: samples that cannot go on become NaN, and are no error;
    of each sample's own steps alone.
    """

    method: EmbeddedRungeKutta
    tolerance: Tolerance
    max_steps: int
    backend: str
    plain: bool
    mark: bool = False

    def beginning(self, start: Parts) -> Parts:
        """The start as the model may be given it: not the caller's own memory, unless gradients are to reach that."""
        return start if self.plain else tuple(_ops.native_layout(part).clone() for part in start)

    def arithmetic(self, y: Parts) -> Arithmetic:
        return Plain(y, self.method) if self.plain else Fused(y, self.method, self.backend)


class Solved(NamedTuple):
    """The state at each time; how often the model was called; of samples with steps of their own, how often before each was at its end."""

    states: list[Parts]
    nfe: int
    nfe_of_each: Tensor | None = None


def rules_of(settings: Settings, plain: bool, mark: bool = False) -> Rules:
    """Of a solve by an adaptive method."""
    assert settings.adaptive is not None
    return Rules(settings.adaptive, Tolerance(settings.rtol, settings.atol), settings.max_steps, settings.backend, plain, mark)
