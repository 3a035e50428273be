"""What the forward and backward kernels of group_norm_silu share on the device; a program's tiles are those of ``_norm_geometry.py``."""

# Device functions are written in Triton's own language.
# pyright: reportGeneralTypeIssues=false, reportInvalidTypeForm=false

import triton
import triton.language as tl

from fm_fast.kernels._philox import read_key, words
from fm_fast.kernels._tile import read

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
