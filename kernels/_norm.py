"""How group_norm_silu cuts its work on a GPU, and what its forward and backward kernels share.

A program has some whole groups of one sample: a tile [CHANNELS, POSITIONS] that walks over the positions. The same tile serves both
layouts, since the compiler lets neighbouring threads follow whichever stride is one: channels_last programs have 32 channels or more, so
that a position's are whole sectors of memory, and just one sector where the GPU would otherwise stand idle. Where all positions fit into
one tile they are read once and stay in registers.
"""

# Device functions are written in Triton's own language.
# pyright: reportGeneralTypeIssues=false, reportInvalidTypeForm=false

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fm_fast import _philox as contract
from fm_fast.kernels import _launch
from fm_fast.kernels._philox import UNIFORM, numbers, read_key
from fm_fast.kernels._tile import read

TILE = 2048  # elements of a tile that walks
HELD_TILE = 8192  # elements of a sample's groups that one forward tile may hold; the backward pass holds two tensors, of TILE at most
CHANNELS_LAST_CHANNELS = 32
SECTOR = 32  # bytes
FEW_PROGRAMS = 128  # fewer than a large GPU has multiprocessors
MOST_JOINED_CHANNELS = 64  # of several groups: their sums compare every pair of channels
ELEMENTS_PER_THREAD = 16
DROPOUT_STREAM = int(contract.Stream.dropout)
MINUS_LOG2_E = tl.constexpr(-1.4426950408889634)


@triton.jit
def per_channel(pointer, stride, channel, inside, MASKED_CHANNELS: tl.constexpr, COMPUTE: tl.constexpr):
    """One number a channel, zero where there is no tensor."""
    if pointer is None:
        return tl.zeros(channel.shape, COMPUTE)
    else:
        return read(pointer + channel * stride, inside, MASKED_CHANNELS).to(COMPUTE)


@triton.jit
def affine(weight, bias, scale, shift, sample, channel, inside, MASKED_CHANNELS: tl.constexpr, COMPUTE: tl.constexpr):
    """(gain, offset) of each channel, z = xhat gain + offset; the arguments are (pointer, strides)."""
    factor = 1.0 + batch_channel(scale, sample, channel, inside, MASKED_CHANNELS, COMPUTE)
    gain = per_channel(weight[0], weight[1][0], channel, inside, MASKED_CHANNELS, COMPUTE) * factor
    offset = per_channel(bias[0], bias[1][0], channel, inside, MASKED_CHANNELS, COMPUTE) * factor
    return gain, offset + batch_channel(shift, sample, channel, inside, MASKED_CHANNELS, COMPUTE)


@triton.jit
def batch_channel(table, sample, channel, inside, MASKED_CHANNELS: tl.constexpr, COMPUTE: tl.constexpr):
    """Row ``sample`` of a table (pointer, (batch stride, channel stride)), zero where there is none."""
    if table[0] is None:
        return tl.zeros(channel.shape, COMPUTE)
    else:
        return read(table[0] + sample * table[1][0] + channel * table[1][1], inside, MASKED_CHANNELS).to(COMPUTE)


@triton.jit
def inside_tile(inside, position, positions, MASKED_POSITIONS: tl.constexpr):
    """Which elements of a tile exist."""
    if MASKED_POSITIONS:
        return inside[:, None] & (position < positions)[None, :]
    else:
        return tl.broadcast_to(inside[:, None], (inside.shape[0], position.shape[0]))


@triton.jit
def place_in(tensor, sample, channel, position):
    """Pointers of a tile of (pointer, (batch, channel, position strides))."""
    return tensor[0] + sample * tensor[1][0] + channel[:, None] * tensor[1][1] + position[None, :] * tensor[1][2]


@triton.jit
def load_inputs(x, second, sample, channel, position, first, exists, MASKED: tl.constexpr, COMPUTE: tl.constexpr):
    """A tile of x and second, whose channels follow those of x; zero where nothing exists."""
    if second[0] is None:
        return read(place_in(x, sample, channel, position), exists, MASKED).to(COMPUTE)
    else:
        in_first = (channel < first)[:, None]
        one = tl.load(place_in(x, sample, channel, position), mask=exists & in_first, other=0)
        other = tl.load(place_in(second, sample, channel - first, position), mask=exists & (channel >= first)[:, None], other=0)
        return tl.where(in_first, one, other).to(COMPUTE)


@triton.jit
def group_sum(values, WIDTH: tl.constexpr, GROUPS: tl.constexpr):
    """values [CHANNELS] summed over the WIDTH channels of each group, for every channel of it."""
    if GROUPS == 1:
        return tl.zeros_like(values) + tl.sum(values, axis=0)
    elif GROUPS * WIDTH == values.shape[0]:
        sums = tl.sum(tl.reshape(values, (GROUPS, WIDTH)), axis=1)
        return tl.reshape(tl.broadcast_to(sums[:, None], (GROUPS, WIDTH)), (GROUPS * WIDTH,))
    else:
        group = tl.arange(0, values.shape[0]) // WIDTH
        return tl.sum(tl.where(group[:, None] == group[None, :], values[None, :], 0.0), axis=1)


@triton.jit
def dropout_factor(key, sample, channel, start, positions, purpose, probability, factor, POSITIONS: tl.constexpr,
                   EXPLICIT_IDS: tl.constexpr):  # fmt: skip
    """0 or ``factor`` for a tile: a uniform of the dropout stream is below the probability, or not."""
    seed, step, identity = read_key(key, sample, EXPLICIT_IDS)
    blocks = channel[:, None] * ((positions + 3) // 4) + start // 4 + tl.arange(0, POSITIONS // 4)[None, :]
    block = tl.reshape(blocks, (channel.shape[0] * (POSITIONS // 4), 1))
    uniform = numbers(block, identity, step, seed, purpose, UNIFORM, 1)
    return tl.where(tl.reshape(uniform, (channel.shape[0], POSITIONS)) < probability, 0.0, factor)


@triton.jit
def sigmoid(z):
    """1 / (1 + exp(-z)) without the scaling of tiny and huge numbers that exp and / are given: half the instructions, and as exact."""
    root = tl.rsqrt(1.0 + tl.exp2(z * MINUS_LOG2_E))
    return root * root


@dataclass(frozen=True)
class NormPlan:
    """The geometry of one launch."""

    batch: int
    groups: int  # a program
    programs: int  # a sample
    width: int
    channels: int
    positions: int
    held: bool
    masked_channels: bool
    masked_positions: bool
    wide: bool
    device: torch.device

    @property
    def grid(self) -> tuple[int, int, int]:
        return _launch.grid_of(self.programs, self.batch)

    @property
    def warps(self) -> int:
        return max(1, min(8, self.channels * self.positions // (32 * ELEMENTS_PER_THREAD)))

    def options(self) -> dict[str, Any]:
        """The compile-time geometry, by kernel parameter."""
        return {
            "WIDTH": self.width,
            "GROUPS": self.groups,
            "CHANNELS": self.channels,
            "POSITIONS": self.positions,
            "HELD": self.held,
            "MASKED_CHANNELS": self.masked_channels,
            "MASKED_POSITIONS": self.masked_positions,
            "WIDE": self.wide,
        }


def norm_plan(x: Tensor, strides: list[_launch.Strides], channels: int, groups: int, most: int) -> NormPlan:
    """``strides`` of all full-size tensors, those of x first; one tile holds all positions if they are no more than ``most`` elements."""
    batch, _, points = contract.logical_shape(x.shape)
    width = channels // groups
    channels_last = points == 1 or strides[0][1] < strides[0][2]
    wanted = _channels_last_channels(x, batch, channels) if channels_last else min(MOST_JOINED_CHANNELS, -(-1024 // points))
    joined = max(1, min(groups, wanted // width))
    tile_channels = _launch.power_of_two(joined * width)
    row = max(4, _launch.power_of_two(points))
    held = tile_channels * row <= most
    tile_positions = row if held else max(4, TILE // tile_channels)
    return NormPlan(
        batch=batch,
        groups=joined,
        programs=-(-groups // joined),
        width=width,
        channels=tile_channels,
        positions=tile_positions,
        held=held,
        masked_channels=joined * width != tile_channels or groups % joined != 0,
        masked_positions=points % tile_positions != 0,
        wide=_launch.is_wide(channels, points, strides),
        device=x.device,
    )


def _channels_last_channels(x: Tensor, batch: int, channels: int) -> int:
    few = batch * -(-channels // CHANNELS_LAST_CHANNELS) < FEW_PROGRAMS
    return SECTOR // x.element_size() if few else CHANNELS_LAST_CHANNELS


Addressed = tuple[Tensor | None, tuple[int, ...]]


def full(name: str, x: Tensor) -> Addressed:
    """A full-size tensor and its strides, or none."""
    return (x, _launch.strides(name, x)) if x.numel() else (None, _launch.UNADDRESSED)


def table(x: Tensor) -> Addressed:
    """A tensor [C] or [B, C] and its strides, or none."""
    return (x, tuple(x.stride())) if x.numel() else (None, (0, 0))


def options_of(x: Tensor, key: Tensor, activation: bool, dropout: float) -> dict[str, Any]:
    explicit = dropout > 0.0 and _launch.explicit_ids(key, x.shape[0])
    return {"ACTIVATION": activation, "DROPOUT": dropout > 0.0, "EXPLICIT_IDS": explicit, "COMPUTE": _launch.compute_dtype(x)}


def start_norm(kernel: Any, plan: NormPlan, positional: tuple[Any, ...], options: dict[str, Any]) -> None:
    with _launch.on_device(plan.device):
        kernel[plan.grid](*positional, **options, **plan.options(), num_warps=plan.warps, num_stages=1, enable_fp_fusion=True)


def sizes_of(x: Tensor, second: Tensor, groups: int) -> tuple[int, int, int, int, int]:
    """(batch, channels of both, channels of x, positions, groups) of a launch."""
    batch, first, positions = contract.logical_shape(x.shape)
    channels = first + (second.shape[1] if second.dim() > 1 else 0)
    if x.dim() < 3 or groups < 1 or channels % groups:
        raise ValueError(f"x must be [B, C, ...] with a multiple of {groups} channels, got {channels} and {tuple(x.shape)}")
    return batch, channels, first, positions, groups
