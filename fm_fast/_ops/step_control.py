"""Op ``step_control``: whether the steps of samples count, and how their next ones go."""

from collections.abc import Callable

from torch import Tensor

from fm_fast import reference
from fm_fast._ops import schemas

_step_control = schemas.op("step_control")


def step_control(backend: str) -> Callable[..., None]:
    """Op ``step_control`` itself: (numbers, counts, totals, accepted, times, factors, means, stops, nodes, order, evaluations) -> None.

    Writes what :func:`fm_fast.reference.step_control` returns into the first six tensors, but adds to ``totals``, so that nothing has to
    clear them; numbers and counts are read before. accepted: uint8 [B]. factors: float32 or float64.
    """
    return _plain_step_control if backend == "reference" else _step_control[backend]


def _plain_step_control(
    numbers: Tensor, counts: Tensor, totals: Tensor, accepted: Tensor, times: Tensor, factors: Tensor,
    means: Tensor, stops: Tensor, nodes: Tensor, order: int, evaluations: int,
) -> None:  # fmt: skip
    found = reference.step_control(numbers, counts, means, stops, nodes, order, evaluations)
    for kept, new in ((numbers, found.numbers), (counts, found.counts), (accepted, found.accepted), (times, found.times)):
        kept.copy_(new)
    factors.copy_(found.factors)
    totals.add_(found.totals)
