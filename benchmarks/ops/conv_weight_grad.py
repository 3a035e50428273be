"""conv_weight_grad: the gradients of the weight and the bias of a convolution of the U-Net, which keeps height and width.

Our layers use it where it is faster than PyTorch's own: on CPUs with AVX2 or AVX-512. Sizes are (batch, inputs, outputs, side).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.op import Op, Provider, Setting
from benchmarks.points import check_close, our_backends
from fm_fast import _ops

SIZES = {"32x32": (64, 64, 64, 32), "32x32, decoder": (64, 96, 32, 32), "16x16": (64, 128, 64, 16), "8x8": (64, 128, 128, 8)}
MODES = {"3x3": 3, "1x1": 1}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}

Step = Callable[[], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Inputs:
    """The gradient of y, x, and a weight for its shape."""

    grad_y: Tensor
    x: Tensor
    weight: Tensor

    def to(self, layout: torch.memory_format) -> "Inputs":
        return Inputs(self.grad_y.contiguous(memory_format=layout), self.x.contiguous(memory_format=layout), self.weight)


def inputs(setting: Setting) -> Inputs:
    batch, inputs, outputs, side = setting.shape
    size = MODES[setting.mode]
    x, grad_y = (torch.randn(batch, channels, side, side, dtype=setting.dtype) for channels in (inputs, outputs))
    return Inputs(grad_y, x, torch.randn(outputs, inputs, size, size, dtype=setting.dtype)).to(torch.channels_last)


def _ours(backend: str) -> Callable[[Inputs, Setting], Step]:
    def build(given: Inputs, setting: Setting) -> Step:
        return lambda: _ops.conv_weight_grad(given.grad_y, given.x, given.weight, True, backend)  # type: ignore[return-value]

    return build


def _torchs(layout: torch.memory_format) -> Callable[[Inputs, Setting], Step]:
    def build(given: Inputs, setting: Setting) -> Step:
        placed = given.to(layout)
        return lambda: _formula(placed)

    return build


def _formula(given: Inputs) -> tuple[Tensor, Tensor]:
    """PyTorch's operation."""
    padding, outputs, wanted = (given.weight.shape[2] // 2,) * 2, [given.weight.shape[0]], (False, True, True)
    _, weight, bias = torch.ops.aten.convolution_backward(
        given.grad_y, given.x, given.weight, outputs, (1, 1), padding, (1, 1), False, (0, 0), 1, wanted
    )
    return weight, bias


def _matmul(given: Inputs, setting: Setting) -> Step:
    """As matrices: every tap of every position written out."""
    size = MODES[setting.mode]

    def step() -> tuple[Tensor, Tensor]:
        columns = torch.nn.functional.unfold(given.x, size, padding=size // 2)
        gradient = given.grad_y.flatten(2)
        return torch.einsum("bop,bkp->ok", gradient, columns).reshape(given.weight.shape), gradient.sum((0, 2))

    return step


def providers(setting: Setting) -> list[Provider]:
    known = setting.mode == "3x3" or setting.dtype == torch.float32
    ours = our_backends(setting, "conv_weight_grad") if known else ["reference"]
    return [
        *(Provider(f"fm_fast {name}", _ours(name)) for name in ours),
        Provider("torch, channels_last", _torchs(torch.channels_last)),
        Provider("torch, NCHW", _torchs(torch.contiguous_format)),
        Provider("unfold, matmul", _matmul),
    ]


def check(given: Inputs, setting: Setting, step: Step) -> None:
    """Both gradients against float64."""
    exact = _formula(Inputs(given.grad_y.double(), given.x.double(), given.weight.double()))
    for name, value, wanted in zip(("weight", "bias"), step(), exact, strict=True):
        check_close(f"the gradient of the {name}", value, wanted, TOLERANCE[setting.dtype])


def tensor_bytes(setting: Setting) -> int:
    """Of x."""
    batch, inputs, _, side = setting.shape
    return batch * inputs * side * side * setting.dtype.itemsize


OP = Op("conv_weight_grad", SIZES, tuple(MODES), inputs, providers, check, devices=("cpu",), tensor_bytes=tensor_bytes, rounds=40)
