"""Registers as numpy arrays of unsigned numbers, one element a thread, and what the types of PTX make of their bits."""

import re

import numpy as np

BYTES = {kind + str(8 * size): size for size in (1, 2, 4, 8) for kind in "bus"} | {"f16": 2, "bf16": 2, "f32": 4, "f64": 8, "f32x2": 8}
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SIGNED = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
REGISTERS = {"p": np.bool_, "rs": np.uint16, "r": np.uint32, "rd": np.uint64, "temporary": np.uint32}
POISON = 0x7FF123457FC54321  # NaN as a float of any width, and no small number
LEAST_NORMAL = np.float32(2.0**-126)


def register_type(name):
    return REGISTERS[re.match(r"%(temporary|p|rs|rd|r)\d*$", name)[1]]


def poison(dtype, count):
    """What a register holds before it is written."""
    if dtype is np.bool_:
        return np.zeros(count, bool)
    return np.full(count, POISON & ((1 << (8 * np.dtype(dtype).itemsize)) - 1), dtype)


def interpreted(bits, kind):
    """The bits of registers as numbers of that type; bfloat16 as float32, pairs of float32 [threads, 2]."""
    if kind.startswith("s"):
        return bits.view(SIGNED[BYTES[kind]])
    if kind == "f32x2":
        return np.ascontiguousarray(bits).view(np.float32).reshape(-1, 2)
    if kind == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return bits.view({"f16": np.float16, "f32": np.float32, "f64": np.float64}[kind]) if kind.startswith("f") else bits


def to_bits(values, dtype):
    """Numbers as the bits of registers of that dtype; signed ones keep their sign where registers are wider."""
    if dtype is np.bool_:
        return values.astype(bool)
    width = np.dtype(dtype).itemsize
    if values.dtype.kind == "b":
        return values.astype(dtype)
    if values.dtype.kind == "i" and values.dtype.itemsize < width:
        values = values.astype(SIGNED[width])
    values = np.ascontiguousarray(values)
    if values.ndim == 2:
        return values.view(dtype).reshape(-1)
    return values.view(UNSIGNED[values.dtype.itemsize]).astype(dtype)


def to_bfloat16(values):
    """Rounded to nearest even, as uint16."""
    bits = values.astype(np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FFF), rounded).astype(np.uint16)


def narrowed(values, kind):
    """float16 or bfloat16, as uint16."""
    return to_bfloat16(values) if kind == "bf16" else values.astype(np.float16).view(np.uint16)


def flushed(values):
    """float32 without subnormal numbers, as instructions with .ftz have them."""
    return np.where(np.abs(values) < LEAST_NORMAL, np.copysign(np.float32(0), values), values).astype(np.float32)


def approximation(values, units):
    """What an approximate instruction may give in place of float32 values: off by up to so many times 2^-24 of them, the same for a value
    each time, in no order.
    """
    shuffled = values.view(np.uint32) * np.uint32(0x9E3779B1)
    off = 1.0 + (shuffled * 2.0**-31 - 1.0) * units * 2.0**-24
    moved = (values.astype(np.float64) * off).astype(np.float32)
    return np.where(np.isfinite(values) & (values != 0), moved, values).astype(np.float32)
