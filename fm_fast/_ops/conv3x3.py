"""Op ``conv3x3``: where its kernel may run, and its call."""

import torch
from torch import Tensor

from fm_fast import _backends, reference
from fm_fast._ops import schemas
from fm_fast._ops.convolutions import fills_tiles, is_convolved_here
from fm_fast._ops.guard import absent, needs_reference, run

_conv3x3 = schemas.op("conv3x3")

CHANNELS = 16  # the kernel's: those of x and of y must be multiples of it


def conv3x3_backend(x: Tensor, weight: Tensor) -> str:
    """The backend for a convolution of size 3 that keeps height and width.

    The reference where PyTorch's kernel is as fast, or ours does not know the shape, layout, dtype or kind of tensor.
    """
    outputs, inputs, *size = weight.shape
    if outputs % CHANNELS or inputs % CHANNELS or size != [3, 3] or not is_convolved_here(x, weight) or not fills_tiles(x, weight):
        return "reference"
    return _backends.resolve("conv3x3", x.device)


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str, transposed: bool = False) -> Tensor:
    """y [B, O, H, W] in channels_last; ``backend`` is what :func:`conv3x3_backend` says. See :func:`fm_fast.reference.conv3x3`."""
    if needs_reference(backend, x, weight, bias):
        return reference.conv3x3(x, weight, bias, transposed)
    batch, _, height, width = x.shape
    channels = weight.shape[1 if transposed else 0]
    y = torch.empty((batch, channels, height, width), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    run(_conv3x3[backend], y, x, weight, absent(weight) if bias is None else bias, transposed)
    return y
