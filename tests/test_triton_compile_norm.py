"""The Triton kernels of group_norm_silu compiled for real GPUs, without one: no spills, wide accesses, registers and instructions.

The counts are of the whole kernel, both passes, an element of its tile; a change that exceeds a budget is slower on every GPU.
"""

import os
from dataclasses import dataclass, fields

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted in this process, not compiled", allow_module_level=True)

from triton_binaries import ROOM, Recorder, compiled

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
SMALL, LARGE = (32, 128, 16, 16), (32, 128, 64, 64)  # one tile holds the positions of a program's groups, or not
SMALL_FEW, LARGE_FEW = ((4, *shape[1:]) for shape in (SMALL, LARGE))  # so few samples that a program has fewer channels
MIDDLE = (32, 128, 32, 32)
MIDDLE_FEW = (4, *MIDDLE[1:])
GROUPS = 32
FORMATS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}


@dataclass(frozen=True)
class Case:
    """A launch of forward and backward and what each may cost: (instructions an element, registers, bytes of shared memory)."""

    dtype: torch.dtype
    layout: str
    shape: tuple
    forward: tuple[int, int, int]
    backward: tuple[int, int, int]
    second: bool = False
    plain: bool = False  # neither embedding nor modulation
    dropout: float = 0.0

    def __str__(self):
        options = f"{' two inputs' if self.second else ''}{' plain' if self.plain else ''}{' dropout' if self.dropout else ''}"
        return f"{self.dtype} {self.layout} {self.shape}{options}".replace("torch.", "")


CASES = [
    Case(BFLOAT16, "NHWC", SMALL, (27, 72, 1024), (38, 128, 1024)),
    Case(BFLOAT16, "NCHW", SMALL, (29, 44, 8), (41, 64, 16)),
    Case(FLOAT32, "NHWC", SMALL, (28.5, 64, 1024), (36.5, 128, 1024)),
    Case(FLOAT32, "NCHW", SMALL, (38.5, 48, 32), (55, 72, 32)),
    Case(BFLOAT16, "NHWC", LARGE, (34, 64, 512), (56, 168, 512)),
    Case(BFLOAT16, "NCHW", LARGE, (90, 56, 16), (74, 56, 16)),  # the compiler repeats the moments' loop four times
    Case(BFLOAT16, "NHWC", LARGE, (40, 80, 512), (62, 168, 512), second=True),
    Case(BFLOAT16, "NHWC", SMALL_FEW, (28, 72, 256), (40, 128, 256)),
    Case(BFLOAT16, "NHWC", MIDDLE_FEW, (29, 72, 1024), (40, 128, 1024)),  # held by twice the threads, since they have the registers
    Case(BFLOAT16, "NHWC", LARGE_FEW, (35.5, 64, 256), (58, 168, 256)),
    Case(FLOAT32, "NHWC", LARGE_FEW, (36, 72, 128), (63, 128, 128)),
    Case(BFLOAT16, "NHWC", LARGE, (32, 56, 512), (51, 128, 512), plain=True),
    Case(BFLOAT16, "NHWC", LARGE_FEW, (34, 64, 256), (53, 168, 256), plain=True),
]
DROPOUTS = [
    Case(BFLOAT16, "NHWC", SMALL, (45, 104, 1024), (54, 136, 1024), dropout=0.1),
    Case(BFLOAT16, "NCHW", SMALL, (46, 56, 8), (59, 64, 16), dropout=0.1),
    Case(BFLOAT16, "NHWC", MIDDLE, (53, 96, 512), (80, 168, 512), dropout=0.1),  # the backward pass notes what it drew
    Case(BFLOAT16, "NHWC", LARGE, (53, 96, 512), (92, 168, 512), dropout=0.1),
]


def record(case, monkeypatch):
    """The forward and the backward kernel with the arguments that their launchers give them."""
    from fm_fast.kernels import group_norm_silu, group_norm_silu_backward

    recorders = []
    for module, name in ((group_norm_silu, "group_norm_silu_kernel"), (group_norm_silu_backward, "group_norm_silu_backward_kernel")):
        recorders.append(Recorder(getattr(module, name)))
        monkeypatch.setattr(module, name, recorders[-1])
    parameters = Recorder(group_norm_silu_backward.parameter_gradients_kernel)
    monkeypatch.setattr(group_norm_silu_backward, "parameter_gradients_kernel", parameters)
    _launch(case, group_norm_silu.launch, group_norm_silu_backward.launch)
    return *recorders, parameters


def _launch(case, forward, backward):
    batch, channels, *size = case.shape

    def full(count):
        return torch.empty(batch, count, *size, dtype=case.dtype).to(memory_format=FORMATS[case.layout])

    x, second = (full(channels // 2), full(channels // 2)) if case.second else (full(channels), torch.empty(0))
    y, weight, statistics, key = full(channels), torch.empty(channels), torch.empty(batch, GROUPS), torch.tensor([1, 2, 3])
    table = torch.empty(0) if case.plain else torch.empty(batch, channels)
    inputs, tail = (x, second, table, weight, weight, table, table), (True, case.dropout, 1)
    forward(y, statistics, statistics, *inputs, key, GROUPS, 1e-5, *tail)
    backward(*inputs, y, *inputs, statistics, statistics, key, GROUPS, *tail)


def build(case, capability, monkeypatch, folder):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder / "cache"))
    recorders = record(case, monkeypatch)
    binaries = [compiled(recorder, capability, folder) for recorder in recorders]
    options = [recorder.launches[0][1] for recorder in recorders]
    return [(built, option) for built, option in zip(binaries, options, strict=True)]


def assert_cost(case, capability, monkeypatch, folder, room=1.0, register_room=0):
    """``room`` is for architectures that the budget was not made for."""
    forward, backward, parameters = build(case, capability, monkeypatch, folder)
    for (built, options), budget in ((forward, case.forward), (backward, case.backward)):
        instructions, registers, shared = budget
        elements = options["CHANNELS"] * options["POSITIONS"] * options["SPLIT"] / (32 * options["num_warps"])
        assert (built.stack, built.local, built.count("LDL", "STL")) == (0, 0, 0)
        assert built.shared <= shared
        assert built.registers <= registers + register_room
        assert (built.opcodes.total() - built.opcodes["NOP"]) / elements <= instructions * room
        assert_wide_accesses(built, case, elements)
    assert (parameters[0].stack, parameters[0].local) == (0, 0)


def assert_wide_accesses(built, case, elements):
    """Full-size tensors move in 128-bit accesses; nothing smaller than 32 bits is ever loaded or stored."""
    assert built.count("LDG.E.128") >= elements * case.dtype.itemsize / 16
    assert built.count("STG.E.128") >= elements * case.dtype.itemsize / 16
    assert built.count("LDG.E.U8", "LDG.E.U16", "LDG.E.S16", "STG.E.U16", "STG.E.U8") == 0


@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_norms_on_sm_90(case, monkeypatch, tmp_path):
    assert_cost(case, 90, monkeypatch, tmp_path, *ROOM)


@pytest.mark.slow
@pytest.mark.parametrize("case", [*CASES[2:], *DROPOUTS], ids=str)
def test_more_norms_on_sm_90(case, monkeypatch, tmp_path):
    assert_cost(case, 90, monkeypatch, tmp_path, *ROOM)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 100])
@pytest.mark.parametrize("case", [*CASES, *DROPOUTS], ids=str)
def test_norms_on_other_architectures(case, capability, monkeypatch, tmp_path):
    assert_cost(case, capability, monkeypatch, tmp_path, 1.15, 24)


@pytest.mark.parametrize(("version", "asked"), [(None, {"maxnreg"}), ("7.0", set())])
def test_launches_ask_a_compiler_for_what_it_knows(version, asked, monkeypatch):
    """Triton refuses other words: on AMD the first backward pass failed by the limit of registers."""
    from triton.backends.amd.compiler import HIPOptions
    from triton.backends.nvidia.compiler import CUDAOptions

    monkeypatch.setattr(torch.version, "hip", version)
    known = {field.name for field in fields(HIPOptions if version else CUDAOptions)}
    words = set()
    for recorder in record(Case(BFLOAT16, "NHWC", LARGE, (), (), plain=True), monkeypatch):
        words |= set(recorder.launches[0][1]) - set(recorder.kernel.arg_names)
    assert words <= known and words & {"maxnreg"} == asked
