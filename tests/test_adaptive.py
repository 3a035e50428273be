"""Adaptive methods: right answers on every path, evaluations counted, and an error in words where a solve cannot succeed."""

import math

import numpy as np
import pytest
import torch
from sampling_helpers import Counted, network, noise64, schedule, solve, velocity_of
from torch import nn

import fm_fast as fm
from fm_fast.solvers import ADAPTIVE

X0 = noise64(3, 2, 4)
TIGHT = {"rtol": 1e-8, "atol": 1e-8}
LOOSE = {"rtol": 1e-5, "atol": 1e-5}
FINE = np.arange(201) / 200


def tolerances(method):
    return LOOSE if method in ("adaptive_heun", "fehlberg2") else TIGHT


@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("direction", ["sample", "encode"])
def test_each_method_and_its_count(method, direction):
    model = Counted()
    found = getattr(fm, direction)(model, X0, method=method, **tolerances(method))
    expected = solve("rk4", network, X0, FINE if direction == "sample" else FINE[::-1])
    error = 1000 * tolerances(method)["rtol"]
    torch.testing.assert_close(found.x, expected, rtol=error, atol=error)
    assert found.nfe == len(model.times) > 4 and set(model.batches) == {3}
    assert min(model.times) >= 0.0 and max(model.times) <= 1.0


@pytest.mark.parametrize("objective", ["velocity", "noise", "score", "data"])
@pytest.mark.parametrize("path", ["vp", "ot", "cosine"])
def test_times_never_leave_the_range_of_the_path(path, objective):
    """Exact networks for data N(0, 0.25): the ends, where torchdiffeq alone would look outside, do no harm."""
    spread = 0.5

    def exact(x, t):
        a, s, da, ds = schedule(path, float(t[0]))
        factors = {"velocity": a * da * spread**2 + s * ds, "noise": s, "score": -1.0, "data": a * spread**2}
        return factors[objective] / (a * a * spread**2 + s * s) * x

    model = Counted(exact)
    found = fm.sample(model, X0, path=path, objective=objective, method="dopri5", rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(found.x, spread * X0, rtol=2e-3, atol=1e-4)
    assert all(math.isfinite(t) and 0.0 <= t <= (1 - 1e-5 if path == "vp" else 1.0) for t in model.times)


def test_an_objective_with_factors_that_change():
    found = fm.sample(network, X0, path="cosine", objective="noise", method="dopri5", t0=0.3, t1=0.9, **TIGHT)
    expected = solve("rk4", lambda x, t: velocity_of("cosine", "noise", network(x, t), x, t), X0, np.linspace(0.3, 0.9, 201))
    torch.testing.assert_close(found.x, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("direction", ["sample", "encode"])
def test_save_times(direction):
    times = [0.75, 0.2, 0.2, 0.0, 1.0]
    found = getattr(fm, direction)(network, X0, method="dopri5", save=times, **TIGHT)
    assert found.saved_t == tuple(times) and found.saved.shape == (5, *X0.shape)
    for time, state in zip(times, found.saved, strict=True):
        nodes = np.linspace(0.0 if direction == "sample" else 1.0, time, 201)
        torch.testing.assert_close(state, solve("rk4", network, X0, nodes), rtol=1e-6, atol=1e-6)
    end = found.saved[-1 if direction == "sample" else 3]
    assert torch.equal(end, found.x)


@pytest.mark.parametrize("method", ["dopri5", "dopri8"])
@pytest.mark.parametrize("direction", ["sample", "encode"])
def test_save_every_step(direction, method):
    """The start and the state after each step that counted: in between they are the solution too, and nothing is computed for them."""
    finished = []
    options = {"method": method, "rtol": 1e-7, "atol": 1e-7}
    found = getattr(fm, direction)(network, X0, save="steps", callback=lambda *step: finished.append(step), **options)
    times, (first, last) = found.saved_t, (0.0, 1.0) if direction == "sample" else (1.0, 0.0)
    assert times == (first, *(t for _, t, _ in finished)) and times[-1] == last and len(set(times)) == len(times) > 4
    assert torch.equal(found.saved, torch.stack([X0, *(x for _, _, x in finished)])) and torch.equal(found.saved[-1], found.x)
    for time, state in zip(times, found.saved, strict=True):
        torch.testing.assert_close(state, solve("rk4", network, X0, np.linspace(first, time, 201)), rtol=1e-5, atol=1e-5)
    assert found.nfe == getattr(fm, direction)(network, X0, **options).nfe


def test_gradients_pass_through_every_step_that_is_saved():
    x = X0.clone().requires_grad_()
    found = fm.sample(lambda x, t: x, x, method="dopri5", save="steps", grad="direct", **TIGHT)
    (gradient,) = torch.autograd.grad(found.saved.sum(), x)
    torch.testing.assert_close(gradient, torch.full_like(x, sum(math.exp(t) for t in found.saved_t)), rtol=1e-6, atol=0)


def test_steps_of_an_empty_batch():
    found = fm.sample(network, X0[:0], method="dopri5", save="steps")
    assert found.saved.shape == (1, 0, *X0.shape[1:]) and found.saved_t == (0.0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_state_is_wide_whatever_the_model(dtype):
    inputs = set()

    def model(x, t):
        inputs.add((x.dtype, t.dtype))
        return network(x.float(), t).to(dtype)

    found = fm.sample(model, X0.float(), method="dopri5", dtype=dtype, rtol=3e-3, atol=3e-3)
    assert inputs == {(dtype, torch.float32)} and found.x.dtype == torch.float32
    torch.testing.assert_close(found.x.double(), solve("rk4", network, X0, FINE), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("shape", [(4,), (0, 3), (2, 0), (2, 3, 4, 4)], ids=str)
def test_shapes(shape):
    found = fm.sample(network, noise64(*shape), method="bosh3", rtol=1e-6, atol=1e-6, save=[0.5])
    assert found.x.shape == shape and found.saved.shape == (1, *shape)
    torch.testing.assert_close(found.x, solve("rk4", network, noise64(*shape), FINE), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "turn", [lambda x: torch.rot90(x, 1, (2, 3)), lambda x: x.transpose(2, 3), lambda x: x[:, :1].expand(-1, 3, -1, -1)]
)
def test_any_layout(turn):
    noise = turn(noise64(2, 3, 4, 5))
    found = fm.sample(lambda x, t: -x, noise, method="dopri5", rtol=1e-7, atol=1e-7, save=[0.5])
    torch.testing.assert_close(found.x, math.exp(-1.0) * noise, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.saved[0], math.exp(-0.5) * noise, rtol=1e-5, atol=1e-5)


def test_the_callers_noise_is_never_altered():
    before = X0.clone()
    found = fm.sample(lambda x, t: x, X0, method="dopri5")
    assert torch.equal(X0, before) and found.x.data_ptr() != X0.data_ptr()


# Solves that cannot succeed


@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("start", [0.0, 0.5])
def test_a_field_that_is_not_finite_ends_in_an_error(method, value, start):
    model = Counted(lambda x, t: torch.where(t[:, None, None] >= start, value, 1.0) * torch.ones_like(x))
    with pytest.raises(RuntimeError, match=rf"{method} failed \(.*\): the model's velocity is not finite, or too rough for rtol=1e-05"):
        fm.sample(model, X0, method=method)
    assert len(model.times) < 5000


def test_one_sample_that_is_not_finite_is_enough():
    with pytest.raises(RuntimeError, match="the model's velocity is not finite"):
        fm.sample(lambda x, t: torch.where(torch.arange(3)[:, None, None] == 1, math.nan, 1.0) * x, X0, method="dopri5")


def test_noise_that_is_not_finite():
    with pytest.raises((RuntimeError, FloatingPointError), match="finite"):
        fm.sample(network, torch.full((2, 3), math.nan), method="dopri5")


def test_too_many_steps():
    with pytest.raises(
        RuntimeError, match=r"dopri5 did not reach the end of the solve in max_steps=5 steps; raise max_steps, or rtol=1e-08"
    ):
        fm.sample(lambda x, t: torch.sin(300 * x), X0, method="dopri5", max_steps=5, **TIGHT)


def test_a_wall_of_what_is_not_finite_is_told():
    with pytest.raises(RuntimeError, match=r"max_steps=200 steps, of which \d+ led to values that are not finite; raise max_steps"):
        fm.encode(
            lambda x, t: torch.where(x > 1.5, torch.nan, -x), torch.linspace(-1.4, 1.4, 64).reshape(32, 2), method="dopri5", max_steps=200
        )


def test_an_error_inside_the_model_is_the_models_own():
    def model(x, t):
        assert x.sum() > 1e9, "mine"
        return x

    with pytest.raises(AssertionError, match="mine"):
        fm.sample(model, X0, method="dopri5")


# Gradients


@pytest.mark.parametrize("grad", ["direct", "checkpoint"])
def test_gradients(grad):
    model = nn.Linear(4, 4).double()

    def end(noise, field, **arguments):
        return fm.sample(lambda x, t: torch.sin(field(x)), noise, **arguments).x.square().sum()

    results = []
    for arguments in ({"method": "dopri5", "grad": grad, **TIGHT}, {"method": "rk4", "steps": 100, "grad": "direct"}):
        model.zero_grad()
        noise = X0.clone().requires_grad_()
        end(noise, model, **arguments).backward()
        results.append((noise.grad, model.weight.grad.clone(), model.bias.grad.clone()))
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def test_nothing_is_recorded_unasked():
    assert not fm.sample(network, X0.clone().requires_grad_(), method="dopri5").x.requires_grad


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("method", ["dopri5", "dopri8", "adaptive_heun"])
def test_a_field_of_zero_takes_ever_longer_steps(method, per_sample):
    """A field of 0: a first step of 1e-6, and each step ten times as long as the one before."""
    found = fm.sample(lambda x, t: 0 * x, X0, method=method, per_sample=per_sample)
    assert torch.equal(found.x, X0) and found.nfe <= 2 + 8 * 13


@pytest.mark.parametrize("per_sample", [False, True])
def test_times_that_a_model_keeps_stay(per_sample):
    kept, seen = [], []

    def model(x, t):
        kept.append(t)
        seen.append(t.tolist())
        return network(x, t)

    fm.sample(model, X0, method="dopri5", per_sample=per_sample)
    assert [t.tolist() for t in kept] == seen
