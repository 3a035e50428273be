"""Philox4x32-10 words, uniforms and normals inside Triton kernels: the arithmetic that ``fm_fast.random`` specifies.

A row of one or two counter blocks becomes four or eight neighbouring numbers, in logical order. Neither ``tl.sin``, ``tl.cos``
nor ``tl.randn`` is used: their large-argument reduction doubles the instructions, and their numbers are not ours.
"""

# Device functions are written in Triton's own language.
# pyright: reportGeneralTypeIssues=false, reportInvalidTypeForm=false

import triton
import triton.language as tl

from fm_fast import _philox as contract

X0_STREAM = tl.constexpr(int(contract.Stream.x0))
TIME_STREAM = tl.constexpr(int(contract.Stream.t))
DEQUANTISE_STREAM = tl.constexpr(int(contract.Stream.dequantise))
FLIP_STREAM = tl.constexpr(int(contract.Stream.flip))

NORMAL, UNIFORM, SIGN, WORD = (
    tl.constexpr(int(kind)) for kind in (contract.Kind.normal, contract.Kind.uniform, contract.Kind.sign, contract.Kind.word)
)

MULTIPLIER_0 = tl.constexpr(contract.MULTIPLIERS[0])
MULTIPLIER_1 = tl.constexpr(contract.MULTIPLIERS[1])
KEY_BUMP_0 = tl.constexpr(contract.KEY_BUMPS[0])
KEY_BUMP_1 = tl.constexpr(contract.KEY_BUMPS[1])
ROUNDS = tl.constexpr(contract.ROUNDS)
GOLDEN = tl.constexpr(contract.GOLDEN)

LOG_0, LOG_1, LOG_2, LOG_3, LOG_4, LOG_5, LOG_6 = (tl.constexpr(value) for value in contract.LOG_TAIL)
SIN_0, SIN_1, SIN_2, SIN_3 = (tl.constexpr(value) for value in contract.SIN_TAIL)
COS_0, COS_1, COS_2 = (tl.constexpr(value) for value in contract.COS_TAIL)
MINUS_TWO_LN2 = tl.constexpr(contract.MINUS_TWO_LN2)
THREE_QUARTERS_BITS = tl.constexpr(contract.THREE_QUARTERS_BITS)
MANTISSA_BITS = tl.constexpr(contract.MANTISSA_BITS)


@triton.jit
def read_key(key_ptr, sample, EXPLICIT_IDS: tl.constexpr):
    """(seed, step, sample id) of one sample from the key tensor; ids are listed or counted from the first."""
    seed = tl.load(key_ptr)
    step = tl.load(key_ptr + 1).to(tl.uint32)
    identity = tl.load(key_ptr + 2 + sample) if EXPLICIT_IDS else tl.load(key_ptr + 2) + sample
    return seed, step, identity.to(tl.uint32)


@triton.jit
def words(block, identity, step, seed, purpose):
    """The four 32-bit words of the counters (block, identity, step, purpose); purpose is stream | index << 8."""
    key_0, key_1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    c0, c1, c2, c3 = block.to(tl.uint32), identity, step, tl.full((), purpose, tl.uint32)
    for _ in tl.static_range(ROUNDS):
        # One widening multiplication gives both halves of a product; a high and a low one are twice the instructions.
        product_0, product_1 = c0.to(tl.uint64) * MULTIPLIER_0, c2.to(tl.uint64) * MULTIPLIER_1
        c0, c1 = (product_1 >> 32).to(tl.uint32) ^ c1 ^ key_0, product_1.to(tl.uint32)
        c2, c3 = (product_0 >> 32).to(tl.uint32) ^ c3 ^ key_1, product_0.to(tl.uint32)
        key_0, key_1 = key_0 + KEY_BUMP_0, key_1 + KEY_BUMP_1
    return c0, c1, c2, c3


@triton.jit
def uniform(word):
    """float32 in (0, 1]: the centre of the word's cell."""
    return word.to(tl.float32) * 2.0**-32 + 2.0**-33


@triton.jit
def minus_two_log(u):
    """-2 ln u for u in (0, 1], never negative."""
    bits = u.to(tl.int32, bitcast=True) - THREE_QUARTERS_BITS
    exponent = (bits >> 23).to(tl.float32)
    f = ((bits & MANTISSA_BITS) + THREE_QUARTERS_BITS).to(tl.float32, bitcast=True) - 1.0
    tail = ((((((f * LOG_6 + LOG_5) * f + LOG_4) * f + LOG_3) * f + LOG_2) * f + LOG_1) * f + LOG_0) * f + 1.0
    near_one = (f * f) * tail - 2.0 * f
    return tl.maximum(exponent * MINUS_TWO_LN2 + near_one, 0.0)


@triton.jit
def _apply_sign(x, word):
    """x, negated where the top bit of the word is set."""
    return (x.to(tl.uint32, bitcast=True) ^ (word & 0x80000000)).to(tl.float32, bitcast=True)


@triton.jit
def sin_cos_turn(word):
    """Sine and cosine of the turn word / 2^32: the nearest quarter exactly, the rest by polynomial."""
    # Dropping the two top bits leaves the signed distance to the nearest quarter, in units of 2^-31 of an eighth.
    y = (word << 2).to(tl.int32, bitcast=True).to(tl.float32) * 2.0**-31
    square = y * y
    sine = y * (((square * SIN_3 + SIN_2) * square + SIN_1) * square + SIN_0)
    cosine = ((square * COS_2 + COS_1) * square + COS_0) * square + 1.0
    nearest = word + 0x20000000
    odd = (nearest & 0x40000000) != 0
    return (
        _apply_sign(tl.where(odd, cosine, sine), nearest),
        _apply_sign(tl.where(odd, sine, cosine), nearest + 0x40000000),
    )


@triton.jit
def normal_pair(word_a, word_b):
    """Two independent normals by Box-Muller."""
    radius = tl.sqrt(minus_two_log(uniform(word_a)))
    sine, cosine = sin_cos_turn(word_b)
    return radius * cosine, radius * sine


@triton.jit
def _four_lanes(block, identity, step, seed, purpose, KIND: tl.constexpr):
    """The four numbers of each block."""
    a, b, c, d = words(block, identity, step, seed, purpose)
    if KIND == NORMAL:
        a, b = normal_pair(a, b)
        c, d = normal_pair(c, d)
    elif KIND == UNIFORM:
        a, b, c, d = uniform(a), uniform(b), uniform(c), uniform(d)
    return a, b, c, d


@triton.jit
def numbers(block, identity, step, seed, purpose, KIND: tl.constexpr, BLOCKS: tl.constexpr):
    """float32 normals or uniforms, or uint32 words [R, 4 BLOCKS], of the BLOCKS counter blocks that start at each of ``block`` [R, 1].

    The blocks of a row are drawn apart and joined in registers: as one tile [R, BLOCKS] they would cross threads.
    """
    a, b, c, d = _four_lanes(block, identity, step, seed, purpose, KIND)
    if BLOCKS == 2:
        e, f, g, h = _four_lanes(block + 1, identity, step, seed, purpose, KIND)
        a, b, c, d = tl.join(a, e), tl.join(b, f), tl.join(c, g), tl.join(d, h)
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (block.shape[0], 4 * BLOCKS))


@triton.jit
def signs(channel, position, positions, identity, step, seed, purpose):
    """+1 or -1 [R, 4] at four neighbouring positions a row: 128 bits a block, the least significant bit of word 0 first."""
    first = tl.min(position, axis=1, keep_dims=True)
    block = channel * ((positions + 127) // 128) + first // 128
    a, b, c, d = words(block, identity, step, seed, purpose)
    which = (first // 32) % 4
    word = tl.where(which < 2, tl.where(which == 0, a, b), tl.where(which == 2, c, d))
    bit = (word >> (position % 32).to(tl.uint32)) & 1
    return 1 - 2 * bit.to(tl.int32)


@triton.jit
def first_word(identity, step, seed, purpose):
    """Word 0 of block 0: the one number a sample draws for its time or its flip."""
    return words(tl.full((), 0, tl.uint32), identity, step, seed, purpose)[0]
