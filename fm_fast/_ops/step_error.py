"""Op ``step_error``: how large the error of an adaptive step is beside what is tolerated."""

from collections.abc import Callable, Sequence

from torch import Tensor

from fm_fast import reference
from fm_fast._ops import schemas

_step_error = schemas.op("step_error")


def step_error(backend: str) -> Callable[..., None]:
    """Op ``step_error`` itself, for loops without gradients: (means, y, end, outputs, coefficients, rtol, atol) -> None.

    Writes a mean for each sample into ``means`` float64 [B]; coefficients are float64, one for each of the outputs, on their device. See
    :func:`fm_fast.reference.step_error`.
    """
    return _plain_step_error if backend == "reference" else _step_error[backend]


def _plain_step_error(
    means: Tensor, y: Tensor, end: Tensor, outputs: Sequence[Tensor], coefficients: Tensor, rtol: float, atol: float
) -> None:
    # Scalars on the device, so that nothing waits for it.
    means.copy_(reference.step_error(y, end, outputs, coefficients.unbind(), rtol, atol))
