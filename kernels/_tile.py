"""Where a program's tile lies in a sample [C, P], and how data and noise are read there.

A tile is R x K counter blocks of four lanes. FLAT tiles run over a sample that is contiguous in every tensor, taken as one row, so that
a thread's lanes are one 128-bit access. Other tiles take one block a row and address each tensor by its channel and position strides.
"""

import triton
import triton.language as tl

from fm_fast.kernels._philox import DEQUANTISE_STREAM, FLIP_STREAM, NORMAL, UNIFORM, X0_STREAM, first_word, numbers, uniform


@triton.jit
def sample_and_chunk():
    """(sample, chunk) of this program on a grid (chunks, samples, samples / 65535); the surplus has samples behind the last."""
    return tl.program_id(1) + tl.program_id(2) * tl.num_programs(1), tl.program_id(0)


@triton.jit
def place(
    tile,
    channels,
    positions,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    FLAT: tl.constexpr,
    CHANNEL_FAST: tl.constexpr,
    WIDE: tl.constexpr,
):
    """(first block [R, 1], channel [R, 1], position [R, 4 K], inside [R, 4 K]) of a sample's tile."""
    first = tile.to(tl.int64) if WIDE else tile
    row = first * ROWS + tl.arange(0, ROWS)[:, None]
    lane = tl.arange(0, 4 * BLOCKS)[None, :]
    if FLAT:
        block, channel, position = row * BLOCKS, row * 0, row * (4 * BLOCKS) + lane
        inside = position < positions
    else:
        per_channel = (positions + 3) // 4
        if CHANNEL_FAST:
            channel, group = row % channels, row // channels
        else:
            channel, group = row // per_channel, row % per_channel
        block, position = channel * per_channel + group, group * 4 + lane
        inside = (row < channels * per_channel) & (position < positions)
    return block, channel, position, inside


@triton.jit
def offset(channel, position, channel_stride, position_stride, FLAT: tl.constexpr):
    """Element offsets inside a sample."""
    if FLAT:
        return position
    else:
        return channel * channel_stride + position * position_stride


@triton.jit
def read(pointer, inside, MASKED: tl.constexpr):
    """Load a tile, zero outside the sample."""
    if MASKED:
        return tl.load(pointer, mask=inside, other=0)
    else:
        return tl.load(pointer)


@triton.jit
def write(pointer, value, inside, MASKED: tl.constexpr):
    """Store a tile, rounded to the tensor's dtype; float64 to 16 bits by way of float32, as PyTorch does."""
    if pointer.dtype.element_ty.primitive_bitwidth == 16:
        value = value.to(tl.float32)
    if MASKED:
        tl.store(pointer, value, mask=inside)
    else:
        tl.store(pointer, value)


@triton.jit
def read_numbers(pointer, COUNT: tl.constexpr, COMPUTE: tl.constexpr):
    """A tuple of numbers that follow each other."""
    found = ()
    for j in tl.static_range(COUNT):
        found += (tl.load(pointer + j).to(COMPUTE),)
    return found


@triton.jit
def mirror(position, identity, step, seed, flip, WIDTH: tl.constexpr):
    """Positions read along the last dimension backwards if this sample is flipped. WIDTH 0: never."""
    if WIDTH == 0:
        return position
    else:
        flipped = uniform(first_word(identity, step, seed, FLIP_STREAM)) < flip
        return tl.where(flipped, position + (WIDTH - 1) - 2 * (position % WIDTH), position)


@triton.jit
def data_scale(
    x1, block, identity, step, seed, LEVELS: tl.constexpr, DEQUANTISE: tl.constexpr, BLOCKS: tl.constexpr, COMPUTE: tl.constexpr
):
    """x1 in the compute dtype; integers 0 .. LEVELS-1 become 2 (x + u) / LEVELS - 1. LEVELS 0: x1 is floating point already."""
    value = x1.to(COMPUTE)
    if LEVELS == 0:
        return value
    elif DEQUANTISE:
        u = numbers(block, identity, step, seed, DEQUANTISE_STREAM, UNIFORM, BLOCKS)
        return (value + u.to(COMPUTE)) * (2.0 / LEVELS) - 1.0
    else:
        return (value + 0.5) * (2.0 / LEVELS) - 1.0


@triton.jit
def source(
    x0_ptr,
    x0_offset,
    block,
    inside,
    identity,
    step,
    seed,
    DRAW: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCKS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """x0 in the compute dtype: drawn at its counters, or read."""
    if DRAW:
        return numbers(block, identity, step, seed, X0_STREAM, NORMAL, BLOCKS).to(COMPUTE)
    else:
        return read(x0_ptr + x0_offset, inside, MASKED).to(COMPUTE)
