"""fm.sample and fm.encode around the solver: what is saved, which dtypes and layouts, and what happens to values that are not finite."""

import contextlib
import gc
import weakref

import numpy as np
import pytest
import torch
from peak_memory import peak_bytes
from sampling_helpers import FIXED, Counted, network, noise64, solve

import fm_fast as fm

X0 = noise64(3, 2, 4)
IMAGES = noise64(2, 3, 4, 4)


def hand(x, method, steps, model=network):
    return solve(method, model, x.double(), np.arange(steps + 1) / steps)


# What is saved


@pytest.mark.parametrize("method", ["euler", "rk4", "ab3"])
def test_save_steps_holds_every_state(method, backend):
    found = fm.sample(network, X0, method=method, steps=5, save="steps", backend=backend)
    assert found.saved.shape == (6, *X0.shape) and found.saved_t == tuple(n / 5 for n in range(6))
    assert torch.equal(found.saved[0], X0) and torch.equal(found.saved[-1], found.x)
    for n in range(1, 6):
        torch.testing.assert_close(found.saved[n], solve(method, network, X0, np.arange(n + 1) / 5), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("method", ["midpoint", "ab2"])
@pytest.mark.parametrize("direction", ["sample", "encode"])
def test_saved_times_split_the_steps_that_contain_them(method, direction, backend):
    times = [0.9, 0.25, 0.6, 0.25, 0.0]
    nodes = [0.0, 0.25, 0.5, 0.6, 0.75, 0.9, 1.0]
    model = Counted()
    found = getattr(fm, direction)(model, X0, method=method, steps=4, save=times, backend=backend)
    assert found.saved_t == tuple(times) and found.saved.shape == (5, *X0.shape)
    assert found.nfe == len(model.times) == (12 if method == "midpoint" else 7)
    way = nodes if direction == "sample" else nodes[::-1]
    for time, state in zip(times, found.saved, strict=True):
        expected = solve(method, network, X0, way[: way.index(time) + 1])
        torch.testing.assert_close(state, expected, rtol=1e-12, atol=1e-13)


def test_save_at_the_ends_of_a_path_that_stops_early(backend):
    found = fm.sample(network, X0, path="vp", steps=4, save=[0.0, 1.0], backend=backend)
    assert found.saved_t == (0.0, 1 - 1e-5)
    assert torch.equal(found.saved[1], found.x) and torch.equal(found.saved[0], X0)


def test_a_trajectory_is_written_where_it_stays(backend):
    """Beside it the solve needs a few states' memory, and not the trajectory's again."""
    noise = torch.zeros(64, 1024)
    solve = lambda save: fm.sample(lambda x, t: x, noise, method="euler", steps=40, save=save, backend=backend)  # noqa: E731
    plain, saving = peak_bytes(lambda: solve(None)), peak_bytes(lambda: solve("steps"))
    assert saving - plain <= 1.1 * 41 * noise.nbytes


def test_nothing_is_saved_unasked(backend):
    found = fm.sample(network, X0, steps=4, backend=backend)
    assert found.saved is None and found.saved_t is None
    none = fm.sample(network, X0, steps=4, save=[], backend=backend)
    assert none.saved.shape == (0, *X0.shape) and none.saved_t == ()


def test_encode_saves_in_the_order_of_its_way(backend):
    found = fm.encode(network, X0, steps=4, save="steps", backend=backend)
    assert found.saved_t == (1.0, 0.75, 0.5, 0.25, 0.0)
    assert torch.equal(found.saved[0], X0) and torch.equal(found.saved[-1], found.x)


@pytest.mark.parametrize("direction", ["sample", "encode"])
def test_callback_sees_copies_after_each_step(direction, backend):
    seen = []

    def callback(step, t, x):
        seen.append((step, t, x.clone()))
        x.fill_(torch.nan)

    solver = getattr(fm, direction)
    found = solver(network, X0, steps=4, callback=callback, save=[0.3], backend=backend)
    assert torch.equal(found.x, solver(network, X0, steps=4, save=[0.3], backend=backend).x)
    times = [0.25, 0.3, 0.5, 0.75, 1.0] if direction == "sample" else [0.75, 0.5, 0.3, 0.25, 0.0]
    assert [entry[:2] for entry in seen] == list(enumerate(times, 1))
    assert torch.equal(seen[-1][2], found.x) and torch.equal(seen[times.index(0.3)][2], found.saved[0])


def test_progress_shows_the_steps(capsys):
    pytest.importorskip("tqdm")
    fm.sample(network, X0, steps=7, progress=True)
    assert "7/7" in capsys.readouterr().err
    fm.sample(network, X0, steps=7)
    assert capsys.readouterr().err == ""


def test_progress_without_tqdm(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tqdm.auto", None)
    with pytest.raises(ImportError, match="progress=True needs tqdm: pip install tqdm"):
        fm.sample(network, X0, steps=7, progress=True)


# There and back


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("midpoint", 2), ("rk4", 4)])
def test_encode_returns_to_the_noise_at_the_methods_order(method, order):
    def error(steps):
        x = fm.sample(network, X0, method=method, steps=steps).x
        return float((fm.encode(network, x, method=method, steps=steps).x - X0).abs().max())

    assert error(40) < 0.3 and error(20) / error(40) > 2 ** (order - 0.3)


def test_a_sample_does_not_depend_on_its_neighbours(backend):
    x = fm.noise((5, 3, 4), seed=0, step=0)
    together = fm.sample(network, x, steps=6, backend=backend).x
    assert torch.equal(torch.cat([fm.sample(network, x[i : i + 1], steps=6, backend=backend).x for i in range(5)]), together)


def test_the_same_call_gives_the_same_bits(backend):
    one, two = (fm.sample(network, IMAGES.float(), method="rk4", steps=6, backend=backend).x for _ in range(2))
    assert torch.equal(one, two)


# Dtypes and layouts


@pytest.mark.parametrize("method", FIXED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtype_of_the_noise(method, dtype, backend):
    inputs = set()

    def model(x, t):
        inputs.add((x.dtype, t.dtype))
        return network(x, t.to(x.dtype))

    noise = X0.to(dtype)
    found = fm.sample(model, noise, method=method, steps=5, backend=backend)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert found.x.dtype == wide and inputs == {(dtype, wide)}
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 0.15}[dtype]
    torch.testing.assert_close(found.x.double(), hand(noise, method, 5), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("noise", "given"), [("float64", "bfloat16"), ("float32", "float16"), ("float32", "float64"), ("bfloat16", "float32")]
)
def test_the_model_may_have_a_dtype_of_its_own(noise, given, backend):
    noise, given = getattr(torch, noise), getattr(torch, given)
    inputs = set()

    def model(x, t):
        inputs.add(x.dtype)
        return network(x.double(), t.double()).to(torch.bfloat16)

    x0 = X0.to(noise)
    found = fm.sample(model, x0, method="rk4", steps=6, dtype=given, save="steps", backend=backend)
    assert inputs == {given} and found.x.dtype == (torch.float64 if noise == torch.float64 else torch.float32)
    assert torch.equal(found.saved[0], x0.to(found.x.dtype))

    def rounded(x, t):
        return network(x.to(given).double(), t).to(torch.bfloat16).double()

    torch.testing.assert_close(found.x.double(), hand(x0, "rk4", 6, rounded), rtol=0.03, atol=0.03)


def test_a_bfloat16_model_loses_nothing_to_the_solver(backend):
    """1000 Euler steps: the error of the result is that of rounding the velocity, 1.1 times float32's at most."""
    exact = solve("rk4", network, X0, np.arange(401) / 400)

    def error(dtype):
        found = fm.sample(lambda x, t: network(x.float(), t).to(dtype), X0.float(), method="euler", steps=1000, backend=backend)
        return float((found.x.double() - exact).square().mean().sqrt())

    assert error(torch.bfloat16) <= 1.1 * error(torch.float32)


def strided(x, layout):
    if layout == "channels_last":
        return x.to(memory_format=torch.channels_last)
    if layout == "permuted":
        return x.permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0)
    if layout == "sliced":
        return torch.stack([x, x], dim=-1).flatten(-2)[..., ::2]
    return x[:1].expand_as(x) if layout == "expanded" else x


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted", "sliced", "expanded"])
@pytest.mark.parametrize("method", ["euler", "midpoint", "rk4", "ab2"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_layouts_of_the_noise_and_of_the_output(layout, method, dtype, backend):
    noise = strided(IMAGES.float(), layout)
    layouts = ["contiguous", "channels_last", "permuted", "sliced"]

    for output in layouts:
        found = fm.sample(lambda x, t: strided(network(x, t), output), noise, method=method, steps=3, dtype=dtype, backend=backend)  # noqa: B023
        tolerance = 1e-5 if dtype is None else 0.1
        torch.testing.assert_close(found.x.double(), hand(noise, method, 3), rtol=tolerance, atol=tolerance)


def test_channels_last_stays_channels_last(backend):
    layouts = set()

    def model(x, t):
        layouts.add(x.is_contiguous(memory_format=torch.channels_last))
        return network(x, t)

    noise = IMAGES.float().to(memory_format=torch.channels_last)
    found = fm.sample(model, noise, steps=3, dtype=torch.bfloat16, backend=backend)
    assert layouts == {True} and found.x.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(5,), (3, 1), (1, 1), (2, 3, 5, 7), (2, 3, 2, 3, 2), (2, 2, 1, 2, 1, 3)], ids=str)
@pytest.mark.parametrize("method", ["midpoint", "ab2"])
def test_every_number_of_dimensions(shape, method, backend):
    noise = noise64(*shape)
    found = fm.sample(network, noise, method=method, steps=4, save=[0.5], backend=backend)
    torch.testing.assert_close(found.x, hand(noise, method, 4), rtol=1e-12, atol=1e-13)
    assert found.saved.shape == (1, *shape) and found.finite.shape == shape[:1]


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (0,), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("method", FIXED)
def test_nothing_to_sample(shape, method, backend):
    found = fm.sample(lambda x, t: x * 2, torch.zeros(shape), method=method, steps=3, save="steps", backend=backend)
    assert found.x.shape == shape and found.saved.shape == (4, *shape) and bool(found.finite.all())


# Fields that are not finite


def half_broken(x, t):
    return torch.where((torch.arange(len(x)) % 2 == 0).reshape(-1, 1, 1), torch.nan, 1.0) * torch.ones_like(x)


@pytest.mark.parametrize("method", ["euler", "rk4", "ab2"])
def test_samples_that_are_not_finite(method, backend):
    message = r"2 of 3 samples are not finite after the solve to t = 1.0; take more steps or check the model \(on_nonfinite=\"mark\""
    with pytest.raises(FloatingPointError, match=message):
        fm.sample(half_broken, X0, method=method, steps=3, backend=backend)
    found = fm.sample(half_broken, X0, method=method, steps=3, on_nonfinite="mark", backend=backend)
    assert found.finite.tolist() == [False, True, False]
    torch.testing.assert_close(found.x[1], X0[1] + 1)


@pytest.mark.parametrize("ends", [(3e38, 3e38), (-3e38, -3e38), (3e38, -3e38)])
def test_finite_samples_whose_sum_is_not(ends, backend):
    x0 = torch.tensor(ends)[:, None].expand(2, 3)
    found = fm.sample(lambda x, t: torch.zeros_like(x), x0, method="euler", steps=1, backend=backend)
    assert found.finite.tolist() == [True, True] and torch.equal(found.x, x0)


@pytest.mark.parametrize("values", [(torch.inf, -torch.inf), (torch.inf, 0.0), (-torch.inf, 0.0), (torch.nan, 0.0)])
def test_no_sum_hides_what_is_not_finite(values, backend):
    with pytest.raises(FloatingPointError, match="of 2 samples are not finite"):
        fm.sample(lambda x, t: torch.zeros_like(x), torch.tensor(values)[:, None], method="euler", steps=1, backend=backend)


def test_a_field_that_explodes(backend):
    found = fm.sample(lambda x, t: x * 1e30, X0.float(), method="euler", steps=9, on_nonfinite="mark", backend=backend)
    assert not found.finite.any()
    with pytest.raises(FloatingPointError, match="3 of 3"):
        fm.encode(lambda x, t: x * 1e30, X0.float(), method="euler", steps=9, backend=backend)


@pytest.mark.parametrize("ends", ["well", "in an error"])
@pytest.mark.parametrize("grad", ["none", "direct"])
@pytest.mark.parametrize(
    "solver",
    [
        lambda model, **grad: fm.sample(model, X0, method="rk4", steps=2, **grad),
        lambda model, **grad: fm.encode(model, X0, method="ab2", steps=4, dtype=torch.float32, **grad),
        lambda model, **grad: fm.sample(model, X0, method="dopri5", **grad),
        lambda model, **grad: fm.log_likelihood(model, X0, steps=2, seed=0),
    ],
    ids=["rk4", "ab2", "dopri5", "log_likelihood"],
)
def test_buffers_are_freed_with_the_result(solver, grad, ends, backend):
    """And do not wait for the garbage collector, which counts objects and not their bytes."""
    inputs = []

    def model(x, t):
        if ends == "in an error" and len(inputs) == 3:
            raise ZeroDivisionError
        inputs.append(weakref.ref(x))
        return network(x, t)

    gc.disable()
    try:
        with contextlib.suppress(ZeroDivisionError):
            solver(model, grad=grad)
        assert len(inputs) >= 3 and not [x for x in inputs if x() is not None and x() is not X0]
    finally:
        gc.enable()
