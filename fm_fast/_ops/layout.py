"""Memory layouts as kernels address them."""

import itertools

import torch
from torch import Tensor

from fm_fast import _modes


def memory_format(x: Tensor) -> torch.memory_format:
    """channels_last for images and volumes that lie so, else contiguous; under torch.func's transforms, which do not tell, contiguous."""
    if _modes.function_transforms_active():
        return torch.contiguous_format
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if x.dim() in formats and not x.is_contiguous() and x.is_contiguous(memory_format=formats[x.dim()]):
        return formats[x.dim()]
    return torch.contiguous_format


def native_layout(x: Tensor) -> Tensor:
    """x itself where its memory is (batch stride, channel stride, position stride), as contiguous and channels_last are; else a copy."""
    if x.dim() <= 3 or x.is_contiguous():
        return x
    dims = [(size, stride) for size, stride in zip(x.shape[2:], x.stride()[2:], strict=True) if size != 1]
    collapses = all(outer == size * inner for (_, outer), (size, inner) in itertools.pairwise(dims))
    return x if collapses else x.contiguous()
