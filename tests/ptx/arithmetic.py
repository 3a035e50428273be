"""Arithmetic instructions: of integers, of floats, and the few of 16-bit floats."""

import numpy as np

from ptx.memory import Fault
from ptx.values import BYTES, approximation, flushed, narrowed

WIDER = {"s16": np.int32, "u16": np.uint32, "s32": np.int64, "u32": np.uint64}
# How far, in 2^-24 of the result, the PTX manual lets div.full, sqrt.approx, rsqrt.approx and ex2.approx of float32 be off, rounded up.
DIVISION, ROOT, INVERSE_ROOT, POWER = 4, 2, 2.2, 4


def arithmetic(machine, instruction, active):
    kind = instruction.type
    if kind in ("f32", "f64", "f32x2") or instruction.parts[-2] == "f32":
        found = _floating(machine, instruction)
    elif kind in ("f16", "bf16"):
        found = _half(machine, instruction)
    else:
        found = _integer(machine, instruction, active)
    machine.write(instruction.operands[0], found, active)


def _integer(machine, instruction, active):
    name, kind, operands = instruction.name, instruction.type, instruction.operands[1:]
    if name in ("mul", "mad"):
        return _product(machine, instruction)
    values = [machine.read(operand, kind) for operand in operands]
    if name in ("div", "rem"):
        return _quotient(name, *values, active)
    does = {"add": np.add, "sub": np.subtract, "neg": np.negative, "abs": np.abs, "min": np.minimum, "max": np.maximum}
    return does[name](*values)


def _product(machine, instruction):
    kind, half = instruction.type, instruction.parts[1]
    a, b = (machine.read(operand, kind) for operand in instruction.operands[1:3])
    if half == "lo":
        found = a * b
    else:
        wide = a.astype(WIDER[kind]) * b.astype(WIDER[kind])
        found = wide if half == "wide" else (wide >> WIDER[kind](8 * BYTES[kind])).astype(a.dtype)
    if instruction.name == "mul":
        return found
    width = 8 * found.dtype.itemsize
    return found + machine.read(instruction.operands[3], f"{kind[0]}{width}")


def _quotient(name, a, b, active):
    """Towards zero, as C and PTX divide."""
    zero = b == 0
    if (zero if active is None else zero & active).any():
        raise Fault("a division by zero")
    divisor = np.where(zero, b.dtype.type(1), b)
    quotient = a // divisor if a.dtype.kind == "u" else np.abs(a) // np.abs(divisor) * np.sign(a) * np.sign(divisor)
    return quotient.astype(a.dtype) if name == "div" else (a - quotient * divisor).astype(a.dtype)


def _half(machine, instruction):
    kind, name = instruction.type, instruction.name
    if name == "abs":
        return machine.bits(instruction.operands[1], "b16") & np.uint16(0x7FFF)
    assert name == "max", "another operation of 16-bit floats"
    a, b = (machine.read(operand, kind).astype(np.float32) for operand in instruction.operands[1:])
    return narrowed(_extreme(np.fmax, a, b, True), kind)


def _extreme(function, a, b, with_nan):
    found = function(a, b)
    return np.where(np.isnan(a) | np.isnan(b), a.dtype.type(np.nan), found) if with_nan else found


def _floating(machine, instruction):
    """Of sm_100: f32x2, pairs in registers of 64 bits; f32.bf16 and f32.f16, whose last operand alone is float32."""
    kind, parts, operands = instruction.type, instruction.parts, instruction.operands[1:]
    if parts[-2] == "f32":
        values = [machine.read(operand, kind).astype(np.float32) for operand in operands[:-1]] + [machine.read(operands[-1], "f32")]
    else:
        values = [machine.read(operand, kind) for operand in operands]
    flushing = "ftz" in parts and kind != "f64"
    values = [flushed(each) for each in values] if flushing else values
    found = FLOATING[instruction.name](parts, *values).astype(values[0].dtype)
    return flushed(found) if flushing else found


def _fused(parts, a, b, c):
    """In one rounding, or nearly: float64 in the 64 bits of x86's long double."""
    wide = np.float64 if a.dtype == np.float32 else np.longdouble
    return a.astype(wide) * b.astype(wide) + c.astype(wide)


def _divided(parts, a, b):
    return approximation(a / b, DIVISION) if "full" in parts else a / b


def _root(parts, a):
    return approximation(np.sqrt(a), ROOT) if "approx" in parts else np.sqrt(a)


def _inverse_root(parts, a):
    found = (1.0 / np.sqrt(a.astype(np.float64))).astype(a.dtype)
    return approximation(found, INVERSE_ROOT) if a.dtype == np.float32 else found


def _power_of_two(parts, a):
    return approximation(np.exp2(a.astype(np.float64)).astype(np.float32), POWER)


def _reciprocal(parts, a):
    """rcp.approx.ftz.f64 has the upper half of the bits."""
    assert a.dtype == np.float64, "a reciprocal of float32"
    return ((1.0 / a).view(np.uint64) & np.uint64(0xFFFFFFFF00000000)).view(np.float64)


FLOATING = {
    "add": lambda parts, a, b: a + b,
    "sub": lambda parts, a, b: a - b,
    "mul": lambda parts, a, b: a * b,
    "neg": lambda parts, a: -a,
    "abs": lambda parts, a: np.abs(a),
    "copysign": lambda parts, sign, a: np.copysign(a, sign),
    "max": lambda parts, a, b: _extreme(np.fmax, a, b, "NaN" in parts),
    "min": lambda parts, a, b: _extreme(np.fmin, a, b, "NaN" in parts),
    "fma": _fused,
    "div": _divided,
    "sqrt": _root,
    "rsqrt": _inverse_root,
    "ex2": _power_of_two,
    "rcp": _reciprocal,
}
