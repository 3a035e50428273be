"""Where the kernels of convolutions are: what ``conv3x3`` and ``conv_weight_grad`` have in common."""

import torch
from torch import Tensor

from fm_fast import _backends

PLAIN = (Tensor, torch.nn.Parameter)  # not tensors in shards, which raw ops would take for whole
# Instruction sets with which the kernels were measured to be faster than oneDNN's, which PyTorch calls.
FASTER_ON = ("avx2", "avx512")
_ISA = _backends.cpu_isa()


def is_convolved_here(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernels are faster on this CPU and know the layout, dtype and kind of both tensors."""
    if _ISA not in FASTER_ON or x.device.type != "cpu" or not x.dtype == weight.dtype == torch.float32:
        return False
    known = type(x) is Tensor and type(weight) in PLAIN and x.dim() == 4
    return known and x.is_contiguous(memory_format=torch.channels_last)
