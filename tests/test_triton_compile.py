"""The Triton kernels compiled for real GPUs, without one: no spills, wide accesses, and an instruction budget an element.

The budgets are the larger of the counts of Triton 3.6 and 3.7.1, with a little room; a change that exceeds one is slower on every GPU.
"""

import inspect
import os
from dataclasses import dataclass

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted in this process, not compiled", allow_module_level=True)

from triton_binaries import Recorder, compiled

SHAPE = (4, 3, 32, 32)  # one tile a program, no remainder
OT, VP, COSINE = (0, 0.0, 0.0), (1, 0.1, 20.0), (3, 0.0, 0.0)
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16


@dataclass(frozen=True)
class Case:
    """A launch and what it may cost: instructions an element, registers, bytes of shared memory."""

    op: str
    dtype: torch.dtype
    instructions: int
    registers: int = 40
    shared: int = 0
    x1_dtype: torch.dtype | None = None
    draw: bool = True
    path: tuple = OT
    shape: tuple = SHAPE

    def __str__(self):
        x1 = f" x1 {self.x1_dtype}" if self.x1_dtype else ""
        return f"{self.op} {self.dtype}{x1}{'' if self.draw else ' x0 given'} path {self.path[0]} {self.shape}".replace("torch.", "")


# The sums of a program cross its warps in 16 bytes of shared memory. More would be a change of layout between load and store.
CASES = [
    Case("path_loss", FLOAT32, 55, shared=16),
    Case("path_loss", BFLOAT16, 59, shared=16),
    Case("path_loss", FLOAT32, 60, shared=16, x1_dtype=torch.uint8),
    Case("path_loss", FLOAT32, 21, shared=16, draw=False),
    Case("path_loss_backward", torch.float16, 52),
    Case("path_sample", FLOAT32, 57),
    Case("path_sample", BFLOAT16, 58),
    Case("path_sample", FLOAT32, 26, draw=False),
    Case("path_sample", FLOAT32, 98, path=VP),
    Case("path_sample", FLOAT32, 67, path=COSINE),
]
STRIDED = Case("path_loss", FLOAT32, 100, registers=72, shared=4096, shape=(4, 3, 33, 33))


def record(case, monkeypatch):
    """The kernel with the arguments that its launcher gives it."""
    from fm_fast.kernels import path_loss, path_sample

    module = path_sample if case.op == "path_sample" else path_loss
    recorder = Recorder(getattr(module, f"{module.__name__.rsplit('.', 1)[1]}_kernel"))
    monkeypatch.setattr(module, f"{module.__name__.rsplit('.', 1)[1]}_kernel", recorder)
    monkeypatch.setattr(path_loss, "combine_kernel", Recorder(path_loss.combine_kernel))
    _launch(case, module)
    return recorder


def _launch(case, module):
    o, x1 = torch.zeros(case.shape, dtype=case.dtype), torch.zeros(case.shape, dtype=case.x1_dtype or case.dtype)
    x0 = torch.empty(0) if case.draw else torch.zeros_like(o)
    key, rows, times, nothing = torch.tensor([1, 2, 3]), torch.zeros(4, 6), torch.zeros(4), torch.empty(0)
    data_map = (0.0, 256.0, False)
    if case.op == "path_sample":
        module.launch(o, times, rows, x1, x0, key, *case.path, 0, 0, 0.0, 1.0, 0.0, 1.0, *data_map)
    elif case.op == "path_loss":
        module.launch(torch.zeros(()), torch.zeros_like(o), o, x1, x0, key, rows, nothing, 0, *data_map)
    else:
        module.launch_backward(torch.zeros_like(o), o, x1, x0, key, rows, nothing, torch.ones(()), 0, *data_map)


def binary(case, capability, monkeypatch, folder):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder / "cache"))
    return compiled(record(case, monkeypatch), capability, folder)


def assert_within_budget(built, case):
    assert (built.stack, built.local, built.count("LDL", "STL")) == (0, 0, 0)
    assert built.shared <= case.shared
    assert built.registers <= case.registers
    assert built.instructions_per_element <= case.instructions


def test_every_op_has_a_launcher_with_its_arguments():
    from fm_fast import _ops, kernels

    assert set(kernels.LAUNCHERS) <= set(_ops.SCHEMAS)
    for op in kernels.LAUNCHERS:
        schema = getattr(torch.ops.fm_fast, op).default._schema
        assert list(inspect.signature(kernels.launcher(op)).parameters) == [argument.name for argument in schema.arguments]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_contiguous_kernels_on_sm_90(case, monkeypatch, tmp_path):
    built = binary(case, 90, monkeypatch, tmp_path)
    assert_within_budget(built, case)
    assert_wide_accesses(built, case)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 100])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_contiguous_kernels_on_other_architectures(case, capability, monkeypatch, tmp_path):
    built = binary(case, capability, monkeypatch, tmp_path)
    assert (built.stack, built.local, built.count("LDL", "STL")) == (0, 0, 0)
    assert built.shared <= case.shared
    assert built.instructions_per_element <= case.instructions * 1.1
    assert_wide_accesses(built, case)


def assert_wide_accesses(built, case):
    """Every floating tensor moves in 128-bit accesses; nothing smaller than 32 bits is ever loaded."""
    bytes_per_thread = built.elements_per_thread * case.dtype.itemsize
    written, float_inputs = 1, (case.x1_dtype is None) + (not case.draw) + (case.op != "path_sample")
    assert built.count("LDG.E.128") == float_inputs * bytes_per_thread / 16
    assert built.count("STG.E.128") == written * bytes_per_thread / 16
    assert built.count("LDG.E.U8", "LDG.E.U16", "LDG.E.S16", "LDG.E.CONSTANT") == 0


@pytest.mark.slow
def test_strided_kernel_on_sm_90(monkeypatch, tmp_path):
    assert_within_budget(binary(STRIDED, 90, monkeypatch, tmp_path), STRIDED)
