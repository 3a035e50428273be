"""The Triton kernels compiled for real GPUs, without one: no spills, wide accesses, and an instruction budget an element.

The budgets are the largest of the counts of Triton 3.6, 3.7.1 and 3.8, with a little room; what exceeds one is slower on every GPU.
"""

import inspect
import os
import re
from dataclasses import dataclass

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted in this process, not compiled", allow_module_level=True)

from triton_binaries import Recorder, compiled, intermediate

from fm_fast._schemas import SCHEMAS

SHAPE = (4, 3, 32, 32)  # one tile a program, no remainder
SIGN_SHAPE = (4, 3, 64, 64)  # the same for tiles of signs
OT, VP, COSINE = (0, 0.0, 0.0), (1, 0.1, 20.0), (3, 0.0, 0.0)
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
DATA_MAP = (0.0, 256.0, False)  # flip, levels, dequantise


@dataclass(frozen=True)
class Case:
    """A launch and what it may cost: instructions an element, registers, bytes of shared memory."""

    op: str
    dtype: torch.dtype
    instructions: int
    registers: int = 64
    shared: int = 0
    x1_dtype: torch.dtype | None = None
    draw: bool = True
    path: tuple = OT
    shape: tuple = SHAPE

    def __str__(self):
        x1 = f" x1 {self.x1_dtype}" if self.x1_dtype else ""
        return f"{self.op} {self.dtype}{x1}{'' if self.draw else ' x0 given'} path {self.path[0]} {self.shape}".replace("torch.", "")


def fast(cases, *others):
    """The cases, those of the other numbers among the slow tests: the same kernel as one that stays, for another dtype or path."""
    return [pytest.param(case, marks=[pytest.mark.slow] * (i in others)) for i, case in enumerate(cases)]


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


@dataclass(frozen=True)
class StepCase:
    """A launch of linear_step on a float32 state (or one of ``x_dtype``) and what it may cost."""

    terms: int
    instructions: int
    dtype: torch.dtype = FLOAT32  # of the terms and of the copy
    x_dtype: torch.dtype = FLOAT32
    copy: bool = False
    keeps: bool = False
    doubled: bool = False
    k_layout: torch.memory_format = torch.contiguous_format
    registers: int = 64
    shared: int = 0

    def __str__(self):
        options = [name for name in ("copy", "keeps", "doubled") if getattr(self, name)]
        return f"linear_step {self.terms} terms x {self.x_dtype} k {self.dtype} {' '.join(options)}".replace("torch.", "")


@dataclass(frozen=True)
class ErrorCase:
    """A launch of step_error on a float32 state and what it may cost."""

    terms: int
    instructions: int
    dtype: torch.dtype = FLOAT32  # of the slopes
    layout: torch.memory_format = torch.contiguous_format
    registers: int = 64
    shared: int = 16

    def __str__(self):
        return f"step_error {self.terms} terms {self.dtype} {self.layout}".replace("torch.", "")


@dataclass(frozen=True)
class ProbeCase:
    """A launch of probe or divergence_step and what it may cost; all sums of a sample cross the warps in 256 bytes of shared memory."""

    op: str
    dtype: torch.dtype
    instructions: int
    normal: bool = False
    structured: bool = False
    layout: torch.memory_format = torch.contiguous_format
    registers: int = 40
    shared: int = 0

    def __str__(self):
        kind = "normal" if self.normal else "structured" if self.structured else "random"
        return f"{self.op} {kind} {self.dtype} {self.layout}".replace("torch.", "")


STEP_CASES = [
    StepCase(1, 10),
    StepCase(4, 19, copy=True),
    StepCase(6, 25, keeps=True, registers=80),
    StepCase(8, 29, copy=True, registers=80),
    StepCase(1, 21, BFLOAT16, copy=True, doubled=True),
    StepCase(2, 17, BFLOAT16, BFLOAT16),
]
ERROR_CASES = [ErrorCase(4, 36), ErrorCase(6, 41, registers=96)]
STRIDED_STEP = StepCase(2, 65, k_layout=torch.channels_last, registers=64, shared=4096)
PROBE_CASES = [
    ProbeCase("probe", FLOAT32, 12),
    ProbeCase("probe", BFLOAT16, 12),
    ProbeCase("probe", BFLOAT16, 12, structured=True),
    ProbeCase("divergence_step", FLOAT32, 14, registers=64, shared=256),
    ProbeCase("divergence_step", BFLOAT16, 15, registers=64, shared=256, structured=True),
    ProbeCase("divergence_step", FLOAT32, 53, registers=64, shared=16, normal=True),
    ProbeCase("divergence_step", BFLOAT16, 56, registers=64, shared=16, normal=True),
]
# The words are drawn once and handed to the threads of other channels through shared memory.
CHANNELS_LAST_PROBE = ProbeCase("probe", BFLOAT16, 21, layout=torch.channels_last, shared=512)
STRIDED = Case("path_loss", FLOAT32, 100, registers=72, shared=4096, shape=(4, 3, 33, 33))


def record(case, monkeypatch):
    """The kernel with the arguments that its launcher gives it."""
    from fm_fast.kernels import _combine, path_loss, path_sample

    module = path_sample if case.op == "path_sample" else path_loss
    recorder = Recorder(getattr(module, f"{module.__name__.rsplit('.', 1)[1]}_kernel"))
    monkeypatch.setattr(module, f"{module.__name__.rsplit('.', 1)[1]}_kernel", recorder)
    monkeypatch.setattr(_combine, "combine_kernel", Recorder(_combine.combine_kernel))
    _launch(case, module)
    return recorder


def _launch(case, module):
    o, x1 = torch.zeros(case.shape, dtype=case.dtype), torch.zeros(case.shape, dtype=case.x1_dtype or case.dtype)
    x0 = torch.empty(0) if case.draw else torch.zeros_like(o)
    key, rows, times, nothing = torch.tensor([1, 2, 3]), torch.zeros(4, 6), torch.zeros(4), torch.empty(0)
    if case.op == "path_sample":
        module.launch(o, times, rows, x1, x0, key, *case.path, 0, 0, 0.0, 1.0, 0.0, 1.0, *DATA_MAP)
    elif case.op == "path_loss":
        module.launch(torch.zeros(()), torch.zeros_like(o), o, x1, x0, key, rows, nothing, 0, *DATA_MAP)
    else:
        module.launch_backward(torch.zeros_like(o), o, x1, x0, key, rows, nothing, torch.ones(()), 0, *DATA_MAP)


def binary(case, capability, monkeypatch, folder):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder / "cache"))
    return compiled(record(case, monkeypatch), capability, folder)


def assert_within_budget(built, case):
    assert (built.stack, built.local, built.count("LDL", "STL")) == (0, 0, 0)
    assert built.shared <= case.shared
    assert built.registers <= case.registers
    assert built.instructions_per_element <= case.instructions


def test_every_op_has_a_launcher_with_its_arguments():
    from fm_fast import kernels

    assert set(kernels.LAUNCHERS) <= set(SCHEMAS)
    for op in kernels.LAUNCHERS:
        schema = getattr(torch.ops.fm_fast, op).default._schema
        assert list(inspect.signature(kernels.launcher(op)).parameters) == [argument.name for argument in schema.arguments]


@pytest.mark.parametrize("argument", ["x", "k"])
def test_the_registered_op_refuses_gradients(argument, monkeypatch):
    from fm_fast import kernels

    monkeypatch.setattr(kernels, "launcher", lambda op: lambda *arguments: None)
    x, k = torch.ones(1, 2, requires_grad=argument == "x"), torch.ones(1, 2, requires_grad=argument == "k")
    arguments = (torch.empty(1, 2), torch.empty(0), x, [torch.ones(1, 2), k], torch.ones(1, 3), 0, 1.0)
    with pytest.raises(RuntimeError, match="linear_step: an input requires grad"):
        kernels._lazily("linear_step")(*arguments)
    with torch.no_grad():
        kernels._lazily("linear_step")(*arguments)


@pytest.mark.parametrize("case", fast(CASES, 6, 9), ids=str)
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


def empty(*shape, dtype=FLOAT32):
    return torch.empty(shape, dtype=dtype)


def record_step(case, monkeypatch):
    from fm_fast.kernels import linear_step

    recorder = Recorder(linear_step.linear_step_kernel)
    monkeypatch.setattr(linear_step, "linear_step_kernel", recorder)
    batch, *size = SHAPE
    x, doubled = empty(*SHAPE, dtype=case.x_dtype), (2 * batch if case.doubled else batch)
    k = [empty(doubled, *size, dtype=case.dtype).to(memory_format=case.k_layout) for _ in range(case.terms)]
    copy = torch.empty_like(k[0]) if case.copy else empty(0)
    kept = torch.empty_like(x) if case.keeps else None
    linear_step.launch(x, copy, x, k, empty(5, 1 + case.terms, dtype=torch.float64), 3, 1.5, kept)
    return recorder


def record_error(case, monkeypatch):
    from fm_fast.kernels import _combine, step_error

    recorder = Recorder(step_error.step_error_kernel)
    monkeypatch.setattr(step_error, "step_error_kernel", recorder)
    monkeypatch.setattr(_combine, "combine_kernel", Recorder(_combine.combine_kernel))
    y, doubles = empty(*SHAPE), torch.float64
    k = [empty(*SHAPE, dtype=case.dtype).to(memory_format=case.layout) for _ in range(case.terms)]
    step_error.launch(empty(SHAPE[0], dtype=doubles), y, y, k, empty(case.terms, dtype=doubles), 1e-3, 1e-3)
    return recorder


def record_probes(case, monkeypatch):
    """Every kernel that the launch runs, by name."""
    from fm_fast.kernels import _combine, _probes, divergence_step, probe

    kernels = {_probes: ["parity_kernel"], _combine: ["combine_kernel"], probe: ["probe_kernel"]}
    kernels[divergence_step] = ["normal_dots_kernel", "sign_dots_kernel", "finish_kernel"]
    recorders = {name: Recorder(getattr(module, name)) for module, names in kernels.items() for name in names}
    for module, names in kernels.items():
        for name in names:
            monkeypatch.setattr(module, name, recorders[name])
    _launch_probe(case, probe if case.op == "probe" else divergence_step)
    return {name: recorder for name, recorder in recorders.items() if recorder.launches}


def record_probe(case, monkeypatch):
    """The kernel that runs over the elements."""
    recorders = record_probes(case, monkeypatch)
    return recorders["probe_kernel" if case.op == "probe" else "normal_dots_kernel" if case.normal else "sign_dots_kernel"]


def _launch_probe(case, module):
    probes, shape = 2, SHAPE if case.normal else SIGN_SHAPE
    z = empty(probes * shape[0], *shape[1:], dtype=case.dtype).to(memory_format=case.layout).unflatten(0, (probes, shape[0]))
    codes = torch.zeros(z[0, 0].numel() if case.structured else 0, dtype=torch.int64)
    tables = (torch.tensor([1, 2, 3]), codes, torch.zeros(probes if case.structured else 0, dtype=torch.int64))
    if case.op == "probe":
        module.launch(z, *tables, 0, 0, 1)
    else:
        sums, dots = empty(2, shape[0], dtype=torch.float64), empty(probes, shape[0], dtype=torch.float64)
        module.launch(sums, dots, z, *tables, int(case.normal), 0, 0, 1, probes, 0.0, 1.0)


def built_for(recorder, capability, monkeypatch, folder):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder / "cache"))
    return compiled(recorder, capability, folder)


def assert_cost(built, case, room=1.0, register_room=0):
    """Within the budget; ``room`` is for architectures that the budget was not made for."""
    assert (built.stack, built.local, built.count("LDL", "STL")) == (0, 0, 0)
    assert built.shared <= case.shared
    assert built.registers <= case.registers + register_room
    assert built.instructions_per_element <= case.instructions * room


def assert_wide_step(built, case):
    """All float32 tensors, and 16-bit ones by themselves, move in 128 bits; four 16-bit numbers beside four of 32 bits in 64."""
    halves, mixed = 1 + case.doubled, case.dtype != case.x_dtype
    wide = built.elements_per_thread * case.x_dtype.itemsize / 16
    narrow = built.elements_per_thread * case.dtype.itemsize / 8
    terms, copies = case.terms * halves, case.copy * halves + case.keeps
    assert built.count("LDG.E.128") == wide * (1 + (0 if mixed else terms))
    assert built.count("STG.E.128") == wide * (1 + (0 if mixed else copies))
    # One 64-bit load is a coefficient of the table.
    assert built.count("LDG.E.64") == 1 + case.terms + mixed * narrow * terms
    assert built.count("STG.E.64") == mixed * narrow * copies
    assert built.count("LDG") == built.count("LDG.E.64", "LDG.E.128")


def assert_wide_error(built, case):
    assert built.count("LDG.E.128") == built.elements_per_thread * 4 / 16 * (2 + case.terms)
    assert built.count("LDG.E.64") == case.terms, "the coefficients"
    assert built.count("LDG") == built.count("LDG.E.64", "LDG.E.128")


def assert_wide_probe(built, case):
    accesses = built.elements_per_thread * case.dtype.itemsize / 16
    assert built.count("STG.E.128" if case.op == "probe" else "LDG.E.128") == accesses
    assert built.count("LDG.E.U8", "LDG.E.U16", "LDG.E.S16", "LDG.E.CONSTANT", "STG.E.U16") == 0


@pytest.mark.parametrize("case", STEP_CASES, ids=str)
def test_linear_step_on_sm_90(case, monkeypatch, tmp_path):
    built = built_for(record_step(case, monkeypatch), 90, monkeypatch, tmp_path)
    assert_cost(built, case)
    assert_wide_step(built, case)


@pytest.mark.parametrize("case", ERROR_CASES, ids=str)
def test_step_error_on_sm_90(case, monkeypatch, tmp_path):
    built = built_for(record_error(case, monkeypatch), 90, monkeypatch, tmp_path)
    assert_cost(built, case)
    assert_wide_error(built, case)


def test_step_control_on_sm_90(monkeypatch, tmp_path):
    """A number a sample: what counts is one launch, that nothing spills, and that rows of a large batch are found by 64 bits."""
    from fm_fast.kernels import step_control

    recorder = Recorder(step_control.step_control_kernel)
    monkeypatch.setattr(step_control, "step_control_kernel", recorder)
    whole, doubles = {"dtype": torch.int64}, {"dtype": torch.float64}
    state = (empty(3, 256, **doubles), empty(3, 256, **whole), empty(3, **whole), empty(256, dtype=torch.uint8), empty(7, 256, **doubles))
    step_control.launch(*state, empty(2, 256), empty(1, 256, **doubles), empty(2, **doubles), empty(7, **doubles), 5, 6)
    built = built_for(recorder, 90, monkeypatch, tmp_path)
    assert (built.stack, built.local, built.count("LDL", "STL")) == (0, 0, 0) and built.registers <= 72
    products = re.findall(r"arith\.muli .*: (\S+)", intermediate(recorder).asm["ttir"])
    assert products and set(products) == {"i64"}


@pytest.mark.parametrize("case", fast(PROBE_CASES, 1, 5), ids=str)
def test_probes_on_sm_90(case, monkeypatch, tmp_path):
    built = built_for(record_probe(case, monkeypatch), 90, monkeypatch, tmp_path)
    assert_cost(built, case)
    assert_wide_probe(built, case)


def test_second_stages_on_sm_90(monkeypatch, tmp_path):
    recorders = record_probes(ProbeCase("divergence_step", FLOAT32, 0, structured=True), monkeypatch)
    assert set(recorders) == {"parity_kernel", "sign_dots_kernel", "combine_kernel", "finish_kernel"}
    for name in ("parity_kernel", "combine_kernel", "finish_kernel"):
        built = built_for(recorders[name], 90, monkeypatch, tmp_path)
        assert (built.stack, built.local, built.count("LDL", "STL")) == (0, 0, 0)
        assert built.registers <= 128


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 100])
@pytest.mark.parametrize("case", STEP_CASES, ids=str)
def test_linear_step_on_other_architectures(case, capability, monkeypatch, tmp_path):
    built = built_for(record_step(case, monkeypatch), capability, monkeypatch, tmp_path)
    assert_cost(built, case, 1.1, 8)
    assert_wide_step(built, case)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 100])
@pytest.mark.parametrize("case", PROBE_CASES, ids=str)
def test_probes_on_other_architectures(case, capability, monkeypatch, tmp_path):
    built = built_for(record_probe(case, monkeypatch), capability, monkeypatch, tmp_path)
    assert_cost(built, case, 1.1, 16)
    assert_wide_probe(built, case)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_strided_steps_and_probes(capability, monkeypatch, tmp_path):
    for case, recorder in ((STRIDED_STEP, record_step), (CHANNELS_LAST_PROBE, record_probe)):
        assert_cost(built_for(recorder(case, monkeypatch), capability, monkeypatch, tmp_path), case, 1.1, 8)
        monkeypatch.undo()
