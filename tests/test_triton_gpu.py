"""The Triton kernels on a real GPU, through the public functions: parity with the float64 model, CUDA graphs, repeatability, size."""

import numpy as np
import oracle
import pytest
import torch

import fm_fast as fm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

SEED, STEP = 0x123456789ABCDEF, 4
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float64: 2e-6, torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
SHAPES = [(3,), (5, 1), (4, 2), (2, 4099), (1, 2, 9), (2, 3, 33, 33), (4, 3, 32, 32), (3, 4, 64, 64), (2, 3, 2, 3, 5)]


def data(shape, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.uint8:
        return torch.randint(256, shape, generator=generator, dtype=dtype).cuda()
    return torch.randn(shape, generator=generator).to("cuda", dtype)


def array(x):
    return x.detach().cpu().double().numpy()


def assert_matches(s, o, x1, x0=None, reduction="mean", weight=None):
    """x_t, loss and gradient of a sample and a prediction against the model, from the sample's own coefficients."""
    rows = array(s.coef)
    values = oracle.data(x1.cpu().numpy() if x1.dtype == torch.uint8 else array(x1), SEED, STEP)
    noise = oracle.normal(tuple(x1.shape), SEED, STEP) if x0 is None else array(x0)
    close(s.x_t, oracle.sample(values, noise, rows), np.abs(rows[:, :2]).max())
    loss = s.loss(o, weight=weight, reduction=reduction)
    grad_output = torch.ones_like(loss)
    (grad,) = torch.autograd.grad(loss, o, grad_output)
    wanted_loss, wanted_grad = oracle.loss(array(o), values, noise, rows, None if weight is None else array(weight), reduction)
    np.testing.assert_allclose(array(loss), wanted_loss, rtol=5e-6)
    close(grad, wanted_grad, np.abs(wanted_grad).max(initial=0.0))


def close(found, wanted, scale):
    tolerance = TOLERANCE[found.dtype]
    np.testing.assert_allclose(array(found), wanted, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_the_model(shape, dtype):
    x1, o = data(shape, dtype), data(shape, dtype, seed=2).requires_grad_()
    assert_matches(fm.sample_path(x1, seed=SEED, step=STEP, backend="triton"), o, x1)


@pytest.mark.parametrize("path", ["ot", "vp", "ve", "cosine"])
@pytest.mark.parametrize("objective", ["velocity", "noise", "score", "scoreflow", "data"])
def test_matches_the_model_on_every_path(path, objective):
    x1, o = data((16, 3, 8, 8)), data((16, 3, 8, 8), seed=2).requires_grad_()
    s = fm.sample_path(x1, path=path, objective=objective, seed=SEED, step=STEP, backend="triton")
    np.testing.assert_allclose(array(s.coef), oracle.coefficients(path, objective, array(s.t)), rtol=1e-6, atol=1e-7)
    assert_matches(s, o, x1, reduction="none")


@pytest.mark.parametrize("x1_dtype", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_matches_with_mixed_dtypes_and_layouts(x1_dtype, layout):
    x1 = data((4, 3, 16, 16), x1_dtype)
    o = data((4, 3, 16, 16), torch.bfloat16, seed=2).to(memory_format=layout).requires_grad_()
    s = fm.sample_path(x1, dtype=torch.bfloat16, seed=SEED, step=STEP, backend="triton")
    assert_matches(s, o, x1, weight=data((4,), seed=3).abs())


def test_words_give_the_reference_noise_within_a_few_ulp():
    x1 = torch.zeros(64, 3, 32, 32, device="cuda")
    s = fm.sample_path(x1, t=0.0, seed=SEED, step=STEP, backend="triton")
    wanted = fm.noise((64, 3, 32, 32), seed=SEED, step=STEP)
    torch.testing.assert_close(s.x_t.cpu(), wanted, rtol=2e-6, atol=2e-6)


def test_loss_and_gradient_repeat_bit_for_bit():
    x1, o = data((32, 3, 64, 64), torch.bfloat16), data((32, 3, 64, 64), torch.bfloat16, seed=2).requires_grad_()
    runs = []
    for _ in range(5):
        loss = fm.sample_path(x1, seed=SEED, step=STEP, backend="triton").loss(o)
        runs.append((loss.detach(), *torch.autograd.grad(loss, o)))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def test_a_captured_graph_draws_new_noise_at_each_replay():
    x1, o = data((8, 3, 32, 32)), data((8, 3, 32, 32), seed=2).requires_grad_()
    step = torch.zeros((), dtype=torch.int64, device="cuda")

    def once():
        step.add_(1)
        s = fm.sample_path(x1, seed=SEED, step=step, backend="triton")
        loss = s.loss(o)
        return s.x_t, loss.detach(), torch.autograd.grad(loss, o)[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        once()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = once()
    for _ in range(3):
        graph.replay()
        s = fm.sample_path(x1, seed=SEED, step=int(step), backend="triton")
        loss = s.loss(o)
        eager = s.x_t, loss.detach(), torch.autograd.grad(loss, o)[0]
        assert all(torch.equal(a, b) for a, b in zip(captured, eager, strict=True))


def test_no_step_waits_for_the_device():
    x1, o = data((8, 3, 32, 32)), data((8, 3, 32, 32), seed=2).requires_grad_()
    fm.sample_path(x1, seed=SEED, step=STEP, backend="triton").loss(o).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        fm.sample_path(x1, seed=SEED, step=STEP, backend="triton").loss(o).backward()
        fm.sample_path(x1, backend="triton").loss(o).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_half_precision_gradient_under_a_loss_scale():
    x1, o = data((8, 3, 64, 64), torch.float16), data((8, 3, 64, 64), torch.float16, seed=2).requires_grad_()
    s = fm.sample_path(x1, seed=SEED, step=STEP, backend="triton")
    (grad,) = torch.autograd.grad(s.loss(o) * 2.0**16, o)
    noise = oracle.normal(tuple(x1.shape), SEED, STEP)
    wanted = oracle.loss(array(o), array(x1), noise, array(s.coef))[1] * 2.0**16
    close(grad, wanted, np.abs(wanted).max() / 8)


def test_more_than_two_to_the_31_elements():
    batch, size = 2**31 // 3072 + 4, (3, 32, 32)
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free GPU memory")
    x1 = torch.zeros(1, *size, dtype=torch.bfloat16, device="cuda").expand(batch, *size).contiguous()
    s = fm.sample_path(x1, seed=SEED, step=STEP, backend="triton")
    last = fm.sample_path(x1[-2:], seed=SEED, step=STEP, sample_ids=batch - 2, backend="triton")
    assert torch.equal(s.x_t[-2:], last.x_t)
    losses = s.loss(torch.zeros_like(x1), reduction="none")
    assert torch.equal(losses[-2:], last.loss(torch.zeros_like(x1[-2:]), reduction="none"))
