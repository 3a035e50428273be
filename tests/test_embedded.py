"""Embedded Runge-Kutta methods: torchdiffeq's steps and numbers, orders of the tables, and what a step may cost."""

import dataclasses
import math
from functools import cache

import numpy as np
import pytest
import torch
import torchdiffeq
from sampling_helpers import Counted, network, noise64, solve
from test_sampling_budgets import NATIVE, SIZE, WAITS, Counter

import fm_fast as fm
from fm_fast.solvers import ADAPTIVE, DOPRI5, METHODS, EmbeddedRungeKutta, RungeKutta

X0 = noise64(3, 2, 4)
GOING_ON = ["dopri5", "dopri8", "bosh3"]  # whose last stage torchdiffeq may take for the next step's first, as we do


def rough(x, t):
    """Steps must be tried again at its fast turn."""
    times = t[:, None, None] if isinstance(t, torch.Tensor) else torch.tensor(t)
    return network(x, t) + 3.0 * torch.tanh(40.0 * (times - 0.5))


def in_torchdiffeq(field, start, ends, method, tolerance):
    """(state, evaluations), with steps that end at the last time, as ours do."""
    times, low, high = torch.tensor(ends, dtype=torch.float64), min(ends), max(ends)
    count = 0

    def counted(t, state):
        nonlocal count
        count += 1
        return field(t.clamp(low, high), state)

    options = {"dtype": torch.float64, "step_t": times[1:]}
    end = torchdiffeq.odeint(counted, start, times, rtol=tolerance, atol=tolerance, method=method, options=options)
    return (tuple(part[-1] for part in end) if isinstance(end, tuple) else end[-1]), count


@pytest.mark.parametrize("method", GOING_ON)
@pytest.mark.parametrize("tolerance", [1e-3, 1e-5, 1e-7])
@pytest.mark.parametrize("field", [network, rough])
@pytest.mark.parametrize("direction", ["sample", "encode"])
def test_the_steps_of_torchdiffeq(direction, field, tolerance, method, backend):
    ends = [0.0, 1.0] if direction == "sample" else [1.0, 0.0]
    expected, count = in_torchdiffeq(lambda t, x: field(x, t.expand(3)), X0, ends, method, tolerance)
    found = getattr(fm, direction)(field, X0, method=method, rtol=tolerance, atol=tolerance, backend=backend)
    assert found.nfe == count
    torch.testing.assert_close(found.x, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("tolerance", [1e-3, 1e-6])
def test_the_steps_of_torchdiffeq_with_the_divergence_beside(tolerance):
    """The integral takes part in the control of the error: the larger of both parts counts."""
    matrix = torch.linspace(-2.0, 1.0, 16, dtype=torch.float64).reshape(4, 4)
    x1 = noise64(5, 4)

    def both(t, state):
        return torch.sin(5.0 * t) * state[0] @ matrix, (torch.sin(5.0 * t) * matrix.trace()).expand(1, 5)

    (x0, integral), count = in_torchdiffeq(both, (x1, x1.new_zeros(1, 5)), [1.0, 0.0], "dopri5", tolerance)
    model = Counted(lambda x, t: torch.sin(5.0 * t)[:, None] * x @ matrix)
    found = fm.log_likelihood(model, x1, method="dopri5", kind="exact", rtol=tolerance, atol=tolerance)
    assert found.nfe == count == len(model.times)
    torch.testing.assert_close(found.x0, x0, rtol=1e-10, atol=1e-10)
    normal = torch.distributions.Normal(0.0, 1.0).log_prob(x0).sum(1)
    torch.testing.assert_close(found.logp, normal + integral[0], rtol=1e-10, atol=1e-10)


# The tables


def curved(x, t):
    """A nonlinear field on which orders show before rounding does."""
    t = torch.as_tensor(t, dtype=x.dtype)
    return torch.stack([0.1 * x[:, 0] ** 2 - x[:, 1] * (1 + t), x[:, 0] * torch.exp(-t) - 0.2 * x[:, 0] * x[:, 1]], 1)


POINTS = torch.tensor([[1.0, 0.5], [-0.7, 2.0]], dtype=torch.float64)


@cache
def curved_end():
    return solve("rk4", curved, POINTS, np.arange(4001) / 4000)


def estimate(method, t, y, h):
    """h sum_i error_i k_i, by the definition."""
    slopes = []
    for row, c in zip(method.table.a, method.table.c, strict=True):
        slopes.append(curved(y + h * sum((a * k for a, k in zip(row, slopes, strict=True)), torch.zeros_like(y)), t + c * h))
    return h * sum(weight * k for weight, k in zip(method.error, slopes, strict=True))


# (steps from which errors fall as the order says, that order, the order of the error of one step)
ORDERS = {
    "dopri5": (32, 5, 5),
    "tsit5": (8, 5, 5),
    "dopri8": (2, 8, 8),
    "bosh3": (64, 3, 3),
    "fehlberg2": (128, 2, 2),
    "adaptive_heun": (128, 2, 2),
}


@pytest.mark.parametrize("name", ADAPTIVE)
def test_orders_of_the_solution_and_of_the_error(name):
    (steps, order, error_order), method = ORDERS[name], ADAPTIVE[name]
    errors = [float((fm.sample(curved, POINTS, method=method.table, steps=n).x - curved_end()).norm()) for n in (steps, 2 * steps)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.3)
    estimates = [float(estimate(method, 0.2, POINTS, h).norm()) for h in (0.2, 0.1)]
    assert math.log2(estimates[0] / estimates[1]) == pytest.approx(error_order, abs=0.3)
    assert method.order == order


@pytest.mark.parametrize("name", ADAPTIVE)
def test_a_first_stage_is_a_slope_at_the_state(name):
    """Also where the method has none at the step's end: torchdiffeq goes on with the slope at another point there."""
    model = Counted(network)
    states = []
    found = fm.sample(model, X0, method=name, rtol=1e-4, atol=1e-4, callback=lambda step, t, x: states.append((t, x)))
    stages = ADAPTIVE[name].table.stages
    asked = [float(time) for time in model.times]
    assert all(t in asked for t, _ in states[:-1]) and states[-1][0] == 1.0
    assert found.nfe >= 1 + len(states) * (stages - 1)
    error = 0.1 if name == "fehlberg2" else 1e-3  # its estimate is a two hundredth of Euler's
    torch.testing.assert_close(found.x, solve("rk4", network, X0, np.arange(201) / 200), rtol=error, atol=error)


def test_a_method_of_ones_own(backend):
    """Heun's third-order method, its error against Euler's."""
    third = RungeKutta(((), (1 / 3,), (0.0, 2 / 3)), (1 / 4, 0.0, 3 / 4))
    own = EmbeddedRungeKutta(third, (1 / 4 - 1.0, 0.0, 3 / 4), 3, "heun3(1)")
    found = fm.sample(network, X0, method=own, rtol=1e-6, atol=1e-6, backend=backend)
    torch.testing.assert_close(found.x, solve("rk4", network, X0, np.arange(201) / 200), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"steps must be None for the adaptive method 'heun3\(1\)'"):
        fm.sample(network, X0, method=own, steps=3)
    with pytest.raises(RuntimeError, match=r"heun3\(1\) failed"):
        fm.sample(lambda x, t: x * math.nan, X0, method=own)


def test_a_stage_that_repeats_the_first(backend):
    """Its row of the tableau is zero: Heun's method with its first evaluation twice."""
    twice = RungeKutta(((), (0.0,), (1.0, 0.0)), (0.25, 0.25, 0.5))
    found = fm.sample(network, X0, method=EmbeddedRungeKutta(twice, (-0.5, 0.0, 0.5), 2), rtol=1e-5, atol=1e-5, backend=backend)
    expected = fm.sample(network, X0, method="adaptive_heun", rtol=1e-5, atol=1e-5, backend=backend)
    torch.testing.assert_close(found.x, expected.x, rtol=1e-12, atol=1e-12)


WRONG = [
    ((METHODS["ab2"], (1.0, -1.0), 2), TypeError, "table must be a RungeKutta table, got AdamsBashforth"),
    ((METHODS["heun2"], (0.5, -0.5, 0.0), 2), ValueError, r"error must have one weight a stage, 2, not all 0, got \(0.5, -0.5, 0.0\)"),
    ((METHODS["heun2"], (0.0, 0.0), 2), ValueError, "error must have one weight a stage, 2, not all 0"),
    ((METHODS["heun2"], (0.5, 0.5), 2), ValueError, "error must sum to 0, got 1.0"),
    ((METHODS["heun2"], (0.5, math.nan), 2), ValueError, "error must sum to 0, got nan"),
    ((METHODS["heun2"], 5, 2), TypeError, "error must be a sequence of numbers"),
    ((METHODS["heun2"], (0.5, -0.5), 3), ValueError, "order must be that of the table, 2, got 3"),
    ((METHODS["rk4"], (0.5, -0.5, 0.0, 0.0), 3), ValueError, "order must be that of the table, 4, got 3"),
    ((METHODS["heun2"], (0.5, -0.5), 2.0), TypeError, "order must be a whole number"),
]


@pytest.mark.parametrize(("arguments", "kind", "message"), WRONG)
def test_wrong_tables(arguments, kind, message):
    with pytest.raises(kind, match=message):
        EmbeddedRungeKutta(*arguments)


# Steps


def test_the_callback_sees_copies_of_accepted_states():
    seen = []

    def callback(step, t, x):
        seen.append((step, t, x.clone()))
        x.zero_()

    found = fm.encode(rough, X0, method="bosh3", callback=callback)
    assert [step for step, _, _ in seen] == list(range(1, len(seen) + 1))
    times = [t for _, t, _ in seen]
    assert times == sorted(times, reverse=True) and times[-1] == 0.0 and torch.equal(seen[-1][2], found.x)
    assert found.nfe > 2 + 3 * len(seen), "some steps were tried in vain"
    between = seen[len(seen) // 2]
    expected = solve("rk4", rough, X0, np.linspace(1.0, between[1], 501))
    torch.testing.assert_close(between[2], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("grad", ["none", "direct"])
def test_a_model_may_return_the_same_memory_again(grad, backend):
    memory = torch.empty_like(X0)

    def model(x, t):
        with torch.no_grad():
            return memory.copy_(network(x, t))

    found = fm.sample(model, X0, method="dopri5", rtol=1e-7, atol=1e-7, backend=backend, grad=grad)
    expected = fm.sample(network, X0, method="dopri5", rtol=1e-7, atol=1e-7, backend=backend)
    torch.testing.assert_close(found.x, expected.x, rtol=1e-12, atol=1e-12)
    assert found.nfe == expected.nfe


def test_a_model_may_return_its_input(backend):
    found = fm.sample(lambda x, t: x, X0, method="dopri5", rtol=1e-9, atol=1e-9, backend=backend)
    torch.testing.assert_close(found.x, math.e * X0, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("method", ["dopri5", "dopri8"])
def test_a_model_may_return_a_view_of_its_input(method, backend):
    """dX / dt = X^T: what is symmetric grows, the rest decays. The view must be read before its memory is written."""
    noise = noise64(1, 96, 96)
    found = fm.sample(lambda x, t: x.mT, noise, method=method, rtol=1e-7, atol=1e-7, backend=backend)
    expected = (math.e * (noise + noise.mT) + (noise - noise.mT) / math.e) / 2
    torch.testing.assert_close(found.x, expected, rtol=1e-5, atol=1e-6)


def test_a_model_that_writes_into_its_input_is_told(backend):
    noise = X0.clone()
    with pytest.raises(RuntimeError, match="model must leave its input x as it is"):
        fm.sample(lambda x, t: x.mul_(2.0), noise, method="dopri5", backend=backend)
    assert torch.equal(noise, X0)


@pytest.mark.parametrize("grad", ["none", "direct"])
def test_memory_formats_and_mixed_dtypes(grad, backend):
    """The velocities of a bfloat16 model are added to a float32 state."""
    noise = noise64(2, 3, 4, 4).float().to(memory_format=torch.channels_last)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Conv2d(3, 3, 3, padding=1).bfloat16().requires_grad_(False)

    def field(x, t):
        return model(x.bfloat16())

    found = fm.sample(field, noise, method="bosh3", rtol=1e-2, atol=1e-2, dtype=torch.bfloat16, grad=grad, backend=backend)
    assert found.x.dtype == torch.float32 and found.x.is_contiguous(memory_format=torch.channels_last)
    wide = fm.sample(lambda x, t: model.float()(x), noise, method="rk4", steps=50)
    torch.testing.assert_close(found.x, wide.x, rtol=0.05, atol=0.05)


# Costs


@pytest.mark.skipif(NATIVE is not None, reason=f"the C++ backend cannot run: {NATIVE}")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bfloat16 model"])
def test_ops_passes_and_waits_of_a_step(dtype):
    """One more step of dopri5, by saving one state more: 32 passes of its combinations, 8 for the error, and to keep slopes one each
    where the combination that follows reads it in the state's dtype, else two."""
    noise, costs, splitting = torch.ones(16, 3, 8, 8), [], dataclasses.replace(DOPRI5, dense=())
    for saved in ([0.25, 0.5], [0.25, 0.5, 0.75]):
        with Counter() as counter:
            found = fm.sample(counter.model, noise, method=splitting, rtol=1e3, atol=1e3, save=saved, backend="cpp", dtype=dtype)
        costs.append((counter, found.nfe))
    (short, short_nfe), (long, long_nfe) = costs
    assert long_nfe - short_nfe == 6, "one step"
    ops = [[counter.ops.count(f"fm_fast.{name}.default") for name in ("linear_step", "step_error")] for counter in (short, long)]
    waits = [sum(op.startswith(WAITS) for op in counter.ops) for counter in (short, long)]
    assert [more - less for less, more in zip(*ops, strict=True)] == [6, 1]
    copies = [sum(op.startswith("aten.copy_") for op in counter.ops) for counter in (short, long)]
    assert waits[1] - waits[0] == 1 and waits[0] == 3 + 3 + 1, "a look a step, three before, one behind"
    fills = [sum(op.startswith("aten.full") for op in counter.ops) for counter in (short, long)]
    assert fills[0] == fills[1] == 2, "the times of a step come with its coefficients"
    kept_alone = 1 if dtype is None else 6
    assert copies[1] - copies[0] == 1 + kept_alone, "the coefficients, and slopes by themselves"
    saving, counted_twice = 2 + 2, kept_alone  # a copy, and its part of the stack; copy_ counts what it overwrites
    inputs = 0 if dtype is None else 6 * (1 + 1 / 2) - 6 / 2  # made for the model, whose outputs are half as large
    assert (long.bytes - short.bytes) / (4 * SIZE) - saving - counted_twice == 32 + 6 + kept_alone + 8 + inputs
