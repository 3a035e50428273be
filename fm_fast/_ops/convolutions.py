"""Where the kernels of convolutions are: what ``conv3x3`` and ``conv_weight_grad`` have in common."""

import torch
from torch import Tensor

from fm_fast import _backends

PLAIN = (Tensor, torch.nn.Parameter)  # not tensors in shards, which raw ops would take for whole
# Instruction sets with which the kernels were measured to be faster than oneDNN's, which PyTorch calls.
FASTER_ON = ("avx2", "avx512")
_ISA = _backends.cpu_isa()


def _faster_in() -> frozenset[torch.dtype]:
    """The dtypes in which they are: not where the processor multiplies whole matrices of 16-bit numbers, or float16 itself."""
    mkldnn = torch.backends.mkldnn.is_available()
    matrices, halves = torch.cpu._is_amx_tile_supported(), mkldnn and torch.ops.mkldnn._is_mkldnn_fp16_supported()
    slower = {torch.bfloat16: matrices, torch.float16: matrices or halves}
    return frozenset({torch.float32, *(dtype for dtype, is_slower in slower.items() if not is_slower)})


FASTER_IN = _faster_in()
TILE = 4  # positions of a tile of convolutions of size 3, along each dimension
# As measured against PyTorch's: tiles a channel, for which it pays to transform the weights, and the tiles' share that lies in the image.
LEAST_TILES = {torch.float32: 1 / 16, torch.bfloat16: 1 / 2, torch.float16: 1 / 2}
LEAST_SHARE = {torch.float32: 0.5, torch.bfloat16: 0.75, torch.float16: 0.75}


def is_convolved_here(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernels are faster on this CPU and know the layout, dtype and kind of both tensors, whose channels fit."""
    if _ISA not in FASTER_ON or x.device.type != "cpu" or x.dtype not in FASTER_IN or x.dtype != weight.dtype:
        return False
    known = type(x) is Tensor and type(weight) in PLAIN and x.dim() == 4 and x.shape[1] == weight.shape[1]
    return known and x.is_contiguous(memory_format=torch.channels_last)


def fills_tiles(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernels of size 3 are faster for so many images of this size and for these channels."""
    batch, _, height, width = x.shape
    tiles = batch * -(-height // TILE) * -(-width // TILE)
    enough = tiles >= LEAST_TILES[x.dtype] * max(weight.shape[:2])
    return enough and batch * height * width >= LEAST_SHARE[x.dtype] * TILE**2 * tiles
