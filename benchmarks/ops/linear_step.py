"""linear_step: one update of a fixed-step solver, x <- a x + sum_j c_j k_j, of tensors that are there.

"euler" adds one output of the model, "heun" two, "rk4" four; "guided" is an Euler update of a doubled output [2B, ...] whose halves are
mixed as classifier-free guidance does, u + w (c - u). The state is float32 where the outputs have 16 bits, as in a solve.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.op import Op, Provider, Setting, bytes_of_shape
from benchmarks.points import GPU_SIZES, SIZES, check_close, copying, with_ours
from fm_fast import _ops

GUIDANCE = 3.0
ROWS = {
    "euler": (1.0, 0.1),
    "heun": (1.0, 0.05, 0.05),
    "rk4": (1.0, 0.1 / 6, 0.1 / 3, 0.1 / 3, 0.1 / 6),
    "guided": (1.0, 0.1),
}
TOLERANCE = {torch.float32: 5e-7, torch.bfloat16: 1e-2, torch.float16: 1e-3}


@dataclass(frozen=True)
class Inputs:
    """The state, the model's outputs and the update's coefficients."""

    x: Tensor
    outputs: list[Tensor]
    row: tuple[float, ...]

    @property
    def guided(self) -> bool:
        return len(self.outputs[0]) != len(self.x)


Step = Callable[[], Tensor]


def inputs(setting: Setting) -> Inputs:
    batch, row = setting.shape[0], ROWS[setting.mode]
    shape = (2 * batch, *setting.shape[1:]) if setting.mode == "guided" else setting.shape
    x, *outputs = (torch.randn(s, device=setting.device) for s in (setting.shape, *[shape] * (len(row) - 1)))
    return Inputs(x, [output.to(setting.dtype) for output in outputs], row)


def _formula(x: Tensor, *outputs: Tensor, row: tuple[float, ...], guided: bool) -> Tensor:
    for output, coefficient in zip(outputs, row[1:], strict=True):
        if guided:
            conditional, unconditional = output.chunk(2)
            output = unconditional + GUIDANCE * (conditional - unconditional)
        x = x + coefficient * output
    return x


def _naive(given: Inputs, setting: Setting) -> Step:
    return lambda: _formula(given.x, *given.outputs, row=given.row, guided=given.guided)


def _compiled(given: Inputs, setting: Setting) -> Step:
    function = torch.compile(_formula, dynamic=False)
    return lambda: function(given.x, *given.outputs, row=given.row, guided=given.guided)


def _best(given: Inputs, setting: Setting) -> Step:
    """The fewest eager operations: one a term, into memory that is there."""
    out, (first, *others) = torch.empty_like(given.x), given.outputs

    def step() -> Tensor:
        if given.guided:
            conditional, unconditional = first.chunk(2)
            torch.lerp(unconditional, conditional, GUIDANCE, out=out)
            return torch.add(given.x, out, alpha=given.row[1], out=out)
        torch.add(given.x, first, alpha=given.row[1], out=out)
        for output, coefficient in zip(others, given.row[2:], strict=True):
            out.add_(output, alpha=coefficient)
        return out

    return step


def _ours(backend: str) -> Callable[[Inputs, Setting], Step]:
    def build(given: Inputs, setting: Setting) -> Step:
        op, out, no_copy = _ops.linear_step(backend), torch.empty_like(given.x), given.x.new_empty(0)
        table = torch.tensor([given.row], dtype=torch.float64, device=setting.device)

        def step() -> Tensor:
            op(out, no_copy, given.x, given.outputs, table, 0, GUIDANCE)
            return out

        return step

    return build


def providers(setting: Setting) -> list[Provider]:
    others = {"naive eager": _naive, "best eager": _best, "torch.compile": _compiled}
    return with_ours(setting, "linear_step", _ours, others, copying(bytes_moved))


def check(given: Inputs, setting: Setting, step: Step) -> None:
    """The new state against float64."""
    exact = _formula(given.x.double(), *(k.double() for k in given.outputs), row=given.row, guided=given.guided)
    check_close("the state", step(), exact, TOLERANCE[setting.dtype])


def bytes_moved(setting: Setting) -> int:
    """x and every output read, the new x written."""
    outputs = 2 if setting.mode == "guided" else len(ROWS[setting.mode]) - 1
    return 2 * math.prod(setting.shape) * torch.float32.itemsize + outputs * bytes_of_shape(setting)


OP = Op("linear_step", SIZES, tuple(ROWS), inputs, providers, check, bytes_moved, tensor_bytes=bytes_of_shape, gpu_sizes=GPU_SIZES)
