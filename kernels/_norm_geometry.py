"""How group_norm_silu cuts its work on a GPU, forward and backward.

A program has some whole groups of one sample: a tile [CHANNELS, POSITIONS] that walks over the positions. The same tile serves both
layouts, since the compiler lets neighbouring threads follow whichever stride is one: channels_last programs have 32 channels or more, so
that a position's are whole sectors of memory, and just one sector where the GPU would otherwise stand idle. They have four tiles side by
side, with every fourth position each. Where all positions fit into the tiles they are read once and stay in registers. Sums over a walk
stay in the lanes of the tile, and cross threads when it has ended.
"""

import bisect
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fm_fast import _philox as contract
from fm_fast.kernels import _launch

TILE = 1024  # elements of a tile that walks
HELD_TILE = 8192  # elements of a sample's groups that a program may hold
LONE_HELD_TILE = 16384  # one that has a multiprocessor to itself, whose registers would else lie idle
SPLIT = 4  # tiles side by side of channels_last tensors, one for each position of a counter block, whose words then need not change threads
CHANNELS_LAST_CHANNELS = 32
SECTOR = 32  # bytes
FEW_PROGRAMS = 128  # fewer than a large GPU has multiprocessors
JOINED_ELEMENTS = 1024  # of a program: a group that has fewer is joined by others
MOST_JOINED_CHANNELS = 64  # of several groups: their sums compare every pair of channels
ELEMENTS_PER_THREAD = 8  # of a tile
HELD_ELEMENTS_PER_THREAD = 16  # of one that is alone
DROPOUT_STREAM = int(contract.Stream.dropout)


@dataclass(frozen=True)
class NormPlan:
    """The geometry of one launch."""

    batch: int
    groups: int  # a program
    programs: int  # a sample
    width: int  # channels of a group
    channels: int  # a tile
    positions: int  # a tile
    points: int  # all positions, of which a tile has some
    held: bool  # whether the tiles have them all
    split: int  # tiles side by side
    registers: int  # an element
    masked_channels: bool
    wide: bool
    device: torch.device

    @property
    def grid(self) -> tuple[int, int, int]:
        return _launch.grid_of(self.programs, self.batch)

    @property
    def warps(self) -> int:
        elements = (HELD_ELEMENTS_PER_THREAD if self.held and self.split == 1 else ELEMENTS_PER_THREAD) // self.registers
        return max(1, min(16 if self.split > 1 else 8, self.channels * self.positions // (32 * elements)))

    @property
    def tiles(self) -> int:
        """How many a program walks over."""
        return -(-self.points // (self.positions * self.split)) * self.split

    def options(self) -> dict[str, Any]:
        """The compile-time geometry, by kernel parameter."""
        return {
            "WIDTH": self.width,
            "GROUPS": self.groups,
            "CHANNELS": self.channels,
            "POSITIONS": self.positions,
            "HELD": self.held,
            "SPLIT": self.split,
            "MASKED_CHANNELS": self.masked_channels,
            "MASKED_POSITIONS": self.points % (self.positions * self.split) != 0,
            "WIDE": self.wide,
        }


def norm_plan(x: Tensor, strides: list[_launch.Strides], channels: int, groups: int) -> NormPlan:
    """``strides`` of all full-size tensors, those of x first; one tile holds all positions if they are few enough."""
    batch, _, points = contract.logical_shape(x.shape)
    channels_last = points == 1 or strides[0][1] < strides[0][2]
    joined, width = _joined_groups(x, channels, groups, channels_last), channels // groups
    programs, registers = -(-groups // joined), x.element_size() // 8 + 1  # float64 takes two
    tile_channels, all_positions = _launch.power_of_two(joined * width), max(4, _launch.power_of_two(points))
    lone, split = channels_last and batch * programs <= FEW_PROGRAMS, SPLIT if channels_last else 1
    held = tile_channels * all_positions * registers <= (LONE_HELD_TILE if lone else HELD_TILE)
    return NormPlan(
        batch=batch,
        groups=joined,
        programs=programs,
        width=width,
        channels=tile_channels,
        positions=all_positions // split if held else max(4, TILE // tile_channels),
        points=points,
        held=held,
        split=split,
        registers=registers,
        masked_channels=joined * width != tile_channels or groups % joined != 0,
        wide=_launch.is_wide(channels, points, strides),
        device=x.device,
    )


def _joined_groups(x: Tensor, channels: int, groups: int, channels_last: bool) -> int:
    """How many groups a program has."""
    batch, _, points = contract.logical_shape(x.shape)
    if channels_last:
        few = batch * -(-channels // CHANNELS_LAST_CHANNELS) < FEW_PROGRAMS
        wanted = SECTOR // x.element_size() if few else CHANNELS_LAST_CHANNELS
    else:
        wanted = min(MOST_JOINED_CHANNELS, -(-JOINED_ELEMENTS // points))
    return max(1, min(groups, wanted // (channels // groups)))


@functools.cache
def word_limit(probability: float) -> int:
    """How many of the 2^32 words have a uniform below the probability, which is float32; as a signed number of 32 bits."""
    wanted = torch.tensor(probability, dtype=torch.float32, device="cpu")
    limit = bisect.bisect_left(range(2**32), wanted, key=lambda word: contract.uniform(torch.tensor(word, device="cpu")))
    return limit - 2**32 if limit >= 2**31 else limit


# A tensor and its strides, as kernels take them
Addressed = tuple[Tensor | None, tuple[int, ...]]


def full(name: str, x: Tensor) -> Addressed:
    """A full-size tensor and its strides, or none."""
    return (x, _launch.strides(name, x)) if x.numel() else (None, _launch.UNADDRESSED)


def table(x: Tensor) -> Addressed:
    """A tensor [C] or [B, C] and its strides, or none."""
    return (x, tuple(x.stride())) if x.numel() else (None, (0, 0))


def options_of(x: Tensor, key: Tensor, activation: bool, dropout: float) -> dict[str, Any]:
    explicit = dropout > 0.0 and _launch.explicit_ids(key, x.shape[0])
    bits = 8 * x.element_size() if activation else 0
    return {"ACTIVATION": bits, "DROPOUT": dropout > 0.0, "EXPLICIT_IDS": explicit, "COMPUTE": _launch.compute_dtype(x)}


def sizes_of(x: Tensor, second: Tensor, groups: int) -> tuple[int, int, int, int, int]:
    """(batch, channels of both, channels of x, positions, groups) of a launch."""
    batch, first, positions = contract.logical_shape(x.shape)
    channels = first + (second.shape[1] if second.dim() > 1 else 0)
    if x.dim() < 3 or groups < 1 or channels % groups:
        raise ValueError(f"x must be [B, C, ...] with a multiple of {groups} channels, got {channels} and {tuple(x.shape)}")
    return batch, channels, first, positions, groups
