"""What a launcher would run on a GPU, compiled ahead of time without one: registers, memory and instructions of the machine code."""

import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import triton

# Of compilers that the budgets were not made for: (instructions, registers). 3.6 and 3.8 need up to 4.2 % and 8 more.
ROOM = (1.0, 0) if triton.__version__.startswith("3.7.") else (1.05, 8)

TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")
RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")


class Recorder:
    """Stands for a kernel and keeps the arguments of its launches."""

    def __init__(self, kernel):
        self.kernel, self.launches = kernel, []

    def __getitem__(self, grid):
        return lambda *values, **options: self.launches.append((values, options))


@dataclass(frozen=True)
class Binary:
    """One compiled kernel: what it takes and the opcodes of its listing, in its order."""

    registers: int
    stack: int
    shared: int
    local: int
    listing: tuple[str, ...]
    elements_per_thread: float

    @cached_property
    def opcodes(self):
        return Counter(self.listing)

    @property
    def instructions_per_element(self):
        return (self.opcodes.total() - self.opcodes["NOP"]) / self.elements_per_thread

    def places(self, *prefixes):
        """Where in the listing such opcodes are."""
        return [place for place, opcode in enumerate(self.listing) if opcode.startswith(prefixes)]

    def count(self, *prefixes):
        return sum(n for opcode, n in self.opcodes.items() if opcode.startswith(prefixes))


def intermediate(recorder, capability=90, target=None):
    """What Triton makes of the recorded launch, specialised as the just-in-time compiler would; ``asm`` holds every stage of it.

    target: another one than NVIDIA's of that capability.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    values, options = recorder.launches[0]
    kernel = recorder.kernel
    arguments = dict(zip(kernel.arg_names, values, strict=False)) | options
    asked = ("num_warps", "num_stages", "enable_fp_fusion")  # by every launch: what Triton does by default changes with its version
    launch_options = {name: options[name] for name in (*asked, *(("maxnreg",) if "maxnreg" in options else ()))}
    source = ASTSource(kernel, *_specialised(kernel.params, arguments))
    return triton.compile(source, target=target or GPUTarget("cuda", capability, 32), options=launch_options)


def compiled(recorder, capability, folder):
    """The binary of the recorded launch."""
    options, cubin = recorder.launches[0][1], folder / "kernel.cubin"
    built = intermediate(recorder, capability)
    cubin.write_bytes(built.asm["cubin"])
    registers, stack, local = map(int, RESOURCES.search(_tool("cuobjdump", "-res-usage", cubin)).groups())
    # Counter blocks of 4 numbers, or of 128 signs; kernels without blocks are not counted by the element.
    elements = options.get("ROWS", 1) * (options["BLOCKS"] * 4 if "BLOCKS" in options else 128)
    listing = tuple(INSTRUCTION.findall(_tool("nvdisasm", cubin)))
    return Binary(registers, stack, built.metadata.shared, local, listing, elements / (32 * options["num_warps"]))


def _specialised(parameters, arguments):
    """(signature, constants, attributes): pointers and multiples of 16 are marked as such, ones become constants."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(parameters):
        signature[parameter.name] = _specialise((i,), arguments[parameter.name], parameter, constants, attributes)
    return signature, constants, attributes


def _specialise(path, value, parameter, constants, attributes):
    """The type of an argument, or of each element of a tuple; its constants and attributes are entered under its path."""
    if isinstance(value, tuple):
        return tuple(_specialise((*path, i), element, parameter, constants, attributes) for i, element in enumerate(value))
    special = not parameter.do_not_specialize
    if parameter.is_constexpr or value is None or (special and type(value) is int and value == 1):
        constants[path] = value
        return "constexpr"
    if isinstance(value, torch.Tensor) or (special and isinstance(value, int) and value % 16 == 0):
        attributes[path] = [["tt.divisibility", 16]]
    return _type(value, parameter)


def _type(value, parameter):
    if isinstance(value, torch.Tensor):
        return "*" + TYPES[value.dtype]
    if isinstance(value, float):
        return parameter.annotation_type or "fp32"
    return "i32" if abs(value) < 2**31 else "i64"


def _tool(name, *arguments):
    import triton

    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, check=True).stdout
