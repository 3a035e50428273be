"""Philox4x32-10 and the distributions drawn from it, in plain PyTorch: the arithmetic that ``random.py`` specifies.

Every function is pure and works on any device, under ``torch.compile`` and under ``torch.func`` transforms. 32-bit words travel in
int64 tensors, because PyTorch has no uint32 arithmetic.
"""

import enum
import math
from collections.abc import Sequence

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_BUMPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
INDEX_LIMIT = 2**24  # an index has 24 bits of the fourth counter word
GOLDEN = 0x9E3779B9  # 2^32 over the golden ratio: the step of the stratified time lattice

# -2 ln(1 + f) = -2 f + f^2 (1 + f Q(f)) on f in [-0.25, 0.5), relative error 4e-8
LOG_TAIL = (
    -0.6666694283485413,
    0.49992722272872925,
    -0.3996464014053345,
    0.33577635884284973,
    -0.29808881878852844,
    0.24228273332118988,
    -0.11119449883699417,
)
MINUS_TWO_LN2 = -1.3862943649291992
# sin(pi y / 4) = y S(y^2) and cos(pi y / 4) = 1 + y^2 K(y^2) on |y| <= 1, errors 4e-9 and 4e-8
SIN_TAIL = (0.7853981852531433, -0.08074543625116348, 0.00249000103212893, -3.5950459277955815e-05)
COS_TAIL = (-0.3084245026111603, 0.01585039682686329, -0.00031916017178446054)
THREE_QUARTERS_BITS = 0x3F400000
MANTISSA_BITS = 0x7FFFFF


class Stream(enum.IntEnum):
    """The purpose of a number: the low byte of the fourth counter word."""

    x0 = 0
    t = 1
    probe = 2
    dequantise = 3
    label_drop = 4
    flip = 5
    dropout = 6
    data_order = 7
    init = 8
    bridge = 9
    probe_rows = 10


class Kind(enum.IntEnum):
    """The distribution made from the words."""

    normal = 0
    uniform = 1
    sign = 2
    word = 3


LANES = {Kind.normal: 4, Kind.uniform: 4, Kind.sign: 128, Kind.word: 4}


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four output words of each counter; ``counter`` holds broadcastable int64 tensors of 32-bit values."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & MASK, (seed >> 32) & MASK
    for _ in range(ROUNDS):
        (high0, low0), (high1, low1) = _product(c0, MULTIPLIERS[0]), _product(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + KEY_BUMPS[0]) & MASK, (k1 + KEY_BUMPS[1]) & MASK
    return c0, c1, c2, c3


def _product(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the 64-bit product. In 16-bit halves, because compilers may assume that int64 never overflows."""
    low = word * (multiplier & 0xFFFF)
    middle = word * (multiplier >> 16) + (low >> 16)
    return middle >> 16, (middle & 0xFFFF) << 16 | low & 0xFFFF


def sample_ids(key: Tensor, batch: int) -> Tensor:
    """The sample ids [batch] that a key tensor (seed, step, first id) or (seed, step, id_0, ...) stands for."""
    ids = key[2:]
    return ids if ids.shape[0] == batch != 1 else ids[0] + torch.arange(batch, device=key.device)


def words(key: Tensor, batch: int, blocks: int, stream: int, index: int) -> Tensor:
    """Philox words [batch, blocks, 4] of the counters (block, sample id, step, stream | index << 8)."""
    ids = sample_ids(key, batch)[:, None]
    block = torch.arange(blocks, device=key.device)[None, :]
    purpose = torch.full_like(block, stream | index << 8)
    counter = torch.broadcast_tensors(block, ids & MASK, key[1] & MASK, purpose)
    return torch.stack(philox(counter, key[0]), dim=-1)  # type: ignore[arg-type]


def uniform(word: Tensor) -> Tensor:
    """float32 in (0, 1]: the centre of the word's cell, so that the logarithm of it is finite."""
    return word.to(torch.float32) * 2.0**-32 + 2.0**-33


def normal(word: Tensor) -> Tensor:
    """float32 normals [..., 4] by Box-Muller: words 0 and 1 give lanes 0 and 1, words 2 and 3 lanes 2 and 3."""
    radius = torch.sqrt(_minus_two_log(uniform(word[..., 0::2])))
    sine, cosine = _sin_cos_turn(word[..., 1::2])
    return torch.stack([radius * cosine, radius * sine], dim=-1).flatten(-2)


def _minus_two_log(u: Tensor) -> Tensor:
    # u = (1 + f) 2^exponent with 1 + f in [3/4, 3/2). Kernels take the bits apart, which torch before 2.13 does not do under vmap.
    mantissa, exponent = torch.frexp(u)
    is_small = mantissa < 0.75
    exponent = (exponent - is_small.to(exponent.dtype)).to(torch.float32)
    f = torch.where(is_small, 2.0 * mantissa, mantissa) - 1.0
    s = f * f * (_horner(LOG_TAIL, f) * f + 1.0) - 2.0 * f
    return torch.clamp(exponent * MINUS_TWO_LN2 + s, min=0.0)


def _sin_cos_turn(word: Tensor) -> tuple[Tensor, Tensor]:
    """Sine and cosine of the turn word / 2^32: the nearest quarter exactly, the rest by polynomial."""
    quarter = ((word + (1 << 29)) >> 30) & 3
    rest = ((word - (quarter << 30) + (1 << 31)) & MASK) - (1 << 31)
    y = rest.to(torch.float32) * 2.0**-29
    square = y * y
    sine, cosine = y * _horner(SIN_TAIL, square), square * _horner(COS_TAIL, square) + 1.0
    odd = (quarter & 1).bool()
    sine, cosine = torch.where(odd, cosine, sine), torch.where(odd, sine, cosine)
    return _negate_where((quarter & 2).bool(), sine), _negate_where(((quarter + 1) & 2).bool(), cosine)


def _horner(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    result = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        result = result * x + coefficient
    return result


def _negate_where(condition: Tensor, x: Tensor) -> Tensor:
    return torch.where(condition, -x, x)


def sign(word: Tensor) -> Tensor:
    """float32 signs [..., 128]: a set bit is -1, the least significant bit of word 0 first."""
    bits = (word[..., None] >> torch.arange(32, device=word.device)) & 1
    return (1 - 2 * bits).to(torch.float32).flatten(-2)


DISTRIBUTIONS = {Kind.normal: normal, Kind.uniform: uniform, Kind.sign: sign, Kind.word: lambda word: word}


def draw(key: Tensor, shape: tuple[int, ...], kind: Kind, stream: int, index: int = 0) -> Tensor:
    """Numbers of the given shape [B, ...] in their logical order: float32, or int64 words."""
    batch, channels, positions = logical_shape(shape)
    lanes = LANES[kind]
    per_channel = -(-positions // lanes)
    values = DISTRIBUTIONS[kind](words(key, batch, channels * per_channel, stream, index))
    return values.reshape(batch, channels, per_channel * lanes)[:, :, :positions].reshape(shape)


def logical_shape(shape: Sequence[int]) -> tuple[int, int, int]:
    """(B, C, P) of a sample's logical order: C is dimension 1 where there are more than two dimensions."""
    channels = shape[1] if len(shape) > 2 else 1
    return shape[0], channels, math.prod(shape[2:] if len(shape) > 2 else shape[1:])
