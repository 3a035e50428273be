"""Probes of a divergence estimate: random signs, turned by the parities of structured probes (Hadamard, coloured).

A tile is R counter blocks of 128 signs, walked through in steps of LANES neighbouring positions, so that the few threads that share a
block have drawn its words once for all of them.
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
from fm_fast.kernels._philox import words
from fm_fast.kernels._tile import sample_and_chunk

BLOCK_SIGNS = 128
MOST_ROWS = 32
# Neighbours of a step: four threads of 128-bit accesses, or so few that a warp has eight channels of a channels-last tensor.
POSITION_BYTES, CHANNEL_LANES = 64, 4
PARITY_WORDS = 128  # words of a program of the parity kernel

PROBE_STREAM = tl.constexpr(int(contract.Stream.probe))
SIGN_BIT = tl.constexpr(0x80000000)
PARITIES_OF_FOUR_BITS = tl.constexpr(0x6996)


@triton.jit
def probe_purpose(index, first, share, probe):
    """The counter word of probe number first + probe."""
    return (index + (first + probe) // share).to(tl.uint32) << 8 | PROBE_STREAM


@triton.jit
def place_signs(tile, channels, positions, ROWS: tl.constexpr, CHANNEL_FAST: tl.constexpr, WIDE: tl.constexpr):
    """(block, channel, first position, inside), each [R, 1], of the counter blocks of a sample's tile."""
    first = tile.to(tl.int64) if WIDE else tile
    row = first * ROWS + tl.arange(0, ROWS)[:, None]
    per_channel = (positions + 127) // 128
    if CHANNEL_FAST:
        channel, group = row % channels, row // channels
    else:
        channel, group = row // per_channel, row % per_channel
    return channel * per_channel + group, channel, group * 128, row < channels * per_channel


@triton.jit
def sign_words(parity_ptr, block, inside, identity, step, seed, purpose, STRUCTURED: tl.constexpr):
    """The four words [R, 1] of 128 signs each; ``parity_ptr`` has those by which a structured probe turns them."""
    a, b, c, d = words(block, identity, step, seed, purpose)
    if STRUCTURED:
        pointer = parity_ptr + block.to(tl.int64) * 4
        a ^= tl.load(pointer, mask=inside, other=0).to(tl.uint32, bitcast=True)
        b ^= tl.load(pointer + 1, mask=inside, other=0).to(tl.uint32, bitcast=True)
        c ^= tl.load(pointer + 2, mask=inside, other=0).to(tl.uint32, bitcast=True)
        d ^= tl.load(pointer + 3, mask=inside, other=0).to(tl.uint32, bitcast=True)
    return a, b, c, d


@triton.jit
def sign_bits(a, b, c, d, FIRST: tl.constexpr, LANES: tl.constexpr):
    """[R, LANES]: signs FIRST, FIRST + 1, ... of each block in the top bit, which is set for -1; the other bits are zero."""
    word = (a if FIRST < 32 else b) if FIRST < 64 else (c if FIRST < 96 else d)
    bit = FIRST % 32 + tl.arange(0, LANES)[None, :]
    return (word << (31 - bit).to(tl.uint32)) & SIGN_BIT


@triton.jit
def _odd(code):
    """1 where the number of set bits of an int64 is odd, in uint32."""
    word = (code ^ (code >> 32)).to(tl.uint32)
    word ^= word >> 16
    word ^= word >> 8
    word ^= word >> 4
    return (tl.full((), PARITIES_OF_FOUR_BITS, tl.uint32) >> (word & 15)) & 1


@triton.jit(do_not_specialize=["probes", "first"])
def parity_kernel(
    parity_ptr,  # [probes, C, ceil(P / 128), 4] int32
    codes_ptr,  # [C, P] int64
    rows_ptr,  # [first + probes or more] int64
    probes,
    channels,
    positions,
    first,
    WORDS: tl.constexpr,
):
    """Bit i of a block's words: the parity of codes & row at its position i, the same for all samples."""
    probe, chunk = sample_and_chunk()
    if probe >= probes:
        return
    row = tl.load(rows_ptr + first + probe)
    per_channel = (positions + 127) // 128
    count = channels * per_channel * 4
    word = chunk.to(tl.int64) * WORDS + tl.arange(0, WORDS)[:, None]
    channel, lane = word // 4 // per_channel, tl.arange(0, 32)[None, :]
    position = word // 4 % per_channel * 128 + word % 4 * 32 + lane
    inside = (word < count) & (position < positions)
    code = tl.load(codes_ptr + channel * positions + position, mask=inside, other=0)
    parities = tl.sum(_odd(code & row) << lane.to(tl.uint32), axis=1, keep_dims=True)
    tl.store(parity_ptr + probe.to(tl.int64) * count + word, parities.to(tl.int32, bitcast=True), mask=word < count)


@dataclass(frozen=True)
class SignPlan:
    """The geometry of a launch over tiles of ``rows`` counter blocks; ``strides`` are those of one probe [B, C, P]."""

    probes: int
    batch: int
    channels: int
    positions: int
    strides: tuple[_launch.Strides, ...]
    rows: int
    lanes: int
    tiles: int
    channel_fast: bool
    masked: bool
    wide: bool
    device: torch.device

    @property
    def aligned(self) -> bool:
        """Whether neighbours are read together in 16 bytes or more."""
        return not self.channel_fast and self.positions % 16 == 0

    @property
    def counter_blocks(self) -> int:
        """Blocks of 128 signs a sample."""
        return self.channels * -(-self.positions // BLOCK_SIGNS)

    @property
    def programs(self) -> int:
        """Programs a sample."""
        return max(1, -(-self.counter_blocks // (self.rows * self.tiles)))

    @property
    def grid(self) -> tuple[int, int, int]:
        return _launch.grid_of(self.programs, self.probes * self.batch)

    @property
    def warps(self) -> int:
        return max(1, self.rows // 8)

    def options(self) -> dict[str, Any]:
        """The compile-time geometry, by kernel parameter."""
        return {
            "ROWS": self.rows,
            "LANES": self.lanes,
            "TILES": self.tiles,
            "CHANNEL_FAST": self.channel_fast,
            "MASKED": self.masked,
            "WIDE": self.wide,
        }


def sign_plan(name: str, probes: Tensor) -> SignPlan:
    """The geometry for probes [K, B, ...] that hold at least one element; it does not depend on their number or the batch."""
    batch, channels, positions = contract.logical_shape(probes.shape[1:])
    strides = _launch.strides(name, probes[0])
    channel_fast = _launch.is_channel_fast(channels, strides)
    blocks = channels * -(-positions // BLOCK_SIGNS)
    rows, tiles = min(MOST_ROWS, _launch.power_of_two(blocks)), _launch.tiles_of(channels * positions)
    return SignPlan(
        probes=probes.shape[0],
        batch=batch,
        channels=channels,
        positions=positions,
        strides=(strides,),
        rows=rows,
        lanes=CHANNEL_LANES if channel_fast else POSITION_BYTES // probes.element_size(),
        tiles=tiles,
        channel_fast=channel_fast,
        masked=positions % BLOCK_SIGNS != 0 or blocks % (rows * tiles) != 0,
        wide=_launch.is_wide(channels, positions, [strides]),
        device=probes.device,
    )


def check_numbers(probes: Tensor, codes: Tensor, rows: Tensor, index: int, first: int, share: int) -> None:
    """Raise ValueError unless the counters of all probes [K, B, ...] are in range and structured ones have their codes and rows."""
    if share < 1 or first < 0 or index < 0:
        raise ValueError(f"share must be at least 1, first and index at least 0, got {share}, {first} and {index}")
    last, limit = first + probes.shape[0] - 1, contract.INDEX_LIMIT
    if index + max(last, 0) // share >= limit:
        raise ValueError(f"index + probe / share must be below {limit}, got index {index} for probe {last} and share {share}")
    if codes.numel() == 0:
        return
    if codes.numel() != probes[0, 0].numel():
        raise ValueError(f"codes must have one code an element of a sample, {probes[0, 0].numel()}, got {codes.numel()}")
    if rows.numel() <= last:
        raise ValueError(f"rows must have one row a probe, {last + 1} or more, got {rows.numel()}")
    for name, table in (("codes", codes), ("rows", rows)):
        if table.dtype != torch.int64 or not table.is_contiguous():
            raise ValueError(f"{name} must be contiguous int64, got {table.dtype} with strides {table.stride()}")


def parities(plan: SignPlan, codes: Tensor, rows: Tensor, first: int) -> Tensor | None:
    """The words by which structured probes first, first + 1, ... turn the random signs; None without codes."""
    if codes.numel() == 0:
        return None
    words_a_probe = 4 * plan.counter_blocks
    found = torch.empty(plan.probes * words_a_probe, dtype=torch.int32, device=plan.device)
    grid = _launch.grid_of(-(-words_a_probe // PARITY_WORDS), plan.probes)
    positional = (found, codes, rows, plan.probes, plan.channels, plan.positions, first)
    _launch.launch(parity_kernel, grid, plan.device, positional, warps=4, WORDS=PARITY_WORDS)
    return found
