"""The second stage of the reductions: partial sums of programs, added in float64 in a fixed order."""

# Device functions are written in Triton's own language.
# pyright: reportGeneralTypeIssues=false, reportInvalidTypeForm=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from fm_fast.kernels import _launch

COMBINE_TILE, COMBINE_WARPS = 8192, 16  # at most: many loads in flight, of which few rounds follow each other


@triton.jit(do_not_specialize=["count"])
def combine_kernel(
    output_ptr,  # [outputs]
    partial_ptr,  # [outputs, count]
    count,
    scale: tl.float64,
    TILE: tl.constexpr,
):
    """output = scale * sum of its partials, added in float64 from the first to the last."""
    output = tl.program_id(0).to(tl.int64)
    total = tl.zeros((TILE,), tl.float64)
    start = 0
    while start < count:
        index = start + tl.arange(0, TILE)
        total += tl.load(partial_ptr + output * count + index, mask=index < count, other=0.0).to(tl.float64)
        start += TILE
    tl.store(output_ptr + output, tl.sum(total) * scale)


def partials(outputs: Tensor, programs: int) -> Tensor:
    """Where the programs of each float64 output leave their sums, float64: the outputs themselves where there is one."""
    if programs == 1:
        return outputs
    return torch.empty(outputs.numel() * programs, dtype=torch.float64, device=outputs.device)


def combine(outputs: Tensor, partial: Tensor, scale: float) -> None:
    """Fill contiguous ``outputs`` with scale times the sums of equal runs of ``partial``."""
    count = partial.numel() // outputs.numel()
    tile = max(32, min(COMBINE_TILE, _launch.power_of_two(count)))
    warps = max(1, min(COMBINE_WARPS, tile // 256))
    _launch.launch(combine_kernel, (outputs.numel(),), outputs.device, (outputs, partial, count, scale), warps=warps, TILE=tile)
