"""Launches of Triton's kernels on tensors of the CPU: compiled for a GPU, and the PTX run here."""

import contextlib
import struct

import pytest
import torch

from ptx.machine import Machine
from ptx.memory import GlobalMemory
from ptx.operations import OPERATIONS
from ptx.program import parse

THREADS = 16384  # that go through a program together, at most
BY_ADDRESS = ("adamw_ema", "adamw_ema_norm")  # ops whose kernels find tensors by addresses in a table
HIDDEN = 4  # parameters that Triton adds: scratch memory and the like, which these kernels do not use


class Launcher:
    """Takes the place of JITFunction.run. ``beside``: tensors that a kernel may touch beside its own arguments."""

    def __init__(self, compile_kernel):
        self._compile, self._programs, self.architectures, self.beside = compile_kernel, {}, set(), []

    def __call__(self, kernel, *arguments, grid, warmup, **options):
        compiled = self._compile(kernel, *arguments, grid=grid, warmup=True, **options)
        names = [parameter.name for parameter in kernel.params]
        given = dict(zip(names, arguments, strict=False)) | {name: options[name] for name in names if name in options}
        values = [pair for name, kind in compiled.src.signature.items() for pair in _flat(kind, given[name])]
        program = self._programs.setdefault(compiled.hash, parse(compiled.asm["ptx"]))
        self.architectures.add(compiled.metadata.target.arch)
        tensors = [value for _, value in values if isinstance(value, torch.Tensor)]
        memory = GlobalMemory([span for span in map(_span, [*tensors, *self.beside]) if span])
        self._run(program, [*(_bits(*pair) for pair in values), *[0] * HIDDEN], grid, memory, compiled.metadata.shared)
        return compiled

    def _run(self, program, arguments, grid, memory, shared_bytes):
        grid = (*grid, 1, 1)[:3]
        blocks, together = grid[0] * grid[1] * grid[2], max(1, THREADS // program.threads)
        for first in range(0, blocks, together):
            some = range(first, min(first + together, blocks))
            Machine(program, OPERATIONS, arguments, grid, some, memory, shared_bytes).run()


def _flat(kind, value):
    """(type, value) of an argument and, where it is a tuple, of its parts; none of what is known when a kernel is compiled."""
    if isinstance(kind, tuple):
        return [pair for one, part in zip(kind, value, strict=True) for pair in _flat(one, part)]
    return [] if kind == "constexpr" else [(kind, value)]


def _bits(kind, value):
    """As the driver hands it to the kernel."""
    if kind.startswith("*"):
        return 0 if value is None else value.data_ptr()
    if kind in ("fp32", "fp64"):
        return int.from_bytes(struct.pack("<f" if kind == "fp32" else "<d", value), "little")
    return int(value)


def _span(tensor):
    """The addresses between which its elements lie."""
    if tensor.numel() == 0:
        return None
    reach = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + reach * tensor.element_size()


def _by_address(op, launcher):
    from fm_fast import kernels

    def run(*arguments):
        lists = [argument if isinstance(argument, (list, tuple)) else [argument] for argument in arguments]
        launcher.beside = [part for parts in lists for part in parts if isinstance(part, torch.Tensor)]
        kernels._lazily(op)(*arguments)
        launcher.beside = []

    return run


@contextlib.contextmanager
def launches_on_the_cpu():
    """Let backend "triton" run on the CPU; yields the launcher. A driver must be there, as that of tests/triton_driver.py."""
    from triton.runtime.jit import JITFunction

    from fm_fast import _backends, kernels

    launcher = Launcher(JITFunction.run)
    library = torch.library.Library("fm_fast_triton", "IMPL")
    for op in kernels.LAUNCHERS:
        library.impl(op, _by_address(op, launcher) if op in BY_ADDRESS else kernels._lazily(op), "CPU")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", lambda kernel, *arguments, **options: launcher(kernel, *arguments, **options))
        for op in _backends.OPS:
            patch.setitem(_backends._REASONS, (op, "cpu", "triton"), None)
        yield launcher
    library._destroy()
