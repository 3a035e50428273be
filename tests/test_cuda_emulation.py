"""The CUDA kernels, their launchers and their registration, run on the CPU thread by thread: see tests/native/cuda_emulation.h."""

import ctypes
import os
import subprocess
import sys

import control_cases
import device_parity as parity
import emulated_cuda
import pytest
import torch

import fm_fast as fm

PLACE = parity.Place("cpu", "cuda")

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(emulated_cuda.COMPILER is None, reason="no g++"),
    pytest.mark.usefixtures("emulation", "poisoned_outputs"),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return emulated_cuda.build(tmp_path_factory.mktemp("emulated"))


@pytest.fixture(scope="module")
def emulated(library):
    return emulated_cuda.load(library)


@pytest.fixture
def emulation(emulated, monkeypatch):
    emulated_cuda.install(monkeypatch)


@pytest.mark.parametrize("shape", parity.SHAPES, ids=str)
@pytest.mark.parametrize("dtype", parity.DTYPES, ids=str)
def test_training_ops(shape, dtype):
    parity.check_training_ops(PLACE, shape, dtype)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("shape", [(300, 2), (7, 40), (2, 5000), (3, 3, 16, 16)], ids=str)
def test_reductions(shape, reduction):
    parity.check_training_ops(PLACE, shape, torch.float32, reduction)


@pytest.mark.parametrize("path", parity.PATHS)
@pytest.mark.parametrize("objective", parity.OBJECTIVES)
def test_paths_and_objectives(path, objective):
    parity.check_path_and_objective(PLACE, path, objective)


@pytest.mark.parametrize("sampler", ["uniform", "stratified", "logit-normal"])
def test_times(sampler):
    parity.check_times(PLACE, sampler)


@pytest.mark.parametrize("dtype", parity.DTYPES, ids=str)
def test_given_noise_times_and_weights(dtype):
    parity.check_given(PLACE, dtype)


@pytest.mark.parametrize("x1_dtype", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "layouts", [("contiguous", "channels_last"), ("channels_last", "every second"), ("misaligned", "misaligned")], ids=str
)
def test_mixed_dtypes_and_layouts(x1_dtype, layouts):
    parity.check_layouts(PLACE, x1_dtype, torch.bfloat16, layouts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(5, 3, 16, 16), (3, 3, 9, 7), (4, 5, 6)], ids=str)
@pytest.mark.parametrize("x1_dtype", [torch.uint8, torch.float32], ids=str)
def test_data_map(dtype, shape, x1_dtype):
    parity.check_data_map(PLACE, x1_dtype, dtype, shape, flip=0.5)
    if x1_dtype == torch.uint8:
        parity.check_data_map(PLACE, x1_dtype, dtype, shape, flip=0.5, levels=17, dequantise=True)


def test_noise_is_the_reference_noise():
    parity.check_noise_is_the_reference_noise(PLACE)


def test_half_precision_gradient():
    parity.check_half_precision_gradient(PLACE)


@pytest.mark.parametrize("dtype", parity.DTYPES, ids=str)
def test_the_device_finishes_the_gradient(dtype, monkeypatch):
    monkeypatch.setattr(sys.modules["fm_fast._ops.path_loss"], "_is_on_device", lambda number: True)
    parity.check_finished_gradient(PLACE, dtype)


@pytest.mark.parametrize("shape", [(4, 3, 8, 8), (5, 7), (2, 3, 5, 5)], ids=str)
def test_a_finished_gradient_is_left_alone(shape):
    parity.check_early_exit(PLACE, getattr(torch.ops, emulated_cuda.NAMESPACE).path_loss_backward.default, shape)


@pytest.mark.parametrize("shape", [(9, 3, 16, 16), (9, 3, 64, 64)], ids=str)
def test_repeats(shape):
    """The second has several chunks a sample, of which a block sums some one after the other."""
    parity.check_repeats(PLACE, shape, 2)


def test_empty():
    parity.check_empty(PLACE)


def test_noise():
    parity.check_noise(PLACE)


@pytest.mark.parametrize("shape", [(5, 1), (2, 4099), (2, 3, 33, 33)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("terms", [1, 9])
def test_linear_step(shape, dtype, terms):
    parity.check_linear_step(PLACE, shape, dtype, terms)


@pytest.mark.slow
@pytest.mark.parametrize("shape", parity.SHAPES, ids=str)
@pytest.mark.parametrize("dtype", parity.DTYPES, ids=str)
@pytest.mark.parametrize("terms", [1, 2, 3, 4, 8, 9])
def test_linear_step_on_all_sizes(shape, dtype, terms):
    parity.check_linear_step(PLACE, shape, dtype, terms)


@pytest.mark.parametrize("shape", [(5, 1), (2, 4099), (2, 3, 33, 33)], ids=str)
@pytest.mark.parametrize("dtype", parity.DTYPES, ids=str)
@pytest.mark.parametrize("terms", [1, 6])
def test_linear_step_keeps(shape, dtype, terms):
    parity.check_linear_step_keeps(PLACE, shape, dtype, terms)


@pytest.mark.parametrize("dtype", parity.DTYPES, ids=str)
def test_linear_step_in_mixed_layouts(dtype):
    parity.check_linear_step_in_mixed_layouts(PLACE, dtype)


def test_linear_step_refuses_more_terms_than_it_can_hold():
    x = torch.ones(2, 3)
    with pytest.raises(RuntimeError, match="argument k: expected at most 32 tensors"):
        parity.step(PLACE, x, [x] * 33, [1.0] * 34)


@pytest.mark.parametrize("shape", [(5,), (200, 2), (2, 4100), (2, 3, 33, 33)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("terms", [1, 6])
def test_step_error(shape, dtype, terms):
    parity.check_step_error(PLACE, shape, dtype, terms, torch.channels_last)


def test_step_error_of_what_is_not_finite():
    parity.check_step_error_of_what_is_not_finite(PLACE)


@pytest.mark.parametrize("name", control_cases.CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_step_control(name, dtype):
    parity.check_step_control(PLACE, name, dtype)


@pytest.mark.parametrize("per_sample", [False, True])
def test_an_adaptive_solve(per_sample):
    """Through linear_step, step_error and step_control, as on a GPU."""
    noise, speed = parity.data(PLACE, (4, 3), torch.float64), torch.tensor([1.0, 9.0, 4.0, 2.0], dtype=torch.float64)

    def solve(backend):
        options = {"method": "dopri5", "per_sample": per_sample, "save": [0.5], "rtol": 1e-4, "atol": 1e-4, "backend": backend}
        return fm.sample(lambda x, t: torch.tanh(x) * torch.cos(speed * t)[:, None], noise, **options)

    found, wanted = solve("cuda"), solve("reference")
    torch.testing.assert_close((found.x, found.saved), (wanted.x, wanted.saved), rtol=1e-12, atol=1e-12)
    assert found.nfe == wanted.nfe


def test_step_error_refuses_more_terms_than_it_can_hold():
    x = torch.ones(2, 3)
    with pytest.raises(RuntimeError, match="argument k: expected at most 32 tensors"):
        parity.error_norm(PLACE, x, x, [x] * 33, [1.0] * 33)


@pytest.mark.parametrize("shape", [(4, 2), (2, 3, 33, 33), (2, 2, 16, 24)], ids=str)
@pytest.mark.parametrize("kind", ["rademacher", "hadamard"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_probe(shape, kind, channels_last):
    parity.check_probe(PLACE, shape, kind, channels_last)


@pytest.mark.parametrize("shape", [(4, 2), (2, 3, 33, 33)], ids=str)
@pytest.mark.parametrize("kind", ["rademacher", "hadamard", "gaussian"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_divergence_step(shape, kind, dtype):
    parity.check_divergence_step(PLACE, shape, kind, dtype, times=1)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(3,), (4, 2), (2, 4099), (2, 3, 33, 33), (3, 3, 16, 16), (2, 3, 2, 3, 5), (2, 3, 40, 64)], ids=str)
@pytest.mark.parametrize("kind", ["rademacher", "hadamard", "gaussian"])
@pytest.mark.parametrize("dtype", parity.DTYPES, ids=str)
def test_divergence_step_on_all_sizes(shape, kind, dtype):
    parity.check_divergence_step(PLACE, shape, kind, dtype, times=1)


SANITIZED = """
import pathlib, pytest, torch
import control_cases, device_parity as parity, emulated_cuda
library = emulated_cuda.load(pathlib.Path({library!r}))
emulated_cuda.install(pytest.MonkeyPatch())
place = parity.Place("cpu", "cuda")
for shape in ((4, 2), (2, 4099), (2, 3, 33, 33), (3, 3, 16, 16), (300, 8)):
    for dtype in parity.DTYPES:
        for reduction in ("mean", "none"):
            parity.check_training_ops(place, shape, dtype, reduction)
        parity.check_linear_step(place, shape, dtype, 3)
        parity.check_step_error(place, shape, dtype, 6)
        for kind in ("rademacher", "hadamard", "gaussian"):
            parity.check_divergence_step(place, shape, kind, dtype, times=0)
    for kind in ("rademacher", "hadamard"):
        parity.check_probe(place, shape, kind, True)
parity.check_data_map(place, torch.uint8, torch.bfloat16, (5, 3, 16, 16), flip=0.5, levels=17, dequantise=True)
for name in control_cases.CASES:
    parity.check_step_control(place, name, torch.float32)
parity.check_noise(place)
print("clean")
"""


@pytest.mark.slow
def test_kernels_under_sanitizers(tmp_path):
    """Every address that the kernels touch, and every undefined operation: torch's tensors lie between guarded zones here."""
    library = emulated_cuda.build(tmp_path, *emulated_cuda.SANITIZERS)
    asan = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True).stdout.strip()
    options = {"LD_PRELOAD": asan, "ASAN_OPTIONS": "detect_leaks=0:use_sigaltstack=0", "PYTHONPATH": str(emulated_cuda.HERE)}
    code = SANITIZED.format(library=str(library))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **options}, check=False)
    assert done.returncode == 0 and done.stdout.strip() == "clean", done.stderr[-4000:]


@pytest.mark.parametrize("error", [209, 222], ids=["no kernel image", "PTX newer than the driver"])
def test_a_gpu_without_code_is_told_what_to_do(library, error):
    """And the error is not left behind for the next launch."""
    ctypes.CDLL(str(library)).fm_emulation_fail(error)
    with pytest.raises(RuntimeError, match="TORCH_CUDA_ARCH_LIST, or set FM_FAST_BACKEND=triton"):
        parity.check_noise(PLACE)
    parity.check_noise(PLACE)
