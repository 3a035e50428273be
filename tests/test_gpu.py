"""The Triton kernels on a real GPU, through the public functions: parity with the float64 model, CUDA graphs, repeatability, size."""

import numpy as np
import oracle
import pytest
import torch

import fm_fast as fm
from fm_fast import _ops
from fm_fast.random import make_key

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


def table_of(*rows):
    return torch.tensor(rows, dtype=torch.float64, device="cuda")


def step(x, k, row, out=None, copy=None, guidance=2.5):
    out = torch.full_like(x, float("nan")) if out is None else out
    with torch.no_grad():
        _ops.linear_step("triton")(out, x.new_empty(0) if copy is None else copy, x, k, table_of([9.0] * len(row), row), 1, guidance)
    return out


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("terms", [1, 2, 4, 9])
def test_linear_step_matches_the_model(shape, dtype, terms):
    doubled = (2 * shape[0], *shape[1:])
    x, row = data(shape), [0.75, -0.5, 0.3, 1.25, -2.0, 0.01, 3.0, 0.5, -1.5, 0.125][: 1 + terms]
    k = [data(doubled if j % 2 else shape, dtype, seed=2 + j) for j in range(terms)]
    copy = torch.full(doubled, float("nan"), dtype=dtype, device="cuda")
    out = step(x, k, row, copy=copy)
    wanted, size = oracle.linear_step(array(x), [array(term) for term in k], row, 2.5)
    np.testing.assert_array_less(np.abs(array(out) - wanted), 30 * 2.0**-24 * size + 1e-30)
    close(copy, np.concatenate([wanted, wanted]), size.max())
    assert torch.equal(step(x, k, row, out=x), out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_step_in_mixed_layouts(dtype):
    shape, row = (4, 3, 17, 16), [0.5, 0.25, -1.0]
    x, k = data(shape), [data(shape, dtype, seed=2), data((8, *shape[1:]), dtype, seed=3)]
    wanted = step(x, k, row)
    last = torch.channels_last
    assert torch.equal(step(x.to(memory_format=last), k, row), wanted)
    assert torch.equal(step(x, [term.to(memory_format=last) for term in k], row), wanted)
    state = x.to(memory_format=last)
    assert torch.equal(step(state, [term.to(memory_format=last) for term in k], row, out=state), wanted)


def probe_set(kind, shape, total, share=1):
    words = torch.randint(2**62, (int(np.prod(shape[1:])) + total,), generator=torch.Generator().manual_seed(3))
    codes, rows = words.cuda().split([len(words) - total, total]) if kind == "hadamard" else (words[:0].cuda(), words[:0].cuda())
    key = make_key(SEED, STEP, None, shape[0], torch.device("cuda"))
    return _ops.ProbeSet(key, codes.contiguous(), rows.contiguous(), 5, total, share, kind == "gaussian")


def model_probes(probes, shape):
    if probes.normal:
        return np.stack([oracle.normal(shape, SEED, STEP, "probe", index=5 + q) for q in range(probes.total)])
    return oracle.probes(shape, SEED, STEP, 0, probes.total, 5, probes.share, probes.codes.tolist(), probes.rows.tolist())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["rademacher", "hadamard"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_probes_are_those_of_the_model(shape, kind, channels_last):
    probes = probe_set(kind, shape, 6, share=3)
    for dtype in DTYPES:
        like = data(shape, dtype)
        like = like.to(memory_format=torch.channels_last) if channels_last and like.dim() == 4 else like
        np.testing.assert_array_equal(array(_ops.probe(like, probes, 0, 6, "triton")), model_probes(probes, shape))


def evaluate(g, probes):
    dots = torch.full(g.shape[:2], float("nan"), dtype=torch.float64, device="cuda")
    sums = torch.zeros(2, g.shape[1], dtype=torch.float64, device="cuda")
    with torch.no_grad():
        for first in range(0, probes.total, 3):
            _ops.divergence_step(sums, dots, g[first : first + 3], probes, first, 0.5, -2.0, "triton")
    return dots, sums


@pytest.mark.parametrize("shape", [*SHAPES, (2, 3, 256, 256)], ids=str)
@pytest.mark.parametrize("kind", ["rademacher", "hadamard", "gaussian"])
def test_divergence_step_matches_the_model_and_repeats(shape, kind):
    g, probes = data((6, *shape)), probe_set(kind, shape, 6, share=1 if kind == "gaussian" else 3)
    dots, sums = evaluate(g, probes)
    terms = (model_probes(probes, shape) * array(g)).reshape(6, shape[0], -1)
    np.testing.assert_array_less(np.abs(array(dots) - terms.sum(2)), 1e-5 * np.abs(array(g)).reshape(6, shape[0], -1).sum(2) + 1e-30)
    np.testing.assert_allclose(array(sums), oracle.divergence_sums(array(dots), probes.groups, 0.5, -2.0), rtol=1e-12, atol=1e-12)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(evaluate(g, probes), (dots, sums), strict=True))


def test_solver_and_divergence_neither_wait_nor_resist_a_graph():
    """One captured step replays to the same numbers; nothing in it waits for the device."""
    shape, probes = (8, 3, 32, 32), probe_set("hadamard", (8, 3, 32, 32), 4, share=4)
    x, k, table = data(shape), [data((16, *shape[1:]), torch.bfloat16, seed=2)], table_of([1.0, 0.5])
    copy, dots = torch.empty(16, *shape[1:], dtype=torch.bfloat16, device="cuda"), torch.empty(4, 8, dtype=torch.float64, device="cuda")
    sums = torch.zeros(2, 8, dtype=torch.float64, device="cuda")

    def once():
        with torch.no_grad():
            _ops.linear_step("triton")(x, copy, x, k, table, 0, 1.5)
            z = _ops.probe(x, probes, 0, 4, "triton")
            _ops.divergence_step(sums, dots, z, probes, 0, 0.0, 1.0, "triton")

    once()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        once()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    start = x.clone()
    once()
    wanted = x.clone(), copy.clone()
    assert torch.equal(dots, torch.full_like(dots, 3072.0))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        once()
    x.copy_(start)
    before = sums.clone()
    graph.replay()
    assert torch.equal(x, wanted[0]) and torch.equal(copy, wanted[1])
    assert torch.equal(sums[0], before[0] + 3072.0)


def test_linear_step_on_more_than_two_to_the_31_elements():
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GiB of free GPU memory")
    x = torch.zeros(2**31 + 4096, dtype=torch.bfloat16, device="cuda")
    k = torch.ones_like(x)
    step(x, [k], [1.0, 0.5], out=x)
    assert bool((x[-8192:] == 0.5).all()) and bool((x[:8192] == 0.5).all())
