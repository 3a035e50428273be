"""Blocks of threads that go through a program together as long as their branches do."""

import re

import numpy as np

from ptx.memory import Fault, SharedMemory
from ptx.values import BYTES, UNSIGNED, interpreted, poison, register_type, to_bits

WARP = 32
ADDRESS = re.compile(r"\[\s*(%\w+|global_smem)\s*(?:\+\s*(-?\d+))?\s*\]$")
HEXADECIMAL_FLOAT = re.compile(r"0([fd])([0-9A-Fa-f]+)$")
SHARED_ROOM = 64  # bytes beside what a launch asks for, as Triton's static allocation has them


class Machine:
    """Some blocks of a launch: ``arguments`` are the bits of the kernel's parameters.

    Raises Fault for what a device would not survive, or do differently each time.
    """

    def __init__(self, program, operations, arguments, grid, blocks, memory, shared_bytes):
        self.program, self.arguments, self.memory = program, arguments, memory
        self._operations, self._grid, self._registers = operations, grid, {}
        self.threads = program.threads * len(blocks)
        self.block = np.repeat(np.arange(len(blocks)), program.threads)
        self.lane = np.tile(np.arange(program.threads), len(blocks)) % WARP
        self.first_of_warp = np.arange(self.threads) - self.lane
        self.shared = SharedMemory(len(blocks), shared_bytes + SHARED_ROOM)
        self._special = self._special_registers(np.asarray(blocks))

    def _special_registers(self, blocks):
        across, down, _ = self._grid
        place = {"x": blocks % across, "y": blocks // across % down, "z": blocks // across // down}
        found = {f"%ctaid.{axis}": np.repeat(numbers, self.program.threads) for axis, numbers in place.items()}
        found |= {f"%nctaid.{axis}": np.full(self.threads, size) for axis, size in zip("xyz", self._grid, strict=True)}
        thread = np.tile(np.arange(self.program.threads), len(blocks))
        found |= {"%tid.x": thread, "%ntid.x": np.full(self.threads, self.program.threads), "%laneid": self.lane}
        return {name: numbers.astype(np.uint32) for name, numbers in found.items()}

    # Operands

    def bits(self, operand, kind):
        """Unsigned numbers [threads] of the type's width; booleans for predicates."""
        if operand.startswith("%"):
            held = self._register(operand)
            return held if kind == "pred" or held.dtype == np.bool_ else held.astype(UNSIGNED[BYTES[kind]], copy=False)
        if kind == "pred":
            return np.full(self.threads, int(operand, 0) != 0)
        width = BYTES[kind]
        return np.full(self.threads, _constant(operand) & ((1 << (8 * width)) - 1), UNSIGNED[width])

    def read(self, operand, kind):
        """Numbers of that type."""
        return interpreted(self.bits(operand, kind), kind)

    def write(self, register, values, active):
        """Of the active threads; None: all."""
        if register == "_":
            return
        held = to_bits(values, register_type(register))
        self._registers[register] = np.array(held) if active is None else np.where(active, held, self._register(register))

    def address(self, operand):
        register, offset = ADDRESS.match(operand).groups()
        base = self.bits(register, "u64") if register.startswith("%") else np.zeros(self.threads, np.uint64)
        return base + np.uint64(int(offset or 0) & (2**64 - 1))

    def _register(self, name):
        if name in self._special:
            return self._special[name]
        if name not in self._registers:
            self._registers[name] = poison(register_type(name), self.threads)
        return self._registers[name]

    # Control flow

    def run(self):
        """Those that are least far go on, until they meet others, so that threads which parted come together again."""
        self._place, self._alive = np.zeros(self.threads, np.int64), np.ones(self.threads, bool)
        self._waiting = np.zeros(self.threads, bool)
        with np.errstate(all="ignore"):
            self._run()

    def _run(self):
        while self._alive.any():
            ready = self._alive & ~self._waiting
            if not ready.any():
                raise Fault(f"{self.program.name}: a barrier at which not all threads of a block arrive")
            places = np.unique(self._place[ready])
            group = ready & (self._place == places[0])
            self._advance(group, int(places[0]), int(places[1]) if len(places) > 1 else -1)

    def _advance(self, group, place, others):
        """One group, until it parts, ends, waits, or comes to where others are."""
        everyone = bool(group.all())
        while True:
            instruction = self.program.instructions[place]
            active = self._active(instruction, group)
            if instruction.name in ("bar", "barrier", "ret", "exit"):
                ends = instruction.name in ("ret", "exit")
                self._place[group] = place + 1
                self._alive &= ~active if ends else True
                self._waiting |= group & (not ends)
                return self._release()
            if instruction.name == "bra":
                target, taken = self.program.labels[instruction.operands[0]], int(active.sum())
                if 0 < taken < int(group.sum()):
                    self._place[group], self._place[active] = place + 1, target
                    return None
                place = target if taken else place + 1
            else:
                self._perform(instruction, None if everyone and active.all() else active)
                place += 1
            if 0 <= others <= place:
                self._place[group] = place
                return None

    def _active(self, instruction, group):
        if instruction.predicate is None:
            return group
        holds = self.bits(instruction.predicate, "pred")
        return group & (~holds if instruction.negated else holds)

    def _release(self):
        """Blocks of which all threads that are left have come to the barrier go on."""
        blocks = int(self.block[-1]) + 1
        absent = np.bincount(self.block[self._alive & ~self._waiting], minlength=blocks)
        self._waiting &= self._alive & (absent > 0)[self.block]

    def _perform(self, instruction, active):
        if active is not None and not active.any():
            return
        try:
            self._operations[instruction.name](self, instruction, active)
        except (Fault, KeyError, ValueError, TypeError, AssertionError) as error:
            raise Fault(f"{self.program.name}: {instruction.text}: {error or type(error).__name__}") from error

    def require_whole_warps(self, active):
        """For instructions that threads of a warp carry out together."""
        if active is not None and (active.reshape(-1, WARP).sum(1) % WARP).any():
            raise Fault("by a part of a warp")


def _constant(text):
    number = HEXADECIMAL_FLOAT.match(text)
    if number:
        return int(number[2], 16)
    return 0 if text == "global_smem" else int(text.rstrip("U"), 0)
