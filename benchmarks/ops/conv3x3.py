"""conv3x3: a convolution of the U-Net that keeps height and width, or its gradient of x.

Our layers use it where it is faster than PyTorch's own: on CPUs with AVX2 or AVX-512. Sizes are (batch, inputs, outputs, side).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.op import Op, Provider, Setting
from benchmarks.points import check_close, our_backends
from fm_fast import _ops

SIZES = {
    "32x32": (64, 64, 64, 32), "32x32, decoder": (64, 96, 32, 32), "16x16": (64, 128, 64, 16), "8x8": (64, 128, 128, 8),
    "8x8, batch 4": (4, 128, 128, 8),
}  # fmt: skip
MODES = ("forward", "gradient of x")
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}

Step = Callable[[], Tensor]


@dataclass(frozen=True)
class Inputs:
    """What is convolved, [B, C, H, W], and a weight for it; transposed: as in the gradient of x."""

    x: Tensor
    weight: Tensor
    transposed: bool

    def to(self, layout: torch.memory_format) -> "Inputs":
        return Inputs(self.x.contiguous(memory_format=layout), self.weight.contiguous(memory_format=layout), self.transposed)


def inputs(setting: Setting) -> Inputs:
    batch, inputs, outputs, side = setting.shape
    transposed = setting.mode == MODES[1]
    x = torch.randn(batch, outputs if transposed else inputs, side, side, dtype=setting.dtype)
    return Inputs(x, torch.randn(outputs, inputs, 3, 3, dtype=setting.dtype), transposed).to(torch.channels_last)


def _ours(backend: str) -> Callable[[Inputs, Setting], Step]:
    return lambda given, setting: lambda: _ops.conv3x3(given.x, given.weight, None, backend, given.transposed)


def _torchs(layout: torch.memory_format) -> Callable[[Inputs, Setting], Step]:
    def build(given: Inputs, setting: Setting) -> Step:
        placed = given.to(layout)
        return _gradient(placed) if given.transposed else lambda: F.conv2d(placed.x, placed.weight, padding=1)

    return build


def _gradient(given: Inputs) -> Step:
    """As a backward pass computes it, which looks at the layout of the forward pass's input."""
    batch, _, height, width = given.x.shape
    x, wanted = given.x.new_empty(batch, given.weight.shape[1], height, width), (True, False, False)
    x = x.contiguous(memory_format=_layout(given.x))
    settings = ((1, 1), (1, 1), (1, 1), False, (0, 0), 1)
    return lambda: torch.ops.aten.convolution_backward(given.x, x, given.weight, None, *settings, wanted)[0]


def _layout(x: Tensor) -> torch.memory_format:
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format


def _matmul(given: Inputs, setting: Setting) -> Step:
    """As one matrix product of every tap of every position written out."""
    weight = given.weight.flip(2, 3).transpose(0, 1) if given.transposed else given.weight
    matrix = weight.flatten(1)
    return lambda: (matrix @ F.unfold(given.x, 3, padding=1)).unflatten(2, given.x.shape[2:])


def providers(setting: Setting) -> list[Provider]:
    return [
        *(Provider(f"fm_fast {name}", _ours(name)) for name in our_backends(setting, "conv3x3")),
        Provider("torch, channels_last", _torchs(torch.channels_last)),
        Provider("torch, NCHW", _torchs(torch.contiguous_format)),
        Provider("unfold, matmul", _matmul),
    ]


def check(given: Inputs, setting: Setting, step: Step) -> None:
    """Against float64."""
    convolve = F.conv_transpose2d if given.transposed else F.conv2d
    check_close("y", step(), convolve(given.x.double(), given.weight.double(), padding=1), TOLERANCE[setting.dtype])


def tensor_bytes(setting: Setting) -> int:
    """Of x."""
    batch, inputs, _, side = setting.shape
    return batch * inputs * side * side * setting.dtype.itemsize


OP = Op("conv3x3", SIZES, MODES, inputs, providers, check, devices=("cpu",), tensor_bytes=tensor_bytes, rounds=40)
