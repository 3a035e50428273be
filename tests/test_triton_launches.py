"""The way of every launcher through Triton to the driver, without a GPU: specialisation, compilation, the call that Triton makes in C.

The driver is a make-believe one, tests/native/driver_stub.c. What kernels compute is for the interpreter's tests to say.
"""

import os

import pytest
import torch
from triton_driver import CAN_BUILD, NEEDED, make_believe_driver

triton = pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted in this process, not compiled", allow_module_level=True)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="a real driver is there"),
    pytest.mark.skipif(not CAN_BUILD, reason=NEEDED),
]

SHAPE, GROUPS = (4, 64, 8, 8), 32
BFLOAT16, DOUBLE = torch.bfloat16, torch.float64
NOTHING, KEY = torch.empty(0), torch.tensor([1, 2, 3])


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    with make_believe_driver(tmp_path_factory.mktemp("driver")) as stub:
        yield stub


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def images(dtype=torch.float32, batch=SHAPE[0]):
    return zeros(batch, *SHAPE[1:], dtype=dtype).to(memory_format=torch.channels_last)


def path_sample():
    times, rows = zeros(4), zeros(4, 6)
    return zeros(*SHAPE, dtype=BFLOAT16), times, rows, zeros(*SHAPE, dtype=torch.uint8), NOTHING, KEY, 1, 0.1, 20.0, 0, 0, 0.0, 1.0, 0.0, \
        1.0, 0.5, 256.0, True  # fmt: skip


def path_loss(loss=None):
    o = zeros(*SHAPE)
    return zeros() if loss is None else loss, zeros(*SHAPE), o, o, NOTHING, KEY, zeros(4, 6), zeros(4), 0, 0.0, 256.0, False


def path_loss_backward():
    o = zeros(*SHAPE, dtype=torch.float16)
    return o, o, o, NOTHING, KEY, zeros(4, 6), NOTHING, torch.ones(()), 0, 0.0, 256.0, False, True


def linear_step():
    x = zeros(*SHAPE)
    k = [images(BFLOAT16), zeros(8, *SHAPE[1:], dtype=BFLOAT16), images()]
    return x, zeros(8, *SHAPE[1:], dtype=BFLOAT16), x, k, zeros(1, 4, dtype=DOUBLE), 0, 1.5, images()


def step_error():
    y = zeros(*SHAPE, dtype=DOUBLE)
    return zeros(4, dtype=DOUBLE), y, y, [y, images(DOUBLE)], zeros(2, dtype=DOUBLE), 1e-3, 1e-3


def step_control():
    doubles = [zeros(*shape, dtype=DOUBLE) for shape in ((2, 4), (2,), (6,))]
    counts, totals, accepted = (torch.zeros(shape, dtype=torch.int64) for shape in ((3, 4), 3, 4))
    return zeros(3, 4, dtype=DOUBLE), counts, totals, accepted.byte(), zeros(6, 4, dtype=DOUBLE), zeros(2, 4), *doubles, 5, 6


def probe_tables(structured):
    codes = torch.zeros(64 * 64 if structured else 0, dtype=torch.int64)
    return KEY, codes, torch.zeros(2 if structured else 0, dtype=torch.int64)


def probe():
    return zeros(2, *SHAPE), *probe_tables(True), 0, 0, 1


def divergence_step(kind=0):
    return zeros(2, 4, dtype=DOUBLE), zeros(2, 4, dtype=DOUBLE), zeros(2, *SHAPE), *probe_tables(kind == 0), kind, 0, 0, 1, 2, 0.0, 1.0


def adamw_ema():
    p, flat, counts = [zeros(5000), zeros(3)], zeros(3, 6000), torch.zeros(4, dtype=torch.int64)
    g, layout = [zeros(5000, dtype=BFLOAT16), zeros(3)], torch.tensor([[0, 0], [5008, 0]])
    return (
        p,
        [],
        flat[0],
        flat[1],
        flat[2:],
        counts,
        g,
        layout,
        zeros(1, dtype=DOUBLE),
        zeros(1, 6, dtype=DOUBLE),
        zeros(1, 4, dtype=DOUBLE),
    )


def norm_inputs():
    return images(BFLOAT16), NOTHING, zeros(4, 64), zeros(64), zeros(64), NOTHING, NOTHING


def group_norm_silu():
    return images(BFLOAT16), zeros(4, GROUPS), zeros(4, GROUPS), *norm_inputs(), KEY, GROUPS, 1e-5, True, 0.1, 1


def group_norm_silu_backward():
    inputs, statistics = norm_inputs(), zeros(4, GROUPS)
    return *inputs, images(BFLOAT16), *inputs, statistics, statistics, KEY, GROUPS, True, 0.0, 1


# The kernels that a launch runs, in this order.
CASES = [
    ("noise", lambda: (zeros(3, 7), KEY, 0, 0, 0), ["noise_kernel"]),
    ("path_sample", path_sample, ["path_sample_kernel"]),
    ("path_loss", path_loss, ["path_loss_kernel", "combine_kernel"]),
    ("path_loss_backward", path_loss_backward, ["path_loss_kernel"]),
    ("linear_step", linear_step, ["linear_step_kernel"]),
    ("step_error", step_error, ["step_error_kernel", "combine_kernel"]),
    ("step_control", step_control, ["step_control_kernel"]),
    ("probe", probe, ["parity_kernel", "probe_kernel"]),
    ("divergence_step", divergence_step, ["parity_kernel", "sign_dots_kernel", "combine_kernel", "finish_kernel"]),
    ("divergence_step", lambda: divergence_step(1), ["normal_dots_kernel", "combine_kernel", "finish_kernel"]),
    ("adamw_ema_norm", lambda: (zeros(1, dtype=DOUBLE), [zeros(9000), zeros(5)]), ["norm_kernel", "combine_kernel"]),
    ("adamw_ema", adamw_ema, ["numbers_kernel", "adamw_ema_kernel", "adamw_ema_kernel"]),
    ("group_norm_silu", group_norm_silu, ["group_norm_silu_kernel"]),
    ("group_norm_silu_backward", group_norm_silu_backward, ["group_norm_silu_backward_kernel", "parameter_gradients_kernel"]),
]


def test_every_launcher_is_tested():
    from fm_fast import kernels

    assert {op for op, _, _ in CASES} == set(kernels.LAUNCHERS)


@pytest.mark.parametrize(("op", "arguments", "names"), CASES, ids=[f"{op} {names[0]}" for op, _, names in CASES])
def test_launches_reach_the_driver(driver, op, arguments, names):
    from fm_fast import kernels

    driver.stub_forget()
    kernels.launcher(op)(*arguments())
    launched = [driver.stub_launched(i).decode() for i in range(driver.stub_launches())]
    assert launched == names
