"""How group_norm_silu cuts its work on a GPU, and what its forward and backward kernels share.

A program has some whole groups of one sample: a tile [CHANNELS, POSITIONS] that walks over the positions. The same tile serves both
layouts, since the compiler lets neighbouring threads follow whichever stride is one: channels_last programs have 32 channels or more, so
that a position's are whole sectors of memory, and just one sector where the GPU would otherwise stand idle. They have four tiles side by
side, with every fourth position each. Where all positions fit into the tiles they are read once and stay in registers. Sums over a walk
stay in the lanes of the tile, and cross threads when it has ended.
"""

# Device functions are written in Triton's own language.
# pyright: reportGeneralTypeIssues=false, reportInvalidTypeForm=false

import bisect
import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fm_fast import _philox as contract
from fm_fast.kernels import _launch
from fm_fast.kernels._philox import read_key, words
from fm_fast.kernels._tile import read

TILE = 1024  # elements of a tile that walks
HELD_TILE = 8192  # elements of a sample's groups that a program may hold
LONE_HELD_TILE = 16384  # one that has a multiprocessor to itself, whose registers would else lie idle
SPLIT = 4  # tiles side by side of channels_last tensors, one for each position of a counter block, whose words then need not change threads
CHANNELS_LAST_CHANNELS = 32
SECTOR = 32  # bytes
FEW_PROGRAMS = 128  # fewer than a large GPU has multiprocessors
MOST_JOINED_CHANNELS = 64  # of several groups: their sums compare every pair of channels
ELEMENTS_PER_THREAD = 8  # of a tile
HELD_ELEMENTS_PER_THREAD = 16  # of one that is alone
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
def load_tiles(x, second, place, position, positions, SPLIT: tl.constexpr, MASKED: tl.constexpr, MASKED_POSITIONS: tl.constexpr,
               COMPUTE: tl.constexpr):  # fmt: skip
    """The SPLIT tiles at ``position`` and behind it. All are asked for before any is used, and before a store that might change them."""
    sample, channel, inside, first = place
    exists = inside_tile(inside, position, positions, MASKED_POSITIONS)
    found = (load_inputs(x, second, sample, channel, position, first, exists, MASKED, COMPUTE),)
    for k in tl.static_range(1, SPLIT):
        exists = inside_tile(inside, position + k, positions, MASKED_POSITIONS)
        found += (load_inputs(x, second, sample, channel, position + k, first, exists, MASKED, COMPUTE),)
    return found


@triton.jit
def group_sum(values, WIDTH: tl.constexpr, GROUPS: tl.constexpr):
    """values [CHANNELS] summed over the WIDTH channels of each group, for every channel of it."""
    if GROUPS == 1:
        return tl.zeros_like(values) + tl.sum(values, axis=0)
    elif values.shape[0] == GROUPS * WIDTH:
        sums = tl.sum(tl.reshape(values, (GROUPS, WIDTH)), axis=1)
        return tl.reshape(tl.broadcast_to(sums[:, None], (GROUPS, WIDTH)), (GROUPS * WIDTH,))
    else:
        group = tl.arange(0, values.shape[0]) // WIDTH
        return tl.sum(tl.where(group[:, None] == group[None, :], values[None, :], 0.0), axis=1)


@triton.jit
def _draw_dropped(dropout, like, sample, channel, start, positions, SPLIT: tl.constexpr, EXPLICIT_IDS: tl.constexpr):
    key, purpose, limit, _ = dropout
    seed, step, identity = read_key(key, sample, EXPLICIT_IDS)
    limit = tl.full((), limit, tl.int32).to(tl.uint32, bitcast=True)
    CHANNELS: tl.constexpr = like.shape[0]
    COLUMNS: tl.constexpr = like.shape[1] * SPLIT // 4
    block = channel[:, None] * ((positions + 3) // 4) + start // 4 + tl.arange(0, COLUMNS)[None, :]
    # Adding what only later stages of the compiler know to be zero makes it lay the counters out as it laid out the data.
    zero = ((like.to(tl.float32).to(tl.uint32, bitcast=True) & 1) >> 1).to(tl.int32)
    if SPLIT == 4:
        a, b, c, d = words(block + zero, identity, step, seed, purpose)
        return a < limit, b < limit, c < limit, d < limit
    else:
        zero = tl.sum(tl.reshape(zero, (CHANNELS, COLUMNS, 4)), axis=2)
        a, b, c, d = words(block + zero, identity, step, seed, purpose)
        return (tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (CHANNELS, 4 * COLUMNS)) < limit,)


@triton.jit
def dropped_tiles(dropout, like, sample, channel, start, positions, SPLIT: tl.constexpr, DROPOUT: tl.constexpr, EXPLICIT_IDS: tl.constexpr):
    """Whether dropout takes each element of the SPLIT tiles at ``start``: the uniform of its word is below the probability.

    ``like``: a tile of the data, as it was loaded.
    """
    if DROPOUT:
        return _draw_dropped(dropout, like, sample, channel, start, positions, SPLIT, EXPLICIT_IDS)
    else:
        return ()


@triton.jit
def dropped_out(x, dropped, k, dropout, DROPOUT: tl.constexpr):
    """Tile k of x behind dropout."""
    if DROPOUT:
        x *= tl.where(dropped[k], 0.0, tl.full((), dropout[3], tl.float32))
    return x


@triton.jit
def sigmoid(z, BITS: tl.constexpr):
    """1 / (1 + exp(-z)) for a result of BITS bits; 16 of them hide what the shorter of two ways, half as long, adds to the rounding."""
    if BITS == 16:
        root = tl.rsqrt(1.0 + tl.exp2(z * MINUS_LOG2_E))
        return root * root
    else:
        return 1.0 / (1.0 + tl.exp(-z))


@dataclass(frozen=True)
class NormPlan:
    """The geometry of one launch."""

    batch: int
    groups: int  # a program
    programs: int  # a sample
    width: int
    channels: int
    positions: int  # a tile
    points: int  # all positions, of which a tile has some
    held: bool
    split: int  # tiles side by side
    thread_elements: int  # of each
    masked_channels: bool
    masked_positions: bool
    wide: bool
    device: torch.device

    @property
    def grid(self) -> tuple[int, int, int]:
        return _launch.grid_of(self.programs, self.batch)

    @property
    def warps(self) -> int:
        return max(1, min(16 if self.split > 1 else 8, self.channels * self.positions // (32 * self.thread_elements)))

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
            "MASKED_POSITIONS": self.masked_positions,
            "WIDE": self.wide,
        }


def norm_plan(x: Tensor, strides: list[_launch.Strides], channels: int, groups: int) -> NormPlan:
    """``strides`` of all full-size tensors, those of x first; one tile holds all positions if they are few enough."""
    batch, _, points = contract.logical_shape(x.shape)
    width = channels // groups
    channels_last = points == 1 or strides[0][1] < strides[0][2]
    wanted = _channels_last_channels(x, batch, channels) if channels_last else min(MOST_JOINED_CHANNELS, -(-1024 // points))
    joined = max(1, min(groups, wanted // width))
    tile_channels = _launch.power_of_two(joined * width)
    row = max(4, _launch.power_of_two(points))
    doubled = x.element_size() // 8 + 1  # float64 takes two registers
    lone = channels_last and batch * -(-groups // joined) <= FEW_PROGRAMS
    held = tile_channels * row * doubled <= (LONE_HELD_TILE if lone else HELD_TILE)
    split = SPLIT if channels_last else 1
    tile_positions = row // split if held else max(4, TILE // tile_channels)
    return NormPlan(
        batch=batch,
        groups=joined,
        programs=-(-groups // joined),
        width=width,
        channels=tile_channels,
        positions=tile_positions,
        points=points,
        held=held,
        split=split,
        thread_elements=(HELD_ELEMENTS_PER_THREAD if held and split == 1 else ELEMENTS_PER_THREAD) // doubled,
        masked_channels=joined * width != tile_channels or groups % joined != 0,
        masked_positions=points % (tile_positions * split) != 0,
        wide=_launch.is_wide(channels, points, strides),
        device=x.device,
    )


def _channels_last_channels(x: Tensor, batch: int, channels: int) -> int:
    few = batch * -(-channels // CHANNELS_LAST_CHANNELS) < FEW_PROGRAMS
    return SECTOR // x.element_size() if few else CHANNELS_LAST_CHANNELS


@functools.cache
def word_limit(probability: float) -> int:
    """How many of the 2^32 words have a uniform below the probability, which is float32; as a signed number of 32 bits."""
    wanted = torch.tensor(probability, dtype=torch.float32, device="cpu")
    limit = bisect.bisect_left(range(2**32), wanted, key=lambda word: contract.uniform(torch.tensor(word, device="cpu")))
    return limit - 2**32 if limit >= 2**31 else limit


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
