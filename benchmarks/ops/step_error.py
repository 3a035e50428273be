"""step_error: how large the error of an adaptive step is beside what is tolerated, of tensors that are there.

Of each sample the mean of (e / (atol + rtol max(|y|, |end|)))^2 for the error e = sum_j c_j k_j. Modes are methods, whose errors have as
many terms: dopri5 six, bosh3 four. The state is float32 where the slopes have 16 bits.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.op import Op, Provider, Setting, bytes_of_shape
from benchmarks.points import GPU_SIZES, SIZES, check_close, copying, with_ours
from fm_fast import _ops
from fm_fast.solvers import BOSH3, DOPRI5

RTOL, ATOL, STEP = 1e-3, 1e-3, 0.1
ERRORS = {
    name: tuple(STEP * weight for weight in method.error if weight != 0.0) for name, method in {"dopri5": DOPRI5, "bosh3": BOSH3}.items()
}


@dataclass(frozen=True)
class Inputs:
    """Both ends of a step, its slopes and the coefficients of its error."""

    y: Tensor
    end: Tensor
    slopes: list[Tensor]
    row: tuple[float, ...]


Norm = Callable[[], Tensor]


def inputs(setting: Setting) -> Inputs:
    y, end, *slopes = (torch.randn(setting.shape, device=setting.device) for _ in range(2 + len(ERRORS[setting.mode])))
    return Inputs(y, end, [slope.to(setting.dtype) for slope in slopes], ERRORS[setting.mode])


def _formula(y: Tensor, end: Tensor, *slopes: Tensor, row: tuple[float, ...]) -> Tensor:
    error = sum(coefficient * slope.to(y.dtype) for coefficient, slope in zip(row, slopes, strict=True))
    ratio = error / (ATOL + RTOL * torch.max(y.abs(), end.abs()))
    return ratio.square().flatten(1).mean(1)


def _naive(given: Inputs, setting: Setting) -> Norm:
    return lambda: _formula(given.y, given.end, *given.slopes, row=given.row)


def _compiled(given: Inputs, setting: Setting) -> Norm:
    function = torch.compile(_formula, dynamic=False)
    return lambda: function(given.y, given.end, *given.slopes, row=given.row)


def _best(given: Inputs, setting: Setting) -> Norm:
    """The fewest eager operations, into memory that is there."""
    size, error = torch.empty_like(given.y), torch.empty_like(given.y)

    def norm() -> Tensor:
        error.copy_(given.slopes[0]).mul_(given.row[0])
        for slope, coefficient in zip(given.slopes[1:], given.row[1:], strict=True):
            error.add_(slope, alpha=coefficient)
        torch.maximum(torch.abs(given.y, out=size), given.end.abs(), out=size)
        ratio = error.div_(size.mul_(RTOL).add_(ATOL)).flatten(1)
        return torch.linalg.vecdot(ratio, ratio).div_(ratio.shape[1])

    return norm


def _ours(backend: str) -> Callable[[Inputs, Setting], Norm]:
    def build(given: Inputs, setting: Setting) -> Norm:
        op, means = _ops.step_error(backend), given.y.new_empty(setting.shape[0], dtype=torch.float64)
        coefficients = torch.tensor(given.row, dtype=torch.float64, device=setting.device)

        def norm() -> Tensor:
            op(means, given.y, given.end, given.slopes, coefficients, RTOL, ATOL)
            return means

        return norm

    return build


def providers(setting: Setting) -> list[Provider]:
    others = {"naive eager": _naive, "best eager": _best, "torch.compile": _compiled}
    return with_ours(setting, "step_error", _ours, others, copying(bytes_moved))


def check(given: Inputs, setting: Setting, norm: Norm) -> None:
    """The means against float64."""
    exact = _formula(given.y.double(), given.end.double(), *(slope.double() for slope in given.slopes), row=given.row)
    check_close("the norm", norm(), exact, 1e-5)


def bytes_moved(setting: Setting) -> int:
    """Both ends and every slope read, one number a sample written."""
    ends = 2 * math.prod(setting.shape) * torch.float32.itemsize
    return ends + len(ERRORS[setting.mode]) * bytes_of_shape(setting) + 8 * setting.shape[0]


OP = Op("step_error", SIZES, tuple(ERRORS), inputs, providers, check, bytes_moved, tensor_bytes=bytes_of_shape, gpu_sizes=GPU_SIZES)
