"""What instructions do, by name: functions of (machine, instruction, active threads or None for all)."""

import numpy as np

from ptx.arithmetic import arithmetic
from ptx.values import BYTES, SIGNED, UNSIGNED, interpreted, narrowed


def _listed(operand):
    """The registers of a vector, or the one."""
    return [part.strip() for part in operand.strip("{} ").split(",")]


def _threads(machine, active):
    return np.arange(machine.threads) if active is None else np.nonzero(active)[0]


def _spread(machine, threads, values):
    """[threads] with values at some of them."""
    found = np.zeros(machine.threads, values.dtype)
    found[threads] = values
    return found


# Memory


def load(machine, instruction, active):
    target, source = instruction.operands
    size, space = BYTES[instruction.type], instruction.parts[1]
    if space == "param":
        number = int(source.strip("[]").rsplit("_", 1)[1])
        bits = np.full(machine.threads, machine.arguments[number] & ((1 << (8 * size)) - 1), UNSIGNED[size])
        return machine.write(target, interpreted(bits, instruction.type) if instruction.type[0] == "s" else bits, active)
    threads, registers, addresses = _threads(machine, active), _listed(target), machine.address(source)
    if space == "global":
        found = machine.memory.load(addresses[threads], size, len(registers))
    else:
        found = machine.shared.load(machine.block[threads], addresses[threads], size, len(registers))
    for register, values in zip(registers, found, strict=True):
        signed = np.ascontiguousarray(values).view(SIGNED[size]) if instruction.type[0] == "s" else values
        machine.write(register, _spread(machine, threads, signed), active)
    return None


def store(machine, instruction, active):
    target, source = instruction.operands
    size, threads, addresses = BYTES[instruction.type], _threads(machine, active), machine.address(target)
    values = np.stack([machine.bits(register, f"b{8 * size}")[threads] for register in _listed(source)])
    if instruction.parts[1] == "global":
        machine.memory.store(addresses[threads], values)
    else:
        machine.shared.store(machine.block[threads], addresses[threads], values)


def atomic(machine, instruction, active):
    assert instruction.parts[-2:] == ("add", "u64"), "another atomic operation"
    target, source, values = instruction.operands
    threads = _threads(machine, active)
    found = machine.memory.add(machine.address(source)[threads], machine.bits(values, "u64")[threads])
    machine.write(target, _spread(machine, threads, found), active)


def load_matrix(machine, instruction, active):
    """8x8 matrices of 16 bits; thread i of each eight names row i, and gets two neighbours of a row."""
    target, source = instruction.operands
    for register, blocks, addresses, threads in _matrices(machine, target, source, active):
        rows = machine.shared.load(blocks.repeat(8), addresses.ravel(), 2, 8).T.reshape(-1, 8, 8)
        rows = rows.transpose(0, 2, 1) if "trans" in instruction.parts else rows
        pairs = rows.reshape(-1, 32, 2).astype(np.uint32)
        machine.write(register, _spread(machine, threads, (pairs[..., 0] | pairs[..., 1] << np.uint32(16)).ravel()), active)


def store_matrix(machine, instruction, active):
    target, source = instruction.operands
    for register, blocks, addresses, threads in _matrices(machine, source, target, active):
        pairs = machine.bits(register, "b32")[threads].reshape(-1, 32)
        rows = np.stack([pairs & np.uint32(0xFFFF), pairs >> np.uint32(16)], -1).astype(np.uint16).reshape(-1, 8, 8)
        rows = rows.transpose(0, 2, 1) if "trans" in instruction.parts else rows
        machine.shared.store(blocks.repeat(8), addresses.ravel(), np.ascontiguousarray(rows.reshape(-1, 8).T))


def _matrices(machine, registers, address, active):
    """Of each: its register, the blocks of the warps, the addresses of their rows [warps, 8], and the threads of the warps."""
    machine.require_whole_warps(active)
    threads = _threads(machine, active)
    first, addresses = threads[::32], machine.address(address)
    for number, register in enumerate(_listed(registers)):
        yield register, machine.block[first], addresses[first[:, None] + 8 * number + np.arange(8)], threads


# Between threads


def shuffle(machine, instruction, active):
    target, source, lane, bound, members = instruction.operands
    assert (int(bound, 0), members) == (31, "-1"), "another shuffle"
    machine.require_whole_warps(active)
    values, where = machine.bits(source, "b32"), machine.bits(lane, "b32").astype(np.int64)
    lanes = machine.lane ^ where if instruction.parts[2] == "bfly" else where & 31
    machine.write(target, values[machine.first_of_warp + lanes], active)


def reduction(machine, instruction, active):
    assert instruction.parts[2] == "add", "another reduction"
    machine.require_whole_warps(active)
    values = machine.read(instruction.operands[1], "s32").reshape(-1, 32)
    machine.write(instruction.operands[0], values.sum(1, dtype=np.int32).repeat(32), active)


# Moves, comparisons, conversions


def move(machine, instruction, active):
    target, source = instruction.operands
    kind, width = instruction.type, BYTES.get(instruction.type, 0)
    if target.startswith("{"):
        parts, values = _listed(target), machine.bits(source, kind)
        for number, register in enumerate(parts):
            piece = values >> values.dtype.type(8 * width // len(parts) * number)
            machine.write(register, piece.astype(UNSIGNED[width // len(parts)]), active)
    elif source.startswith("{"):
        parts, found = _listed(source), np.zeros(machine.threads, UNSIGNED[width])
        piece = width // len(parts)
        for number, register in enumerate(parts):
            found |= machine.bits(register, f"b{8 * piece}").astype(found.dtype) << found.dtype.type(8 * piece * number)
        machine.write(target, found, active)
    else:
        machine.write(target, machine.bits(source, kind), active)


def compare(machine, instruction, active):
    target, *operands = instruction.operands
    a, b = (machine.read(operand, instruction.type) for operand in operands)
    unordered = np.isnan(a) | np.isnan(b) if a.dtype.kind == "f" else np.zeros(machine.threads, bool)
    name = instruction.parts[1]
    if name in ("nan", "num"):
        return machine.write(target, unordered if name == "nan" else ~unordered, active)
    relation = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}
    holds = relation[name[:2]](a, b)
    return machine.write(target, holds | unordered if name.endswith("u") else holds & ~unordered, active)


def select(machine, instruction, active):
    target, one, other, predicate = instruction.operands
    values = (machine.bits(operand, instruction.type) for operand in (one, other))
    machine.write(target, np.where(machine.bits(predicate, "pred"), *values), active)


def convert(machine, instruction, active):
    target, *operands = instruction.operands
    to, source = instruction.parts[-2:]
    if to in ("bf16x2", "f16x2"):
        high, low = (narrowed(machine.read(operand, "f32"), to[:-2]).astype(np.uint32) for operand in operands)
        return machine.write(target, high << np.uint32(16) | low, active)
    values = machine.read(operands[0], source)
    if to in ("bf16", "f16"):
        return machine.write(target, narrowed(values, to), active)
    if to in ("f32", "f64"):
        return machine.write(target, values.astype(np.float32 if to == "f32" else np.float64), active)
    assert values.dtype.kind in "iu", "a conversion of floats to integers"
    return machine.write(target, values.astype((SIGNED if to[0] == "s" else UNSIGNED)[BYTES[to]]), active)


# Bits


def logic(machine, instruction, active):
    target, *operands = instruction.operands
    values = [machine.bits(operand, instruction.type) for operand in operands]
    does = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert}
    machine.write(target, does[instruction.name](*values), active)


def shift(machine, instruction, active):
    """By the register's width or more: zeros, or the sign."""
    target, operand, by = instruction.operands
    values = machine.read(operand, instruction.type) if instruction.name == "shr" else machine.bits(operand, instruction.type)
    count, width = machine.bits(by, "u32").astype(np.int64), 8 * BYTES[instruction.type]
    limited = np.minimum(count, width - 1).astype(values.dtype)
    found = np.left_shift(values, limited) if instruction.name == "shl" else np.right_shift(values, limited)
    if values.dtype.kind == "u":
        found = np.where(count >= width, values.dtype.type(0), found)
    machine.write(target, found, active)


def extract(machine, instruction, active):
    target, operand, start, length = instruction.operands
    start, length = int(start), int(length)
    values = machine.bits(operand, "u32") >> np.uint32(start)
    if instruction.type == "u32":
        return machine.write(target, values & np.uint32((1 << length) - 1), active)
    return machine.write(target, (values << np.uint32(32 - length)).view(np.int32) >> np.int32(32 - length), active)


def permute(machine, instruction, active):
    """Four of the eight bytes of two registers."""
    target, one, other, selector = instruction.operands
    pair = machine.bits(one, "u64") | machine.bits(other, "u64") << np.uint64(32)
    found = np.zeros(machine.threads, np.uint64)
    for place in range(4):
        byte = int(selector.rstrip("U"), 0) >> 4 * place & 15
        assert byte < 8, "a sign in place of a byte"
        found |= (pair >> np.uint64(8 * byte) & np.uint64(255)) << np.uint64(8 * place)
    machine.write(target, found.astype(np.uint32), active)


OPERATIONS = {
    "ld": load,
    "st": store,
    "atom": atomic,
    "ldmatrix": load_matrix,
    "stmatrix": store_matrix,
    "shfl": shuffle,
    "redux": reduction,
    "mov": move,
    "setp": compare,
    "selp": select,
    "cvt": convert,
    "shl": shift,
    "shr": shift,
    "bfe": extract,
    "prmt": permute,
    **dict.fromkeys(("and", "or", "xor", "not"), logic),
    **dict.fromkeys(
        ("add", "sub", "mul", "mad", "div", "rem", "neg", "abs", "min", "max", "fma", "sqrt", "rsqrt", "ex2", "rcp", "copysign"), arithmetic
    ),
}
