"""A tile's loads come before its arithmetic in the machine code: a program waits for memory once. No register is spilled for it."""

import os
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted in this process, not compiled", allow_module_level=True)

import test_triton_compile as kernels
from triton_binaries import compiled

ARCHITECTURES = [90, pytest.param(80, marks=pytest.mark.slow), pytest.param(100, marks=pytest.mark.slow)]
FLOAT32, BFLOAT16, FLOAT64, INTEGERS = torch.float32, torch.bfloat16, torch.float64, torch.uint8
PRODUCTS_OF_A_BLOCK = 20  # of 64 bits, which make the four words of a counter
IN_THE_MEANTIME = 150  # instructions that draw until there is a root, the radius of a pair of normal numbers
DRAWING = "IMAD.WIDE.U32"
SIGNS = [case for case in kernels.PROBE_CASES if not case.normal]


@pytest.fixture
def built(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    return lambda recorder, architecture=90: compiled(recorder, architecture, tmp_path)


def assert_no_spills(binary):
    assert (binary.stack, binary.local, binary.count("LDL", "STL")) == (0, 0, 0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("case", [case for case in kernels.CASES if case.draw and case.x1_dtype is None], ids=str)
def test_data_are_asked_for_before_noise_is_drawn(case, architecture, built, monkeypatch):
    binary = built(kernels.record(case, monkeypatch), architecture)
    first_normal = min(binary.places("MUFU.SQRT"))
    assert first_normal - max(binary.places("LDG.E.128")) > IN_THE_MEANTIME


@pytest.mark.parametrize("shape", [kernels.SIGN_SHAPE, (4, 3, 32, 32)], ids=str)
@pytest.mark.parametrize("case", [case for case in kernels.PROBE_CASES if case.op == "divergence_step"], ids=str)
def test_gradients_are_asked_for_before_probes_are_drawn(case, shape, built, monkeypatch):
    monkeypatch.setattr(kernels, "SIGN_SHAPE", shape)
    binary = built(kernels.record_probe(case, monkeypatch))
    drawing = binary.places(DRAWING)
    assert max(binary.places("LDG.E.128")) < drawing[len(drawing) // 2]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("terms", [1, 4, 5, 6])
def test_all_terms_are_asked_for_before_the_first_product(terms, architecture, built, monkeypatch):
    binary = built(kernels.record_step(kernels.StepCase(terms, 0, copy=True), monkeypatch), architecture)
    loads = binary.places("LDG.E.128")
    assert len(loads) == 2 * (1 + terms) and max(loads) < min(binary.places("FFMA", "FMUL"))


@pytest.mark.parametrize("terms", [4, 6, 7])
def test_all_of_an_error_is_asked_for_before_the_first_product(terms, built, monkeypatch):
    binary = built(kernels.record_error(kernels.ErrorCase(terms, 0), monkeypatch))
    loads = binary.places("LDG.E.128")
    assert len(loads) == 2 * (2 + terms) and max(loads) <= min(binary.places("FFMA", "FMUL"))


@pytest.mark.parametrize("case", SIGNS, ids=str)
def test_a_thread_draws_a_block_of_signs_once(case, built, monkeypatch):
    assert built(kernels.record_probe(case, monkeypatch)).count("IMAD.WIDE.U32", "IMAD.HI") < 1.5 * PRODUCTS_OF_A_BLOCK


# What a limit of registers could do harm to


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("options", ["", "copy", "copy doubled", "keeps"])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT64], ids=str)
def test_steps_spill_nothing(dtype, options, architecture, built, monkeypatch):
    for terms in range(1, 11):
        case = kernels.StepCase(terms, 0, dtype, **dict.fromkeys(options.split(), True))
        assert_no_spills(built(kernels.record_step(case, monkeypatch), architecture))
        monkeypatch.undo()


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT64], ids=str)
def test_errors_spill_nothing(dtype, architecture, built, monkeypatch):
    for terms in range(1, 14):
        assert_no_spills(built(kernels.record_error(kernels.ErrorCase(terms, 0, dtype), monkeypatch), architecture))
        monkeypatch.undo()


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("shape", [kernels.SHAPE, (4, 1, 28, 28)], ids=str)
@pytest.mark.parametrize("x1_dtype", [FLOAT32, BFLOAT16, FLOAT64, INTEGERS], ids=str)
@pytest.mark.parametrize("case", [kernels.CASES[0], kernels.CASES[1], *kernels.CASES[3:]], ids=str)
def test_losses_and_samples_spill_nothing(case, x1_dtype, shape, architecture, built, monkeypatch):
    monkeypatch.setattr(kernels, "DATA_MAP", (0.5, 17.0, x1_dtype == INTEGERS))
    assert_no_spills(built(kernels.record(replace(case, x1_dtype=x1_dtype, shape=shape), monkeypatch), architecture))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("shape", [kernels.SIGN_SHAPE, (4, 3, 32, 32), (4, 3, 33, 33)], ids=str)
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT64], ids=str)
@pytest.mark.parametrize("kind", ["normal", "structured", "random"])
def test_divergences_spill_nothing(kind, dtype, shape, architecture, built, monkeypatch):
    monkeypatch.setattr(kernels, "SIGN_SHAPE", shape)
    monkeypatch.setattr(kernels, "SHAPE", shape)
    case = kernels.ProbeCase("divergence_step", dtype, 0, normal=kind == "normal", structured=kind == "structured")
    assert_no_spills(built(kernels.record_probe(case, monkeypatch), architecture))
