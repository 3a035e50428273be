"""What every kernel of a device must do, whatever runs it: parity with the float64 model through the public functions.

tests/test_gpu.py runs these on a GPU with each of its backends, tests/test_cuda_emulation.py on the CPU with the emulated CUDA kernels.
A ``place`` is the device of the data and the backend.
"""

from dataclasses import dataclass

import control_cases
import numpy as np
import oracle
import torch

import fm_fast as fm
from fm_fast import _ops
from fm_fast._philox import Kind, Stream
from fm_fast.random import make_key

SEED, STEP = 0x123456789ABCDEF, 4
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float64: 2e-6, torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
SHAPES = [(3,), (5, 1), (4, 2), (2, 4099), (1, 2, 9), (2, 3, 33, 33), (4, 3, 32, 32), (3, 4, 64, 64), (2, 3, 2, 3, 5)]
PATHS, OBJECTIVES = ("ot", "vp", "ve", "cosine"), ("velocity", "noise", "score", "scoreflow", "data")


@dataclass(frozen=True)
class Place:
    """Where a test runs."""

    device: str
    backend: str

    def __str__(self):
        return f"{self.backend}-{self.device}"


def data(place, shape, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.uint8:
        return torch.randint(256, shape, generator=generator, dtype=dtype).to(place.device)
    return torch.randn(shape, generator=generator).to(place.device, dtype)


def array(x):
    return x.detach().cpu().double().numpy()


def close(found, wanted, scale):
    tolerance = TOLERANCE[found.dtype]
    np.testing.assert_allclose(array(found), wanted, rtol=tolerance, atol=tolerance * scale)


def sample_path(place, x1, **settings):
    return fm.sample_path(x1, seed=SEED, step=STEP, backend=place.backend, **settings)


def assert_matches(s, o, x1, x0=None, reduction="mean", weight=None, ids=None, **data_map):
    """x_t, loss and gradient of a sample and a prediction against the model, from the sample's own coefficients."""
    rows = array(s.coef)
    values = oracle.data(x1.cpu().numpy() if x1.dtype == torch.uint8 else array(x1), SEED, STEP, ids, **data_map)
    noise = oracle.normal(tuple(x1.shape), SEED, STEP, ids=ids) if x0 is None else array(x0)
    close(s.x_t, oracle.sample(values, noise, rows), np.abs(rows[:, :2]).max())
    loss = s.loss(o, weight=weight, reduction=reduction)
    factor = torch.linspace(0.5, 2.0, max(loss.numel(), 1), dtype=loss.dtype, device=loss.device).reshape(loss.shape)
    (grad,) = torch.autograd.grad(loss, o, factor)
    wanted_loss, wanted_grad = oracle.loss(array(o), values, noise, rows, None if weight is None else array(weight), reduction)
    np.testing.assert_allclose(array(loss), wanted_loss, rtol=5e-6)
    wanted_grad = wanted_grad * oracle.column(array(factor.expand(len(o))), array(o))
    close(grad, wanted_grad, np.abs(wanted_grad).max(initial=0.0))
    assert grad.stride() == torch.empty_like(o).stride()


def check_training_ops(place, shape, dtype, reduction="mean"):
    x1, o = data(place, shape, dtype), data(place, shape, dtype, seed=2).requires_grad_()
    assert_matches(sample_path(place, x1), o, x1, reduction=reduction)


def check_path_and_objective(place, path, objective):
    x1, o = data(place, (16, 3, 8, 8)), data(place, (16, 3, 8, 8), seed=2).requires_grad_()
    s = sample_path(place, x1, path=path, objective=objective)
    np.testing.assert_allclose(array(s.coef), oracle.coefficients(path, objective, array(s.t)), rtol=1e-6, atol=1e-7)
    low, high = oracle.time_range(path, objective)
    np.testing.assert_allclose(array(s.t), low + (high - low) * oracle.raw_time("uniform", 16, SEED, STEP), rtol=1e-6)
    assert_matches(s, o, x1, reduction="none")


def check_times(place, sampler):
    s = sample_path(place, data(place, (33, 4)), t_sampler=sampler, sample_ids=7)
    np.testing.assert_allclose(array(s.t), oracle.raw_time(sampler, 33, SEED, STEP, np.arange(7, 40)), rtol=1e-6)


def check_given(place, dtype):
    """Given noise and times, a weight a sample and one an element; the times' own dtype and layout do not matter."""
    shape, t = (5, 3, 16, 16), torch.linspace(0.1, 0.9, 5, device=place.device)
    x1, x0, o = (data(place, shape, dtype, seed=seed) for seed in (1, 2, 3))
    o.requires_grad_()
    s = sample_path(place, x1, x0=x0, t=t)
    np.testing.assert_allclose(array(s.t), array(t), rtol=1e-6)
    assert_matches(s, o, x1, x0, "sum", data(place, (5,), seed=4).abs())
    assert_matches(s, o, x1, x0, "mean", data(place, (1, 3, 16, 16), seed=4).abs())
    mixed = sample_path(place, x1, x0=x0.float(), t=t)
    assert_matches(mixed, o, x1, x0)


def check_layouts(place, x1_dtype, dtype, layouts, shape=(4, 3, 16, 16)):
    """x1, o and their batches lie in memory each in its own way."""
    x1, o = data(place, shape, x1_dtype), data(place, shape, dtype, seed=2)
    x1, o = in_layout(x1, layouts[0]), in_layout(o, layouts[1]).requires_grad_()
    s = sample_path(place, x1, dtype=dtype)
    assert_matches(s, o, x1, weight=data(place, (shape[0],), seed=3).abs(), reduction="none")


def in_layout(x, name):
    """The same values contiguous, channels last, every second of a batch, or one element off a 16-byte boundary."""
    if name == "channels_last":
        return x.to(memory_format=torch.channels_last)
    if name == "every second":
        return torch.stack([x, x], 1)[:, 0]
    if name == "misaligned":
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].reshape(x.shape)
    return x.contiguous()


def check_data_map(place, x1_dtype, dtype, shape, **data_map):
    x1, o = data(place, shape, x1_dtype), data(place, shape, dtype, seed=2).requires_grad_()
    if data_map.get("levels", 256) < 256:
        x1 = x1 % data_map["levels"]
    ids = torch.tensor([9, 2**32 - 1, 0, 77, 12345][: shape[0]], device=place.device)
    s = sample_path(place, x1, dtype=dtype, sample_ids=ids, **data_map)
    assert_matches(s, o, x1, ids=ids.cpu().numpy(), **data_map)


def check_noise_is_the_reference_noise(place):
    x1 = torch.zeros(64, 3, 32, 32, device=place.device)
    s = sample_path(place, x1, t=0.0)
    wanted = fm.noise((64, 3, 32, 32), seed=SEED, step=STEP)
    torch.testing.assert_close(s.x_t.cpu(), wanted, rtol=2e-6, atol=2e-6)


def check_half_precision_gradient(place):
    """Under a loss scale, as mixed-precision training has it."""
    x1 = data(place, (8, 3, 64, 64), torch.float16)
    o = data(place, (8, 3, 64, 64), torch.float16, seed=2).requires_grad_()
    s = sample_path(place, x1)
    (grad,) = torch.autograd.grad(s.loss(o) * 2.0**16, o)
    noise = oracle.normal(tuple(x1.shape), SEED, STEP)
    wanted = oracle.loss(array(o), array(x1), noise, array(s.coef))[1] * 2.0**16
    close(grad, wanted, np.abs(wanted).max() / 8)


def check_finished_gradient(place, dtype):
    """The device looks at grad_output: the gradient of forward where it is one, else a new one; again and again, in memory of its own."""
    x1, o = data(place, (4, 3, 8, 8)), data(place, (4, 3, 8, 8), dtype, seed=2).requires_grad_()
    s = sample_path(place, x1)
    _, wanted = oracle.loss(array(o), array(x1), oracle.normal(tuple(x1.shape), SEED, STEP), array(s.coef))
    for factors in ((1.0, 1.0, 0.5), (0.5, 1.0, 1.0)):
        loss, found = s.loss(o), []
        for factor in factors:
            grad_output = torch.tensor(factor, device=place.device)
            found.append((factor, torch.autograd.grad(loss, o, grad_output, retain_graph=True)[0]))
        for factor, grad in found:
            close(grad, factor * wanted, factor * np.abs(wanted).max())
        found[0][1].mul_(100.0)
        close(torch.autograd.grad(loss, o)[0], wanted, np.abs(wanted).max())


def check_early_exit(place, backward, shape):
    """What is finished is left alone where grad_output is one, and written where it is not or there is one a sample."""
    x1, o = data(place, shape), data(place, shape, seed=2)
    s = sample_path(place, x1)
    absent, key = x1.new_empty(0), torch.tensor([SEED, STEP, 0], device=place.device)

    def run(grad_output, reduction, finished):
        grad = torch.full_like(o, torch.nan)
        backward(grad, o, x1, absent, key, s.coef, absent, grad_output.to(place.device), reduction, 0.0, 256.0, False, finished)
        return grad

    one, half, ones = torch.ones(()), torch.full((), 0.5), torch.ones(len(o))
    assert bool(run(one, 0, True).isnan().all())
    for case in ((half, 0, True), (one, 0, False), (ones, 2, True)):
        assert not bool(run(*case).isnan().any())
    assert torch.equal(run(half, 0, True), run(half, 0, False))


def check_repeats(place, shape=(32, 3, 64, 64), times=5):
    """Loss and gradient bit for bit; and a sample's own loss whatever batch it is in."""
    x1, o = data(place, shape, torch.bfloat16), data(place, shape, torch.bfloat16, seed=2).requires_grad_()
    runs = []
    for _ in range(times):
        loss = sample_path(place, x1).loss(o)
        runs.append((loss.detach(), *torch.autograd.grad(loss, o)))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))
    apart = sample_path(place, x1[-2:], sample_ids=shape[0] - 2).loss(o[-2:].detach(), reduction="none")
    assert torch.equal(sample_path(place, x1).loss(o.detach(), reduction="none")[-2:], apart)


def check_empty(place):
    for shape in ((0, 3, 4, 4), (4, 0), (4, 3, 0, 5)):
        x1, o = data(place, shape), data(place, shape, seed=2).requires_grad_()
        s = sample_path(place, x1)
        assert s.x_t.shape == shape and s.t.shape == shape[:1]
        for reduction in ("mean", "sum", "none"):
            wanted = fm.sample_path(x1.cpu(), seed=SEED, step=STEP, backend="reference").loss(o.detach().cpu(), reduction=reduction)
            torch.testing.assert_close(s.loss(o, reduction=reduction).detach().cpu(), wanted, equal_nan=True)


def check_noise(place):
    """Every kind of number, in every dtype and some sizes, against the model."""
    for shape in ((3, 7), (2, 3, 9, 7), (5, 3, 16, 16), (1, 1, 2, 300), (400, 1)):
        for dtype in DTYPES:
            drawn = {name: draw(place, shape, name, dtype) for name in ("normal", "uniform", "sign")}
            close(drawn["normal"], oracle.normal(shape, SEED, STEP, index=3), 1.0)
            close(drawn["uniform"], oracle.uniform(shape, SEED, STEP, "x0", index=3), 1.0)
            np.testing.assert_array_equal(array(drawn["sign"]), oracle.sign(shape, SEED, STEP, "x0", index=3))
        words = draw(place, shape, "word", torch.int64).cpu().numpy()
        found, positions = oracle.words(shape, SEED, STEP, "x0", index=3)
        np.testing.assert_array_equal(words, oracle.trim(found, positions, shape).astype(np.int64))


def draw(place, shape, kind, dtype):
    key = make_key(SEED, STEP, None, shape[0], torch.device(place.device))
    return _ops.noise(key, shape, Kind[kind], Stream.x0, 3, dtype, place.backend)


def table_of(place, *rows):
    return torch.tensor(rows, dtype=torch.float64, device=place.device)


def step(place, x, k, row, out=None, copy=None, kept=None, guidance=2.5):
    out = torch.full_like(x, float("nan")) if out is None else out
    table = table_of(place, [9.0] * len(row), row)
    with torch.no_grad():
        _ops.linear_step(place.backend)(out, x.new_empty(0) if copy is None else copy, x, k, table, 1, guidance, kept)
    return out


def check_linear_step(place, shape, dtype, terms):
    doubled = (2 * shape[0], *shape[1:])
    x, row = data(place, shape), [0.75, -0.5, 0.3, 1.25, -2.0, 0.01, 3.0, 0.5, -1.5, 0.125][: 1 + terms]
    k = [data(place, doubled if j % 2 else shape, dtype, seed=2 + j) for j in range(terms)]
    copy = torch.full(doubled, float("nan"), dtype=dtype, device=place.device)
    out = step(place, x, k, row, copy=copy)
    wanted, size = oracle.linear_step(array(x), [array(term) for term in k], row, 2.5)
    np.testing.assert_array_less(np.abs(array(out) - wanted), 30 * 2.0**-24 * size + 1e-30)
    close(copy, np.concatenate([wanted, wanted]), size.max(initial=0.0))
    assert torch.equal(step(place, x, k, row, out=x), out)


def check_linear_step_keeps(place, shape, dtype, terms):
    """The last term as it came, in its own dtype and in that of the state, beside the same result."""
    x, row = data(place, shape), [0.75, -0.5, 0.3, 1.25, -2.0, 0.01, 3.0, 0.5, -1.5, 0.125][: 1 + terms]
    k = [data(place, (2 * shape[0], *shape[1:]) if j + 1 < terms and j % 2 else shape, dtype, seed=2 + j) for j in range(terms)]
    wanted = step(place, x, k, row)
    for kept_dtype in (dtype, torch.float32):
        kept = torch.full(shape, float("nan"), dtype=kept_dtype, device=place.device)
        assert torch.equal(step(place, x, k, row, kept=kept), wanted)
        assert torch.equal(kept, k[-1].to(kept_dtype))


def check_linear_step_in_mixed_layouts(place, dtype):
    shape, row = (4, 3, 17, 16), [0.51, 0.26, -1.1]  # whose products round, so that another order of operations shows
    x, k = data(place, shape), [data(place, shape, dtype, seed=2), data(place, (8, *shape[1:]), dtype, seed=3)]
    wanted = step(place, x, k, row)
    last = torch.channels_last
    assert torch.equal(step(place, x.to(memory_format=last), k, row), wanted)
    assert torch.equal(step(place, x, [term.to(memory_format=last) for term in k], row), wanted)
    state = x.to(memory_format=last)
    assert torch.equal(step(place, state, [term.to(memory_format=last) for term in k], row, out=state), wanted)
    kept = torch.empty_like(x, dtype=dtype, memory_format=last)
    assert torch.equal(step(place, x, k[::-1], [0.51, -1.1, 0.26], kept=kept), step(place, x, k[::-1], [0.51, -1.1, 0.26]))
    assert torch.equal(kept, k[0])


def error_norm(place, y, end, k, coefficients, rtol=0.5, atol=0.25):
    means = torch.full(y.shape[:1], float("nan"), dtype=torch.float64, device=place.device)
    with torch.no_grad():
        _ops.step_error(place.backend)(means, y, end, k, torch.tensor(coefficients, dtype=torch.float64, device=place.device), rtol, atol)
    return means


def check_step_error(place, shape, dtype, terms, layout=torch.contiguous_format):
    """Of slopes in ``dtype`` and in a layout of their own, and of float64 states for float64 slopes."""
    coefficients = [-0.5, 0.3, 1.25, -2.0, 0.01, 3.0, 0.5, -1.5, 0.125][:terms]
    wide = dtype == torch.float64
    y, end = (data(place, shape, dtype if wide else torch.float32, seed=seed) for seed in (1, 2))
    k = [data(place, shape, dtype, seed=3 + j) for j in range(terms)]
    moved = [x.to(memory_format=layout) for x in k] if len(shape) == 4 else k
    wanted, growth = oracle.step_error(array(y), array(end), [array(x) for x in k], coefficients, 0.5, 0.25)
    found = error_norm(place, y, end, moved, coefficients)
    rounding = 2.0**-53 if wide else 2.0**-24
    np.testing.assert_array_less(np.abs(array(found) - wanted), rounding * (100 * growth + 100 * wanted) + 1e-300)
    assert torch.equal(error_norm(place, y[:1], end[:1], [x[:1] for x in moved], coefficients), found[:1])
    together = [x.to(memory_format=layout) if len(shape) == 4 else x for x in (y, end)]
    np.testing.assert_allclose(array(error_norm(place, *together, moved, coefficients)), array(found), rtol=100 * rounding)


def check_step_error_of_what_is_not_finite(place):
    y, end, k = (data(place, (6, 3, 5, 7), seed=seed) for seed in range(3))
    for sample, tensor in ((1, y), (2, end), (3, k)):
        tensor[sample, 1, 2, 3] = float("nan")
    k[4, 2, 4, 6] = float("inf")
    found = error_norm(place, y, end, [k, k], [1.0, 1.0])
    assert found.isnan().tolist() == [False, True, True, True, False, False]
    assert found.isinf().tolist() == [False, False, False, False, True, False]


def check_step_control(place, name, dtype):
    control_cases.check(_ops.step_control(place.backend), control_cases.CASES[name], dtype, place.device)


def probe_set(place, kind, shape, total, share=1):
    words = torch.randint(2**62, (int(np.prod(shape[1:])) + total,), generator=torch.Generator().manual_seed(3)).to(place.device)
    codes, rows = words.split([len(words) - total, total]) if kind == "hadamard" else (words[:0], words[:0])
    key = make_key(SEED, STEP, None, shape[0], torch.device(place.device))
    return _ops.ProbeSet(key, codes.contiguous(), rows.contiguous(), 5, total, share, kind == "gaussian")


def model_probes(probes, shape):
    if probes.normal:
        return np.stack([oracle.normal(shape, SEED, STEP, "probe", index=5 + q) for q in range(probes.total)])
    return oracle.probes(shape, SEED, STEP, 0, probes.total, 5, probes.share, probes.codes.tolist(), probes.rows.tolist())


def check_probe(place, shape, kind, channels_last):
    probes = probe_set(place, kind, shape, 6, share=3)
    for dtype in DTYPES:
        like = data(place, shape, dtype)
        like = like.to(memory_format=torch.channels_last) if channels_last and like.dim() == 4 else like
        np.testing.assert_array_equal(array(_ops.probe(like, probes, 0, 6, place.backend)), model_probes(probes, shape))


def evaluate(place, g, probes):
    dots = torch.full(g.shape[:2], float("nan"), dtype=torch.float64, device=place.device)
    sums = torch.zeros(2, g.shape[1], dtype=torch.float64, device=place.device)
    with torch.no_grad():
        for first in range(0, probes.total, 3):
            _ops.divergence_step(sums, dots, g[first : first + 3], probes, first, 0.5, -2.0, place.backend)
    return dots, sums


def check_divergence_step(place, shape, kind, dtype=torch.float32, times=3):
    """The model's estimate of the same numbers, and the same bits every time."""
    g, probes = data(place, (6, *shape), dtype), probe_set(place, kind, shape, 6, share=1 if kind == "gaussian" else 3)
    dots, sums = evaluate(place, g, probes)
    z = model_probes(probes, shape)
    z = array(torch.from_numpy(z).float().to(dtype)) if probes.normal and dtype.itemsize == 2 else z
    terms = (z * array(g)).reshape(6, shape[0], -1)
    # a normal in another rounding of 16 bits is off by a unit in the last place
    tolerance = 8e-3 if probes.normal and dtype == torch.bfloat16 else 1e-3 if probes.normal and dtype == torch.float16 else 1e-5
    np.testing.assert_array_less(np.abs(array(dots) - terms.sum(2)), tolerance * np.abs(array(g)).reshape(6, shape[0], -1).sum(2) + 1e-30)
    np.testing.assert_allclose(array(sums), oracle.divergence_sums(array(dots), probes.groups, 0.5, -2.0), rtol=1e-12, atol=1e-12)
    for _ in range(times):
        assert all(torch.equal(a, b) for a, b in zip(evaluate(place, g, probes), (dots, sums), strict=True))
