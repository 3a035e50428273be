"""path_sample against the independent float64 model: every path, objective, time sampler, dtype, layout and data map."""

import dataclasses
import math

import numpy as np
import oracle
import pytest
import torch
from flows import Linear
from thread_counts import on_thread_counts

import fm_fast as fm
from fm_fast import _backends
from fm_fast.objectives import OBJECTIVES as BUILT_IN
from fm_fast.objectives import Objective, Target

PATHS = {"ot": "ot", "ot-0.1": fm.OT(sigma_min=0.1), "vp": fm.VP(), "ve": "ve", "cosine": fm.Cosine()}
OBJECTIVES = ["velocity", "noise", "score", "scoreflow", "data"]
SHAPES = [(3,), (5, 1), (4, 2), (3, 7), (2, 3, 5), (2, 3, 4, 5), (2, 3, 17, 16), (2, 3, 2, 3, 5), (3, 4099), (1, 2, 9)]
SEED, STEP = 21, 4
pytestmark = pytest.mark.usefixtures("poisoned_outputs")
needs_cpp = pytest.mark.skipif(_backends.why_not("path_sample", "cpu", "cpp") is not None, reason="the C++ library is not built")


def data(shape, dtype=torch.float32, levels=256):
    generator = torch.Generator().manual_seed(1)
    if dtype == torch.uint8:
        return torch.randint(levels, shape, generator=generator, dtype=dtype)
    return torch.randn(shape, generator=generator).to(dtype)


def expected_rows(path, objective, sampler, batch, ids=None):
    low, high = oracle.time_range(path, objective)
    t = low + (high - low) * oracle.raw_time(sampler, batch, SEED, STEP, ids)
    return t, oracle.coefficients(path, objective, t.astype(np.float32).astype(np.float64))


def layouts(shape):
    """x1 in every memory layout that holds the same numbers."""
    x = data(shape)
    yield "contiguous", x
    if len(shape) == 4:
        yield "channels_last", x.to(memory_format=torch.channels_last)
        yield "transposed", x.transpose(2, 3).contiguous().transpose(2, 3)
    if len(shape) == 5:
        yield "channels_last_3d", x.to(memory_format=torch.channels_last_3d)
    yield "batch slice", torch.stack([x, x], 1).flatten(0, 1)[::2]
    yield "misaligned", torch.cat([torch.zeros(1), x.flatten()])[1:].view(shape)
    yield "reversed", x.flip(0).flip(0)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("sampler", ["uniform", "stratified", "logit-normal"])
def test_times_coefficients_and_points(path, objective, sampler, backend):
    x1 = data((64, 3, 5, 5))
    s = fm.sample_path(x1, path=PATHS[path], objective=objective, t_sampler=sampler, seed=SEED, step=STEP, sample_ids=7, backend=backend)
    t, rows = expected_rows(path, objective, sampler, 64, np.arange(64) + 7)
    np.testing.assert_allclose(s.t.numpy(), t, rtol=3e-7, atol=6e-8)
    # VP's derivative of sigma and ScoreFlow's weight amplify the rounding of t near the data end
    rows = oracle.coefficients(path, objective, s.t.double().numpy())
    np.testing.assert_allclose(s.coef.numpy(), rows, rtol=1e-6, atol=1e-7)
    x0 = oracle.normal((64, 3, 5, 5), SEED, STEP, ids=np.arange(64) + 7)
    np.testing.assert_allclose(s.x_t.numpy(), oracle.sample(x1.double().numpy(), x0, rows), rtol=1e-6, atol=2e-6 * max(1, rows[:, 1].max()))
    assert s.x_t.dtype == s.t.dtype == torch.float32


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_and_layouts_give_the_same_numbers(shape, backend):
    rows = expected_rows("ot", "velocity", "uniform", shape[0])[1]
    expected = oracle.sample(data(shape).double().numpy(), oracle.normal(shape, SEED, STEP), rows)
    plain = fm.sample_path(data(shape), seed=SEED, step=STEP, backend=backend).x_t
    np.testing.assert_allclose(plain.numpy(), expected, rtol=1e-6, atol=3e-6)
    for name, x1 in layouts(shape):
        assert torch.equal(x1, data(shape)), name
        assert torch.equal(fm.sample_path(x1, seed=SEED, step=STEP, backend=backend).x_t, plain), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.uint8], ids=str)
@pytest.mark.parametrize("out", [None, torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_are_rounded_once(dtype, out, backend):
    x1 = data((4, 3, 6, 7), dtype)
    s = fm.sample_path(x1, dtype=out, seed=SEED, step=STEP, backend=backend)
    rows = oracle.coefficients("ot", "velocity", s.t.double().numpy())
    wide = oracle.data(x1.double().numpy() if dtype != torch.uint8 else x1.numpy(), SEED, STEP)
    expected = torch.from_numpy(oracle.sample(wide, oracle.normal(x1.shape, SEED, STEP), rows))
    assert s.x_t.dtype == (out or (torch.float32 if dtype == torch.uint8 else dtype))
    assert s.t.dtype == (torch.float64 if torch.float64 in (dtype, out) else torch.float32)
    half_ulp = {torch.bfloat16: 2**-8, torch.float16: 2**-11}.get(s.x_t.dtype, 2e-7)
    torch.testing.assert_close(s.x_t.double(), expected, rtol=half_ulp * 1.01, atol=3e-6)


@pytest.mark.parametrize("dequantise", [False, True])
@pytest.mark.parametrize("flip", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("shape", "levels"), [((32, 3, 5, 6), 256), ((32, 3, 5, 6), 17), ((3, 40, 3, 5), 256)])
def test_data_map_flip_and_dequantisation(dequantise, flip, shape, levels, backend):
    x1 = data(shape, torch.uint8, levels)
    s = fm.sample_path(x1, flip=flip, levels=levels, dequantise=dequantise, seed=SEED, step=STEP, backend=backend)
    mapped = oracle.data(x1.numpy(), SEED, STEP, None, flip, levels, dequantise)
    x0 = oracle.normal(x1.shape, SEED, STEP)
    rows = oracle.coefficients("ot", "velocity", s.t.double().numpy())
    np.testing.assert_allclose(s.x_t.numpy(), oracle.sample(mapped, x0, rows), rtol=1e-6, atol=3e-6)
    np.testing.assert_allclose(s.target.numpy(), mapped - x0, rtol=1e-6, atol=4e-6)


def test_flip_of_floating_data_is_the_exact_mirror(backend):
    x1 = data((16, 3, 4, 5))
    plain = fm.sample_path(x1, t=1.0, seed=SEED, step=STEP, backend=backend).x_t
    flipped = fm.sample_path(x1, t=1.0, flip=1.0, seed=SEED, step=STEP, backend=backend).x_t
    assert torch.equal(plain, x1)
    assert torch.equal(flipped, x1.flip(-1))


@pytest.mark.parametrize("t", [0.0, 0.25, 1, torch.tensor(0.5), torch.linspace(0, 1, 6)], ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_given_times_are_kept_inside_the_path(t, path, backend):
    x1 = data((6, 8))
    s = fm.sample_path(x1, t=t, path=PATHS[path], seed=SEED, step=STEP, backend=backend)
    low, high = oracle.time_range(path, "velocity")
    expected = np.clip(np.broadcast_to(np.asarray(t, dtype=np.float32), 6), low, high)
    np.testing.assert_allclose(s.t.numpy(), expected, rtol=1e-7)
    np.testing.assert_allclose(s.coef.numpy(), oracle.coefficients(path, "velocity", s.t.double().numpy()), rtol=1e-6, atol=1e-7)
    assert bool(s.x_t.isfinite().all())


def test_a_given_time_tensor_is_not_written_to(backend):
    t = torch.tensor([0.5, 1.0])
    fm.sample_path(data((2, 8)), t=t, path="vp", seed=SEED, step=STEP, backend=backend)
    assert t.tolist() == [0.5, 1.0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_given_noise_is_used(dtype, backend):
    x1, x0 = data((5, 3, 4, 4)), data((5, 3, 4, 4), dtype).flip(0).to(memory_format=torch.channels_last)
    s = fm.sample_path(x1, x0=x0, t=0.25, backend=backend)
    np.testing.assert_allclose(s.x_t.double().numpy(), 0.25 * x1.double().numpy() + 0.75 * x0.double().numpy(), rtol=1e-6, atol=1e-6)
    assert torch.equal(s.x0, x0.to(s.coef.dtype))


def test_an_objective_of_ones_own(backend):
    """2 ||3 o - x1||^2: kernels are handed its coefficients, since they know no code for it."""
    target = lambda p: Target(torch.ones_like(p.a), torch.zeros_like(p.a), torch.full_like(p.a, 3.0), torch.full_like(p.a, 2.0))  # noqa: E731
    mine = Objective("mine", target, BUILT_IN["velocity"].velocity)
    x1, o = data((5, 3, 4)), data((5, 3, 4)).flip(0).requires_grad_()
    loss = fm.sample_path(x1, path="vp", objective=mine, seed=SEED, step=STEP, backend=backend).loss(o)
    error = 3.0 * o.detach().double() - x1.double()
    torch.testing.assert_close(loss.double(), (2.0 * error**2).mean(), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(torch.autograd.grad(loss, o)[0].double(), 12.0 * error / error.numel(), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("sampler", ["uniform", "stratified", "logit-normal"])
def test_a_custom_path_equals_the_built_in_one(sampler, backend):
    x1 = data((6, 3, 4, 4))
    custom, built_in = (fm.sample_path(x1, path=p, t_sampler=sampler, seed=SEED, step=STEP, backend=backend) for p in (Linear(), "ot"))
    torch.testing.assert_close(custom.t, built_in.t, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(custom.x_t, built_in.x_t, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
def test_schedule_derivatives_match_autograd(path):
    path = fm.paths.as_path(path)
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64, requires_grad=True)
    for value, derivative in ((path.alpha, path.d_alpha), (path.sigma, path.d_sigma)):
        y = value(t)
        slope = torch.autograd.grad(y.sum(), t)[0] if y.requires_grad else torch.zeros_like(t)
        torch.testing.assert_close(derivative(t), slope, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("distance", [0.0, 2.0**-45, 2.0**-30])
def test_the_cosine_paths_noise_vanishes_in_proportion_at_its_end(distance, backend):
    """sin x = x to 1e-17 there; the relative error is what the score's and ScoreFlow's coefficients see."""
    t, x1 = torch.tensor([1.0 - distance], dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64)
    coefficients = fm.sample_path(x1, t=t, path="cosine", objective="score", seed=0, step=0, backend=backend).coef[0]
    expected = torch.tensor(math.pi / 2 * distance, dtype=torch.float64)
    torch.testing.assert_close(coefficients[1], expected, rtol=1e-14, atol=0.0)


def test_the_vp_velocity_from_noise_equals_the_papers_diffusion_form():
    """Equation 46: v = beta / 2 (x - o / s), with o the noise."""
    for t in (0.1, 0.5, 0.9):
        p, r = fm.objectives.velocity_coefficients(fm.VP(), "noise", t)
        beta, s = 0.1 + 19.9 * (1 - t), float(fm.VP().sigma(torch.tensor(t, dtype=torch.float64)))
        assert p == pytest.approx(beta / 2, rel=1e-12)
        assert r == pytest.approx(-beta / (2 * s), rel=1e-12)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_velocity_of_a_perfect_prediction_is_the_paths(path, objective):
    rng = np.random.default_rng(0)
    x1, x0 = rng.standard_normal(8), rng.standard_normal(8)
    for t in (0.2, 0.7):
        a, s, c1, c0, k, _ = oracle.coefficients(path, objective, np.array([t]))[0]
        p, r = fm.objectives.velocity_coefficients(fm.paths.as_path(PATHS[path]), objective, t)
        _, _, da, ds = oracle.schedule(path, np.array([t]))
        x = a * x1 + s * x0
        np.testing.assert_allclose(p * x + r * (c1 * x1 + c0 * x0) / k, da * x1 + ds * x0, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("t", [0.0, 1.0])
def test_velocity_coefficients_are_finite_at_both_ends(path, objective, t):
    p, r = fm.objectives.velocity_coefficients(fm.paths.as_path(PATHS[path]), objective, t)
    assert abs(p) < 1e9
    assert abs(r) < 1e9


def test_stratified_times_cover_the_interval(backend):
    s = fm.sample_path(data((64, 2)), t_sampler="stratified", seed=SEED, step=STEP, sample_ids=1000, backend=backend)
    gaps = s.t.sort().values.diff()
    assert float(gaps.max()) < 3.5 / 64


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (0, 5), (4, 0), (2, 3, 0), (2, 0, 3), (1, 0, 5, 3)], ids=str)
def test_empty_data(shape, backend):
    s = fm.sample_path(data(shape), seed=SEED, step=STEP, backend=backend)
    assert s.x_t.shape == shape
    assert s.t.shape == shape[:1]


def test_nan_in_the_data_stays_where_it_is(backend):
    x1 = data((3, 3, 5, 5))
    x1[1, 2, 3, 4] = float("nan")
    s = fm.sample_path(x1, seed=SEED, step=STEP, backend=backend)
    assert torch.equal(s.x_t.isnan(), x1.isnan())


def test_points_do_not_depend_on_the_batch_or_the_thread_count(backend):
    x1 = data((37, 3, 19, 19))
    whole = fm.sample_path(x1, seed=SEED, step=STEP, backend=backend).x_t
    parts = [fm.sample_path(x1[i : i + 9], seed=SEED, step=STEP, sample_ids=i, backend=backend).x_t for i in range(0, 37, 9)]
    assert torch.equal(whole, torch.cat(parts))
    again = on_thread_counts(lambda: fm.sample_path(x1, seed=SEED, step=STEP, backend=backend).x_t)
    assert all(torch.equal(whole, one) for one in again)


def test_a_changed_objective_is_not_mistaken_for_the_built_in_one(backend):
    velocity = fm.objectives.OBJECTIVES["velocity"]
    heavier = dataclasses.replace(velocity, target=lambda p: velocity.target(p)._replace(w=100 * torch.ones_like(p.s)))
    s, plain = (fm.sample_path(data((4, 6)), objective=o, seed=SEED, step=STEP, backend=backend) for o in (heavier, velocity))
    assert torch.equal(s.x_t, plain.x_t)
    torch.testing.assert_close(s.loss(s.x_t), 100 * plain.loss(s.x_t))


UNKNOWN = {
    "argument path: unknown code 9": {"path": 9},
    "argument path: unknown code -2": {"path": -2},
    "argument path: unknown code 4294967296": {"path": 2**32},
    "argument objective: unknown code 5": {"objective": 5},
    "argument t_sampler: unknown code 5": {"t_sampler": 5},
    "argument t_sampler: unknown code -2": {"t_sampler": -2},
}


def raw_arguments(**changes):
    """Of the raw op, which makes times and coefficients of a linear path."""
    written = {"x_t": torch.empty(2, 3), "t": torch.empty(2), "coef": torch.tensor([[0.25, 0.75, 1, -1, 1, 1]]).repeat(2, 1)}
    read = {"x1": data((2, 3)), "x0": data((2, 3)).flip(0), "key": torch.zeros(3, dtype=torch.int64)}
    path = {"path": 0, "path_a": 0.0, "path_b": 0.0, "objective": 0}
    times = {"t_sampler": 0, "t_mean": 0.0, "t_std": 1.0, "t_min": 0.0, "t_max": 1.0}
    return written | read | path | times | {"flip": 0.0, "levels": 256.0, "dequantise": False} | changes


@needs_cpp
@pytest.mark.parametrize("message", UNKNOWN)
def test_codes_that_no_kernel_knows_are_refused(message):
    torch.ops.fm_fast.path_sample(**raw_arguments())
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fm_fast.path_sample(**raw_arguments(**UNKNOWN[message]))


@needs_cpp
def test_data_of_a_dtype_that_no_kernel_reads_are_refused():
    with pytest.raises(RuntimeError, match="argument x1: expected a floating-point or uint8 tensor"):
        torch.ops.fm_fast.path_sample(**raw_arguments(x1=torch.ones(2, 3, dtype=torch.int64)))


@needs_cpp
@pytest.mark.parametrize("objective", [-1, 5, 2**40])
def test_given_coefficients_may_be_those_of_any_objective(objective):
    arguments = raw_arguments(path=-1, t_sampler=-1, objective=objective)
    rows = arguments["coef"].clone()
    torch.ops.fm_fast.path_sample(**arguments)
    torch.testing.assert_close(arguments["x_t"], 0.25 * arguments["x1"] + 0.75 * arguments["x0"], rtol=1e-6, atol=1e-6)
    assert torch.equal(arguments["coef"], rows)


def test_a_schedule_may_return_numbers():
    class Constant(Linear):
        def d_alpha(self, t):
            return 1.0

    custom, built_in = (fm.sample_path(data((4, 6)), path=p, seed=SEED, step=STEP) for p in (Constant(), "ot"))
    torch.testing.assert_close(custom.coef, built_in.coef)


@pytest.mark.parametrize("path", [*PATHS.values(), fm.VP(0.2, 15.0), Linear()], ids=[*PATHS, "vp-others", "custom"])
def test_a_split_batch_has_the_same_times_to_the_last_bit(path, backend):
    """In float64 too, where a transcendental function may round otherwise at the end of a vector than inside it."""
    x1, options = torch.zeros(37, 2, dtype=torch.float64), {"path": path, "t_sampler": "logit-normal", "seed": SEED, "backend": backend}
    for step in range(5):
        whole = fm.sample_path(x1, step=step, **options)
        alone = [fm.sample_path(x1[i : i + 1], sample_ids=i, step=step, **options) for i in range(37)]
        assert torch.equal(whole.t, torch.cat([s.t for s in alone])) and torch.equal(whole.coef, torch.cat([s.coef for s in alone]))


class Returned(fm.OT):
    """The OT path whose derivative, or another function, returns what it is told for times t."""

    def __init__(self, name, value):
        super().__init__()
        object.__setattr__(self, name, value)


@pytest.mark.parametrize("value", [lambda t: 1, lambda t: np.float32(1.0), lambda t: torch.tensor(1.0), lambda t: torch.ones(1)])
def test_a_schedule_may_return_one_element(value, backend):
    path, x1 = Returned("d_alpha", value), torch.linspace(-1, 1, 12).reshape(4, 3)

    def model(x, t):
        return x * t[:, None]

    loss, plain = (fm.flow_matching_loss(model, x1, path=p, seed=1, step=2, backend=backend) for p in (path, "ot"))
    torch.testing.assert_close(loss, plain)
    for solve in (
        lambda p: fm.sample(model, x1, path=p, objective="data", steps=3, backend=backend).x,
        lambda p: fm.sample(model, x1, path=p, objective="data", method="dopri5", backend=backend).x,
        lambda p: fm.divergence(model, x1, 0.5, path=p, objective="data", seed=0, backend=backend).div,
    ):
        torch.testing.assert_close(solve(path), solve("ot"))


@pytest.mark.parametrize("name", ["alpha", "sigma", "d_alpha", "d_sigma"])
@pytest.mark.parametrize(
    ("value", "error", "found"),
    [
        (lambda t: t[:, None], ValueError, r"a number or the shape of its times, \(4,\), got \(4, 1\)"),
        (lambda t: t[:2], ValueError, r"a number or the shape of its times, \(4,\), got \(2,\)"),
        (lambda t: t[:1, None], ValueError, r"a number or the shape of its times, \(4,\), got \(1, 1\)"),
        (lambda t: "t", TypeError, r"a tensor or a number, got str"),
        (lambda t: None, TypeError, r"a tensor or a number, got NoneType"),
        (lambda t: t + 0j, TypeError, r"real values, got torch.complex"),
    ],
)
def test_what_a_schedule_returns_is_checked(name, value, error, found, backend):
    path, x1 = Returned(name, value), torch.linspace(-1, 1, 12).reshape(4, 3)
    with pytest.raises(error, match=f"^{name} of a path must return {found}"):
        fm.flow_matching_loss(lambda x, t: x, x1, path=path, seed=1, step=2, backend=backend)
    with pytest.raises(error, match=f"^{name} of a path must return {found}"):
        fm.divergence(lambda x, t: x, x1, torch.full((4,), 0.5), path=path, objective="data", seed=0, backend=backend)


@pytest.mark.parametrize("t", [None, 0.5])
def test_layouts_of_nothing_and_with_sizes_of_one(t, backend):
    for x1 in (data((4, 3, 8, 8))[:0][..., :6], data((2, 3, 8, 1, 7))[..., :6], data((2, 3, 1, 1, 7))):
        s = fm.sample_path(x1, t=t, seed=SEED, step=STEP, backend=backend)
        plain = fm.sample_path(x1.contiguous(), t=t, seed=SEED, step=STEP, backend=backend)
        assert torch.equal(s.x_t, plain.x_t)
        assert torch.equal(s.loss(x1, reduction="none"), plain.loss(x1.contiguous(), reduction="none"))


def test_the_default_device_does_not_matter(backend):
    x1 = data((4, 6))
    expected = fm.sample_path(x1, seed=SEED, step=STEP, backend=backend).x_t
    with torch.device("meta"):
        assert torch.equal(fm.sample_path(x1, seed=SEED, step=STEP, backend=backend).x_t, expected)
        assert fm.noise((2, 3), seed=0, step=0, device="cpu").device.type == "cpu"
        assert fm.noise((2, 3), seed=0, step=0).device.type == "meta"


def test_dequantisation_is_drawn_where_all_else_is_given():
    x1 = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="seed was given without a step"):
        fm.sample_path(x1, x0=torch.zeros(4, 3, 8, 8), t=0.5, seed=1, dequantise=True)
    one, other = (fm.sample_path(x1, x0=torch.zeros(4, 3, 8, 8), t=0.5, dequantise=True).x_t for _ in range(2))
    assert not torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_bytes_become_the_default_dtype(dtype, backend):
    torch.set_default_dtype(dtype)
    try:
        assert fm.sample_path(torch.zeros(2, 3, dtype=torch.uint8), seed=1, step=2, backend=backend).x_t.dtype == dtype
    finally:
        torch.set_default_dtype(torch.float32)


def test_coefficients_of_a_path_of_ones_own_are_float64_for_float64_data(backend):
    s = fm.sample_path(torch.zeros(2, 3, dtype=torch.float64), path=Linear(), t=0.1, seed=SEED, step=STEP, backend=backend)
    assert s.coef[:, :2].tolist() == [[0.1, 0.9]] * 2


def test_velocity_coefficients_carry_no_gradient():
    class Learned(Linear):
        scale = torch.ones((), dtype=torch.float64, requires_grad=True)

        def d_alpha(self, t):
            return self.scale * torch.ones_like(t)

    assert not any(part.requires_grad for part in fm.objectives.velocity_coefficients(Learned(), "data", 0.5))
