"""The Triton kernels as they are compiled for sm_90 and sm_100, run by a machine for PTX, against the float64 model.

It sees what the interpreter cannot: masks and offsets as they are compiled, the widths of integers, approximate instructions (off as far as
they may be), accesses beside the tensors or off their boundaries, barriers that not all threads reach.
"""

import os

import control_cases
import device_parity as parity
import numpy as np
import pytest
import test_trainer_parity as trainer
import torch
from ptx.launches import launches_on_the_cpu
from ptx.memory import Fault
from triton_driver import CAN_BUILD, NEEDED, make_believe_driver

triton = pytest.importorskip("triton", reason="triton is not installed")
tl = pytest.importorskip("triton.language", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted in this process, not compiled", allow_module_level=True)

PLACE = parity.Place("cpu", "triton")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="a real driver is there"),
    pytest.mark.skipif(not CAN_BUILD, reason=NEEDED),
    pytest.mark.usefixtures("launcher", "poisoned_outputs", "one_thread"),
]


@pytest.fixture(scope="module", params=[(9, 0), (10, 0)], ids=["sm_90", "sm_100"])
def launcher(request, tmp_path_factory):
    with make_believe_driver(tmp_path_factory.mktemp("driver"), request.param), launches_on_the_cpu() as found:
        yield found


@pytest.mark.parametrize("shape", parity.SHAPES, ids=str)
@pytest.mark.parametrize("dtype", parity.DTYPES, ids=str)
def test_training_ops(shape, dtype):
    parity.check_training_ops(PLACE, shape, dtype)


@pytest.mark.parametrize("objective", parity.OBJECTIVES)
@pytest.mark.parametrize("path", parity.PATHS)
def test_every_path(path, objective):
    parity.check_path_and_objective(PLACE, path, objective)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_data_map(dtype):
    parity.check_data_map(PLACE, torch.uint8, dtype, (5, 3, 16, 16), flip=0.5, levels=17, dequantise=True)


def test_noise():
    parity.check_noise(PLACE)


@pytest.mark.parametrize("shape", [(5, 1), (2, 4099), (2, 3, 33, 33)], ids=str)
@pytest.mark.parametrize("dtype", parity.DTYPES, ids=str)
@pytest.mark.parametrize("terms", [1, 4, 9])
def test_linear_step(shape, dtype, terms):
    parity.check_linear_step(PLACE, shape, dtype, terms)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_step_error(dtype, layout):
    parity.check_step_error(PLACE, (2, 3, 33, 33), dtype, 6, layout)


@pytest.mark.parametrize("name", control_cases.CASES)
def test_step_control(name):
    parity.check_step_control(PLACE, name, torch.float32)


@pytest.mark.parametrize("shape", [(4, 2), (2, 4099), (2, 3, 33, 33)], ids=str)
@pytest.mark.parametrize("kind", ["rademacher", "hadamard"])
def test_probe(shape, kind):
    parity.check_probe(PLACE, shape, kind, True)


@pytest.mark.parametrize("shape", [(4, 2), (2, 4099), (2, 3, 33, 33)], ids=str)
@pytest.mark.parametrize("kind", ["rademacher", "hadamard", "gaussian"])
def test_divergence_step(shape, kind):
    parity.check_divergence_step(PLACE, shape, kind, times=1)


@pytest.mark.parametrize("dtype", trainer.DTYPES, ids=str)
@pytest.mark.parametrize("case", trainer.CASES, ids=str)
def test_norm_and_its_gradients(case, dtype):
    trainer.test_norm_and_its_gradients(("cpu", "triton"), case, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_optimiser(dtype):
    if dtype == torch.float32:
        trainer.test_optimiser_and_its_averages(("cpu", "triton"), dtype)
    else:
        trainer.test_half_precision_weights_are_their_masters_rounded(("cpu", "triton"), dtype)


# The machine itself


@triton.jit
def copy_kernel(to_ptr, from_ptr, count, SIZE: tl.constexpr, MASKED: tl.constexpr):
    place = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    inside = place < count
    if MASKED:
        tl.store(to_ptr + place, tl.load(from_ptr + place, inside), inside)
    else:
        tl.store(to_ptr + place, tl.load(from_ptr + place))


def test_a_kernel_without_a_mask_is_found():
    """Two of 512 threads' accesses lie beside the tensors."""
    source, target = torch.randn(510), torch.full((510,), torch.nan)
    copy_kernel[(2,)](target, source, 510, SIZE=256, MASKED=True)
    assert torch.equal(target, source)
    with pytest.raises(Fault, match=r"copy_kernel: .*outside of all tensors"):
        copy_kernel[(2,)](target, source, 510, SIZE=256, MASKED=False)


def test_kernels_are_compiled_for_the_gpu_that_is_asked_for(launcher, request):
    launcher.architectures.clear()
    parity.check_training_ops(PLACE, (4, 2), torch.float32)
    assert f"sm_{launcher.architectures.pop()}" in request.node.name and not launcher.architectures


@triton.jit
def maths_kernel(to_ptr, from_ptr, SIZE: tl.constexpr):
    """Approximate instructions, branches that threads of a block take apart, integers that overflow, a sum over the block."""
    place = tl.arange(0, SIZE)
    x = tl.load(from_ptr + place)
    tl.store(to_ptr + place, tl.exp(x))
    tl.store(to_ptr + SIZE + place, 1.0 / x)
    tl.store(to_ptr + 2 * SIZE + place, ((place + 1) * 1_000_000_007).to(tl.float32))
    tl.store(to_ptr + 3 * SIZE + place, x - tl.sum(x))


def test_arithmetic_is_that_of_the_hardware():
    x = torch.linspace(0.5, 4.0, 256)
    found = torch.full((4, 256), torch.nan)
    maths_kernel[(1,)](found, x, SIZE=256)
    wide = x.double()
    overflowed = (torch.arange(1, 257) * 1_000_000_007).to(torch.int32).float()
    torch.testing.assert_close(found[0].double(), wide.exp(), rtol=1e-5, atol=0)
    torch.testing.assert_close(found[1].double(), 1 / wide, rtol=1e-6, atol=0)
    assert torch.equal(found[2], overflowed)
    torch.testing.assert_close(found[3].double(), wide - wide.sum(), rtol=1e-5, atol=0)
    assert not torch.equal(found[0], x.exp())  # approximate instructions are off


@triton.jit
def count_kernel(x_ptr, SIZE: tl.constexpr):
    place = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.atomic_add(x_ptr + place % 4, tl.full((SIZE,), 1, tl.uint64))


def test_atomic_additions_of_all_threads_count():
    x = torch.zeros(4, dtype=torch.int64).view(torch.uint64)
    count_kernel[(3,)](x, SIZE=128)
    np.testing.assert_array_equal(x.numpy(), 96)
