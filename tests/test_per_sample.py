"""Adaptive steps of each sample's own: the same rules as for one sample alone, whatever else is in the batch."""

import collections
import functools
import math

import numpy as np
import pytest
import torch
from flows import mixture
from sampling_helpers import Counted, network, noise64, schedule, solve
from test_sampling_budgets import NATIVE, SIZE, Counter
from torch import nn

import fm_fast as fm
from fm_fast.solvers import ADAPTIVE

X0 = noise64(3, 2, 4)
TIGHT = {"rtol": 1e-8, "atol": 1e-8}
FINE = np.arange(201) / 200
STIFFNESS = torch.tensor([1.0, 20.0, 60.0, 3.0], dtype=torch.float64)


def oscillation(x, t, speed=STIFFNESS):
    """x turns by an angle that grows with t, faster for some samples than for others; the length stays."""
    speed = (speed * 2 * t)[:, None]
    return torch.stack([-speed[:, 0] * x[:, 1], speed[:, 0] * x[:, 0]], 1)


def turned(x, t):
    """The exact solution of the oscillation from time 0."""
    angle = STIFFNESS * t * t
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([cos * x[:, 0] - sin * x[:, 1], sin * x[:, 0] + cos * x[:, 1]], 1)


@functools.cache
def fine(start, end):
    """The network's solution from X0, by many small steps."""
    return solve("rk4", network, X0, np.linspace(start, end, 201))


def tolerances(method):
    return {"rtol": 1e-5, "atol": 1e-5} if method in ("adaptive_heun", "fehlberg2") else TIGHT


@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("direction", ["sample", "encode"])
def test_every_method_and_its_count(method, direction):
    model = Counted()
    found = getattr(fm, direction)(model, X0, method=method, per_sample=True, **tolerances(method))
    expected = fine(0.0, 1.0) if direction == "sample" else fine(1.0, 0.0)
    error = 1000 * tolerances(method)["rtol"]
    torch.testing.assert_close(found.x, expected, rtol=error, atol=error)
    assert found.nfe == len(model.times) == int(found.nfe_of_each.max()) and set(model.batches) == {3}


@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("direction", ["sample", "encode"])
def test_one_sample_alone_takes_the_steps_of_the_batch_control(method, direction):
    """The two controls are written apart, and agree where there is one sample."""
    runs = [Counted(), Counted()]
    options = {"method": method, **tolerances(method)}
    together, each = (getattr(fm, direction)(m, X0[:1], per_sample=p, **options) for m, p in zip(runs, (False, True), strict=True))
    np.testing.assert_allclose(runs[0].times[:8], runs[1].times[:8], rtol=1e-9, atol=1e-12)
    if ADAPTIVE[method].first_same_as_last:  # others evaluate the slope again after a step in vain
        assert abs(together.nfe - each.nfe) <= len(ADAPTIVE[method].table.b)  # the error's last digits may decide on one step
    torch.testing.assert_close(together.x, each.x, rtol=1e-9, atol=1e-9)
    assert together.nfe_of_each is None


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "adaptive_heun"])
def test_a_sample_does_not_depend_on_its_neighbours(method):
    error = 1e-4 if method != "adaptive_heun" else 1e-2
    x0, options = noise64(4, 2), {"method": method, "rtol": error, "atol": error, "per_sample": True, "save": [0.3, 0.8]}
    together = fm.sample(oscillation, x0, **options)
    for i in range(4):
        alone = fm.sample(lambda x, t, i=i: oscillation(x, t, STIFFNESS[i]), x0[i : i + 1], **options)
        torch.testing.assert_close(alone.x[0], together.x[i], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(alone.saved[:, 0], together.saved[:, i], rtol=1e-10, atol=1e-10)
        assert alone.nfe == int(together.nfe_of_each[i])


def test_easy_samples_take_few_steps_and_hard_ones_are_right():
    """Beside 99 samples that stand still, the error of the one that moves is divided by ten in the norm of the batch."""
    still = torch.zeros(99, dtype=torch.float64)
    x0, speed = noise64(100, 2), torch.cat([torch.tensor([100.0], dtype=torch.float64), still])
    angle = torch.tensor(100.0, dtype=torch.float64)
    exact = torch.stack([angle.cos() * x0[0, 0] - angle.sin() * x0[0, 1], angle.sin() * x0[0, 0] + angle.cos() * x0[0, 1]])
    errors = []
    for per_sample in (False, True):
        found = fm.sample(lambda x, t: oscillation(x, t, speed), x0, method="dopri5", per_sample=per_sample, rtol=1e-6, atol=1e-6)
        errors.append(float((found.x[0] - exact).norm()))
        assert torch.equal(found.x[1:], x0[1:])
    assert errors[1] < errors[0] / 4
    assert int(found.nfe_of_each[1:].max()) < 50 < int(found.nfe_of_each[0])


@pytest.mark.parametrize("method", ["dopri5", "tsit5", "bosh3", "dopri8", "fehlberg2"])
@pytest.mark.parametrize("direction", ["sample", "encode"])
def test_states_on_the_way(method, direction):
    times = [0.75, 0.2, 0.21, 0.2, 0.0, 1.0]
    options = {"method": method, "save": times, "per_sample": True, **tolerances(method)}
    found = getattr(fm, direction)(network, X0, **options)
    assert found.saved_t == tuple(times) and found.saved.shape == (6, *X0.shape)
    error = 1e-6 if method != "fehlberg2" else 1e-2
    for time, state in zip(times, found.saved, strict=True):
        torch.testing.assert_close(state, fine(0.0 if direction == "sample" else 1.0, time), rtol=error, atol=error)
    assert torch.equal(found.saved[-1 if direction == "sample" else 4], found.x)


@pytest.mark.parametrize("method", ["dopri5", "dopri8"])
def test_states_of_samples_that_come_by_at_different_steps(method):
    x0, times = noise64(4, 2), [0.1, 0.5, 0.55, 0.9]
    found = fm.sample(oscillation, x0, method=method, save=times, per_sample=True, rtol=1e-6, atol=1e-6)
    for time, state in zip(times, found.saved, strict=True):
        torch.testing.assert_close(state, turned(x0, time), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("objective", ["velocity", "noise", "score", "data"])
@pytest.mark.parametrize("path", ["vp", "ot", "cosine"])
def test_paths_and_objectives(path, objective):
    """Exact networks for data N(0, 0.25), at times of each sample's own and never outside of the path's range."""
    spread, seen = 0.5, []

    def exact(x, t):
        seen.append(t)
        a, s, da, ds = (torch.tensor(values)[:, None, None] for values in zip(*(schedule(path, float(u)) for u in t), strict=True))
        factors = {"velocity": a * da * spread**2 + s * ds, "noise": s, "score": torch.tensor(-1.0), "data": a * spread**2}
        return factors[objective] / (a * a * spread**2 + s * s) * x

    found = fm.sample(exact, X0, path=path, objective=objective, method="dopri5", per_sample=True, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(found.x, spread * X0, rtol=2e-3, atol=1e-4)
    times = torch.cat(seen)
    assert times.shape == (3 * found.nfe,) and bool(((times >= 0.0) & (times <= (1 - 1e-5 if path == "vp" else 1.0))).all())


@pytest.mark.parametrize("scale", [2.5, torch.tensor([0.5, 2.5, 4.0], dtype=torch.float64)], ids=["one", "each"])
@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.3, 0.6)])
def test_guidance_by_each_samples_time(interval, scale):
    cond = {"y": torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)}
    guidance = fm.Guidance(scale, {"y": 0.0}, interval)

    def model(x, t, y):
        return torch.tanh(x) * y[:, None, None] * t[:, None, None]

    options = {"cond": cond, "guidance": guidance, "method": "dopri5", "rtol": 1e-9, "atol": 1e-9}
    each, together = (fm.sample(model, X0, per_sample=p, **options).x for p in (True, False))
    torch.testing.assert_close(each, together, rtol=1e-6, atol=1e-6)
    unguided = fm.sample(model, X0, cond=cond, method="dopri5", **TIGHT).x
    assert float((each - unguided).abs().max()) > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_state_and_its_times_are_wide_whatever_the_model(dtype):
    inputs = set()

    def model(x, t):
        inputs.add((x.dtype, t.dtype, t.shape))
        return network(x.float(), t).to(dtype)

    found = fm.sample(model, X0.float(), method="dopri5", dtype=dtype, rtol=3e-3, atol=3e-3, per_sample=True)
    assert inputs == {(dtype, torch.float32, (3,))} and found.x.dtype == torch.float32
    torch.testing.assert_close(found.x.double(), fine(0.0, 1.0), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("grad", ["none", "direct", "checkpoint"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_model_may_write_into_its_times(dtype, grad):
    """Also before it is evaluated again in a backward pass."""

    def careless(x, t):
        t.mul_(0.5)
        return network(x, t)

    options = {"path": "vp", "objective": "noise", "method": "dopri5", "t0": 0.1, "t1": 0.9, "rtol": 1e-4, "atol": 1e-4}
    runs = []
    for model in (lambda x, t: network(x, 0.5 * t), careless):
        noise = X0.to(dtype).requires_grad_(grad != "none")
        found = fm.sample(model, noise, grad=grad, per_sample=True, **options)
        if grad != "none":
            found.x.square().sum().backward()
        runs.append((found.x, found.nfe, noise.grad))
    assert torch.equal(runs[0][0], runs[1][0]) and runs[0][1] == runs[1][1]
    assert grad == "none" or torch.equal(runs[0][2], runs[1][2])


@pytest.mark.parametrize("shape", [(4,), (0, 3), (2, 0), (2, 3, 4, 4)], ids=str)
def test_shapes(shape):
    found = fm.sample(network, noise64(*shape), method="bosh3", rtol=1e-6, atol=1e-6, save=[0.5], per_sample=True)
    assert found.x.shape == shape and found.saved.shape == (1, *shape) and found.nfe_of_each.shape == shape[:1]
    torch.testing.assert_close(found.x, solve("rk4", network, noise64(*shape), FINE), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "turn", [lambda x: torch.rot90(x, 1, (2, 3)), lambda x: x.transpose(2, 3), lambda x: x[:, :1].expand(-1, 3, -1, -1)]
)
def test_any_layout(turn):
    noise = turn(noise64(2, 3, 4, 5))
    before = noise.clone()
    found = fm.sample(lambda x, t: -x, noise, method="dopri5", rtol=1e-7, atol=1e-7, save=[0.5], per_sample=True)
    torch.testing.assert_close(found.x, math.exp(-1.0) * noise, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.saved[0], math.exp(-0.5) * noise, rtol=1e-5, atol=1e-5)
    assert torch.equal(noise, before)


# Samples that leave the batch


@pytest.mark.parametrize("direction", ["sample", "encode"])
@pytest.mark.parametrize("method", ["dopri5", "dopri8", "adaptive_heun"])
def test_a_batch_that_shrinks_gives_the_same(method, direction):
    error = 1e-6 if method != "adaptive_heun" else 1e-2
    cond = {"speed": STIFFNESS.clone(), "same": torch.ones(3), "more": {"list": [STIFFNESS, "text"], "pair": (1.0, STIFFNESS[:, None])}}

    def model(x, t, speed, same, more):
        assert same.shape == (3,) and more["list"][1] == "text" and more["pair"][0] == 1.0
        assert torch.equal(speed, more["list"][0]) and torch.equal(speed, more["pair"][1][:, 0])
        return oscillation(x, t, speed)

    runs, x0 = [Counted(model), Counted(model)], noise64(4, 2)
    options = {"cond": cond, "method": method, "save": [0.3, 0.8], "rtol": error, "atol": error}
    whole, shrunk = (getattr(fm, direction)(m, x0, per_sample=p, **options) for m, p in zip(runs, (True, "shrink"), strict=True))
    torch.testing.assert_close(shrunk.x, whole.x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(shrunk.saved, whole.saved, rtol=1e-9, atol=1e-9)
    assert torch.equal(shrunk.nfe_of_each, whole.nfe_of_each) and shrunk.nfe == whole.nfe
    assert set(runs[0].batches) == {4} and sorted(set(runs[1].batches)) == [1, 2, 3, 4]
    assert sum(runs[1].batches) <= int(shrunk.nfe_of_each.sum()) + 4 * len(ADAPTIVE[method].table.b)


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.3, 0.6)])
def test_a_batch_that_shrinks_with_guidance(interval):
    """Scales, null values and what belongs to samples are those of the samples that are left; what is shared stays."""
    scale = torch.tensor([0.5, 2.5, 4.0, 1.5], dtype=torch.float64)
    cond = {"y": STIFFNESS.clone(), "table": torch.arange(4.0).double()}
    guidance = fm.Guidance(scale, {"y": STIFFNESS / 2}, interval, shared=("table",))

    def model(x, t, y, table):
        return oscillation(x, t, y) + table.sum() * x

    options = {"cond": cond, "guidance": guidance, "method": "dopri5", "rtol": 1e-4, "atol": 1e-4}
    whole, shrunk = (fm.sample(model, noise64(4, 2), per_sample=p, **options) for p in (True, "shrink"))
    torch.testing.assert_close(shrunk.x, whole.x, rtol=1e-7, atol=1e-7)
    assert torch.equal(shrunk.nfe_of_each, whole.nfe_of_each)


LISTED = torch.tensor([5, 3, 8, 1])


@pytest.mark.parametrize(
    ("kind", "ids"), [("exact", None), ("rademacher", None), ("rademacher", 7), ("rademacher", LISTED), ("hadamard", LISTED)], ids=str
)
def test_log_densities_of_a_batch_that_shrinks(kind, ids):
    x1, model = noise64(4, 2), Counted(lambda x, t, speed: oscillation(x, t, speed) + torch.sin(x))
    probes = {} if kind == "exact" else {"probes": 2, "replicates": 2}
    options = {"cond": {"speed": STIFFNESS}, "method": "dopri5", "kind": kind, "seed": 3, "sample_ids": ids, "rtol": 1e-3, "atol": 1e-3}
    whole, shrunk = (fm.log_likelihood(model, x1, per_sample=p, **options, **probes) for p in (True, "shrink"))
    for name in ("logp", "std_err", "x0"):
        torch.testing.assert_close(getattr(shrunk, name), getattr(whole, name), rtol=1e-8, atol=1e-8)
    assert torch.equal(shrunk.nfe_of_each, whole.nfe_of_each) and (shrunk.nfe, shrunk.nvjp) == (whole.nfe, whole.nvjp)
    assert 1 in model.batches


def test_failures_and_gradients_of_a_batch_that_shrinks():
    options = {"method": "dopri5", "rtol": 1e-4, "atol": 1e-4, "save": [0.5]}
    found, grads = [], []
    for per_sample in (True, "shrink"):
        noise = noise64(4, 2).requires_grad_()
        speed = STIFFNESS.clone().requires_grad_()
        run = fm.sample(oscillation, noise, cond={"speed": speed}, per_sample=per_sample, grad="direct", **options)
        (run.x.sum() + run.saved.square().sum()).backward()
        grads.append((noise.grad, speed.grad))
        failing = {"good": torch.tensor([1.0, math.nan, 1.0, 1.0])}
        marked = fm.sample(
            lambda x, t, good: good[:, None] * x, noise64(4, 2), cond=failing, per_sample=per_sample, on_nonfinite="mark", **options
        )
        found.append(marked)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-6, atol=1e-6)
    assert found[0].finite.tolist() == found[1].finite.tolist() == [True, False, True, True]
    torch.testing.assert_close(found[0].x, found[1].x, rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("run", ["inference mode", pytest.param("compiled", marks=pytest.mark.slow)])
@pytest.mark.parametrize("per_sample", [True, "shrink"])
def test_in_inference_mode_and_within_a_compiled_function(per_sample, run):
    x0, cond = noise64(4, 2), {"speed": torch.tensor([1.0, 2.0, 8.0, 1.0], dtype=torch.float64)}

    def solve(x):
        return fm.sample(oscillation, x, cond=cond, method="dopri5", per_sample=per_sample, save=[0.5], rtol=1e-3, atol=1e-3).x + 1.0

    expected = solve(x0)
    with torch.inference_mode(run == "inference mode"):
        found = solve(x0.clone()) if run == "inference mode" else torch.compile(solve, backend="eager")(x0)
    assert torch.equal(found, expected)


# Solves that cannot succeed


def broken(x, t):
    """The second of three samples has no velocity after t = 0.5, the third none at all."""
    value = torch.where(t > torch.tensor([2.0, 0.5, -1.0], dtype=t.dtype), math.nan, 1.0)
    return value[:, None, None] * network(x, t)


@pytest.mark.parametrize("method", ADAPTIVE)
def test_samples_that_fail_are_marked_and_leave_the_others_alone(method):
    options = {"method": method, "per_sample": True, "on_nonfinite": "mark", "save": [0.25, 0.75], **tolerances(method)}
    found = fm.sample(broken, X0, **options)
    assert found.finite.tolist() == [True, False, False] and bool(found.x[1:].isnan().all())
    clean = fm.sample(network, X0, **options)
    torch.testing.assert_close(found.x[0], clean.x[0], rtol=0, atol=0)
    torch.testing.assert_close(found.saved[:, 0], clean.saved[:, 0], rtol=0, atol=0)
    torch.testing.assert_close(found.saved[0, 1], clean.saved[0, 1], rtol=1e-3, atol=1e-3)
    assert bool(found.saved[1, 1:].isnan().all()) and bool(found.saved[0, 2].isnan().all())
    assert int(found.nfe_of_each[0]) == int(clean.nfe_of_each[0]) and int(found.nfe_of_each.max()) == found.nfe


@pytest.mark.parametrize("method", ADAPTIVE)
def test_samples_that_fail_are_an_error_otherwise(method):
    message = rf"{method} failed for 1 of 3 samples; their velocity is not finite, or too rough for rtol=1e-05 and atol=1e-05"
    model = Counted(broken)
    with pytest.raises(RuntimeError, match=message):
        fm.sample(model, X0, method=method, per_sample=True)
    assert len(model.times) < 100  # at once, not after the others


def test_noise_that_is_not_finite():
    noise = X0.clone()
    noise[1, 0, 0] = math.nan
    times = []

    def model(x, t):
        times.append(t)
        return network(x, t)

    with pytest.raises(RuntimeError, match="dopri5 failed for 1 of 3 samples"):
        fm.sample(network, noise, method="dopri5", per_sample=True)
    found = fm.sample(model, noise, method="dopri5", per_sample=True, on_nonfinite="mark")
    assert found.finite.tolist() == [True, False, True]
    assert bool(torch.cat(times).isfinite().all())


def test_too_many_steps():
    options = {"method": "dopri5", "max_steps": 30, "per_sample": True, "rtol": 1e-6, "atol": 1e-6}
    message = r"dopri5 did not reach the end of the solve in max_steps=30 steps for 2 of 4 samples; raise max_steps, or rtol=1e-06"
    with pytest.raises(RuntimeError, match=message):
        fm.sample(oscillation, noise64(4, 2), **options)
    found = fm.sample(oscillation, noise64(4, 2), on_nonfinite="mark", **options)
    assert found.finite.tolist() == [True, False, False, True]
    torch.testing.assert_close(found.x[[0, 3]], turned(noise64(4, 2), 1.0)[[0, 3]], rtol=1e-4, atol=1e-4)


def test_what_does_not_go_together():
    with pytest.raises(ValueError, match=r"per_sample needs an adaptive method, .* got 'midpoint'"):
        fm.sample(network, X0, steps=4, per_sample=True)
    with pytest.raises(ValueError, match='per_sample must be True, False or "shrink", got 1'):
        fm.sample(network, X0, method="dopri5", per_sample=1)
    with pytest.raises(ValueError, match="callback needs steps that are the same for all samples"):
        fm.sample(network, X0, method="dopri5", per_sample=True, callback=print)


# Gradients


@pytest.mark.parametrize("grad", ["direct", "checkpoint"])
@pytest.mark.parametrize("method", ["dopri5", "adaptive_heun"])
def test_gradients(grad, method):
    model, results = nn.Linear(4, 4).double(), []
    error = 1e-7 if method == "dopri5" else 1e-5
    adaptive = {"method": method, "grad": grad, "per_sample": True, "save": [0.5], "rtol": error, "atol": error}
    for arguments in (adaptive, {"method": "rk4", "steps": 100, "grad": "direct", "save": [0.5]}):
        model.zero_grad()
        noise = X0.clone().requires_grad_()
        found = fm.sample(lambda x, t: torch.sin(model(x)) * t[:, None, None], noise, **arguments)
        (found.x.square().sum() + found.saved.sum()).backward()
        results.append((noise.grad, model.weight.grad.clone(), model.bias.grad.clone()))
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e3 * error, atol=1e3 * error)


def test_nothing_is_recorded_unasked():
    assert not fm.sample(network, X0.clone().requires_grad_(), method="dopri5", per_sample=True).x.requires_grad


# Costs


@pytest.mark.skipif(NATIVE is not None, reason=f"the C++ backend cannot run: {NATIVE}")
def test_ops_and_passes_of_a_step():
    """One more step of dopri5, which all samples accept: the passes of a whole batch's step, and two to scale the first slope anew."""
    costs = []
    for steps in (5, 6):
        with Counter() as counter:
            options = {"per_sample": True, "on_nonfinite": "mark", "max_steps": steps, "rtol": 1e-7, "atol": 1e-7}
            found = fm.sample(counter.model, torch.ones(16, 3, 8, 8), method="dopri5", backend="cpp", **options)
        costs.append((collections.Counter(counter.ops), counter.bytes, found.nfe))
    (short, short_bytes, short_nfe), (long, long_bytes, long_nfe) = costs
    assert long_nfe - short_nfe == 6, "one step"
    ops = {name.split(".")[1]: count for name, count in (long - short).items()}
    assert ops.pop("new_empty") == 3, "no kernels"
    assert ops == {"linear_step": 6, "step_error": 1, "step_control": 1, "mul": 7, "_to_copy": 1}
    assert (long_bytes - short_bytes) / (4 * SIZE) == 32 + 12 + 8 + 2


# Likelihoods


@pytest.mark.parametrize("kind", ["exact", "rademacher"])
def test_log_densities(kind):
    """Of a mixture, exactly, and with probes that a sample alone has too."""
    oracle = mixture()
    x1 = oracle.sample(5, seed=3)
    model = oracle.model("velocity")
    probes = {} if kind == "exact" else {"probes": 2, "replicates": 2}
    options = {"method": "dopri5", "kind": kind, "seed": 4, "per_sample": True, "rtol": 1e-6, "atol": 1e-6, **probes}
    told = fm.log_likelihood(model, x1, **options)
    assert told.nfe == int(told.nfe_of_each.max()) and len(set(told.nfe_of_each.tolist())) > 1
    for i in range(5):
        alone = fm.log_likelihood(model, x1[i : i + 1], sample_ids=i, **options)
        torch.testing.assert_close(alone.logp[0], told.logp[i], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(alone.std_err[0], told.std_err[i], rtol=1e-9, atol=1e-9)
        assert alone.nfe == int(told.nfe_of_each[i])
    if kind == "exact":
        torch.testing.assert_close(told.logp, oracle.log_prob(x1), rtol=1e-4, atol=1e-4)


def test_samples_with_their_log_densities():
    oracle = mixture()
    noise = noise64(6, 2)
    found = fm.sample_with_log_prob(oracle.model("velocity"), noise, method="dopri5", per_sample=True, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(found.logp, oracle.log_prob(found.x), rtol=1e-4, atol=1e-4)
    assert found.nfe == int(found.nfe_of_each.max())


def test_log_densities_that_fail_are_marked():
    options = {"method": "dopri5", "kind": "exact", "per_sample": True, "rtol": 1e-4, "atol": 1e-4}
    x1 = noise64(3, 2)

    def model(x, t):
        return torch.where(t < torch.tensor([-1.0, 0.5, -1.0], dtype=t.dtype), math.nan, 1.0)[:, None] * torch.sin(x)

    with pytest.raises(RuntimeError, match="dopri5 failed for 1 of 3 samples"):
        fm.log_likelihood(model, x1, **options)
    told = fm.log_likelihood(model, x1, on_nonfinite="mark", **options)
    assert told.logp.isfinite().tolist() == [True, False, True]
    clean = fm.log_likelihood(lambda x, t: torch.sin(x), x1, **options)
    torch.testing.assert_close(told.logp[[0, 2]], clean.logp[[0, 2]], rtol=0, atol=0)


def test_gradients_of_log_densities():
    model, results = nn.Linear(2, 2).double(), []
    adaptive = {"method": "dopri5", "per_sample": True, "rtol": 1e-7, "atol": 1e-7}
    for arguments in (adaptive, {"method": "rk4", "steps": 100}):
        model.zero_grad()
        told = fm.log_likelihood(lambda x, t: torch.sin(model(x)), noise64(3, 2), kind="exact", create_graph=True, **arguments)
        told.logp.sum().backward()
        results.append((model.weight.grad.clone(), model.bias.grad.clone()))
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
