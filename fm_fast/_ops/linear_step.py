"""Op ``linear_step``: every update of a fixed-step solver, and the mix of guidance."""

from collections.abc import Callable, Sequence

from torch import Tensor

from fm_fast import reference
from fm_fast._ops import schemas

_linear_step = schemas.op("linear_step")


def linear_step(backend: str) -> Callable[..., None]:
    """Op ``linear_step`` itself, for loops without gradients.

    It is called as (out, copy, x, outputs, table, row, guidance, kept=None) -> None, and writes
    table[row, 0] x + sum_j table[row, 1 + j] m(outputs[j]) into out, which may be x, and once or twice into copy where it is not empty;
    see :func:`fm_fast.reference.linear_step`. ``kept`` gets the last output, of x's shape, as it came.
    """
    return _plain_linear_step if backend == "reference" else _linear_step[backend]


def _plain_linear_step(
    out: Tensor,
    copy: Tensor,
    x: Tensor,
    outputs: Sequence[Tensor],
    table: Tensor,
    row: int,
    guidance: float,
    kept: Tensor | None = None,
) -> None:
    if kept is not None:  # before out, which may be an output, is written
        kept.copy_(outputs[-1])
    wide = reference.accumulation_dtype(x, out)
    # Scalars on the device, so that nothing waits for it.
    first, *others = table[row].to(wide).unbind()
    result = x.to(wide) * first
    for output, coefficient in zip(outputs, others, strict=True):
        result = result + coefficient * reference.mixed(output.to(wide), x, guidance)
    out.copy_(result)
    for half in copy.split(x.shape[0]) if copy.numel() else ():
        half.copy_(result)
