"""Fixed-step solvers against the same methods written out by hand in float64, and the tables' own claims."""

from fractions import Fraction

import numpy as np
import pytest
import torch
import torchdiffeq
from sampling_helpers import FIXED, Counted, kutta3, lagrange_integral, network, noise64, schedule, solve, velocity_of

import fm_fast as fm
from fm_fast.objectives import Objective, Target
from fm_fast.solvers import ADAPTIVE, METHODS, AdamsBashforth, RungeKutta

UNEVEN = (0.0, 0.05, 0.2, 0.25, 0.45, 0.7, 0.75, 1.0)
X0 = noise64(3, 2, 4)


@pytest.mark.parametrize("method", FIXED)
@pytest.mark.parametrize("reverse", [False, True], ids=["sample", "encode"])
def test_each_method_on_an_uneven_grid(method, reverse, backend):
    solver, nodes = (fm.encode, UNEVEN[::-1]) if reverse else (fm.sample, UNEVEN)
    found = solver(network, X0, method=method, grid=UNEVEN, backend=backend)
    torch.testing.assert_close(found.x, solve(method, network, X0, nodes), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("method", ["euler", "midpoint", "rk4_38", "ab3"])
@pytest.mark.parametrize("objective", ["velocity", "noise", "score", "scoreflow", "data"])
@pytest.mark.parametrize("path", ["ot", "vp", "ve", "cosine"])
def test_every_objective_on_every_path(path, objective, method, backend):
    nodes = np.linspace(0.2, 0.8, 7)
    found = fm.sample(network, X0, path=path, objective=objective, method=method, steps=6, t0=0.2, t1=0.8, backend=backend)
    expected = solve(method, lambda x, t: velocity_of(path, objective, network(x, t), x, t), X0, nodes)
    torch.testing.assert_close(found.x, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("objective", ["velocity", "noise", "score", "data"])
@pytest.mark.parametrize("path", ["ot", "vp", "ve", "cosine"])
@pytest.mark.filterwarnings("ignore:objective .* does not determine the velocity well")
def test_the_whole_range_for_exact_networks(path, objective, backend):
    """Data N(0, 0.25): the flow multiplies noise by 0.5 / prior_scale; no end of the range is infinite."""
    spread = 0.5

    def exact(x, t):
        outputs = []
        for value in t.tolist():
            a, s, da, ds = schedule(path, value)
            variance = a * a * spread**2 + s * s
            factors = {"velocity": (a * da * spread**2 + s * ds), "noise": s, "score": -1.0, "data": a * spread**2}
            outputs.append(factors[objective] / variance)
        return torch.tensor(outputs, dtype=x.dtype)[:, None, None] * x

    steps, scale = (300, 50.0) if path == "ve" else (200, 1.0)
    found = fm.sample(exact, X0 * scale, path=path, objective=objective, method="rk4", steps=steps, backend=backend)
    expected = X0 * (spread if path != "ve" else scale * (spread**2 + 1e-4) ** 0.5 / (spread**2 + scale**2) ** 0.5)
    torch.testing.assert_close(found.x, expected, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize(("ours", "theirs"), [("euler", "euler"), ("midpoint", "midpoint"), ("heun2", "heun2"), ("rk4_38", "rk4")])
def test_the_numbers_of_torchdiffeq(ours, theirs):
    times = torch.tensor(UNEVEN, dtype=torch.float64)
    expected = torchdiffeq.odeint(lambda t, x: network(x, t), X0, times, method=theirs)
    found = fm.sample(network, X0, method=ours, grid=UNEVEN, save="steps")
    torch.testing.assert_close(found.saved, expected, rtol=1e-12, atol=1e-13)


TIMES = {
    "euler": [0.0, 0.4, 0.8],
    "midpoint": [0.0, 0.2, 0.4, 0.6, 0.8, 0.9],
    "heun2": [0.0, 0.4, 0.4, 0.8, 0.8, 1.0],
    "ralston": [0.0, 0.8 / 3, 0.4, 2.0 / 3, 0.8, 0.8 + 0.4 / 3],
    "rk4": [0.0, 0.2, 0.2, 0.4, 0.4, 0.6, 0.6, 0.8, 0.8, 0.9, 0.9, 1.0],
    "rk4_38": [0.0, 0.4 / 3, 0.8 / 3, 0.4, 0.4, 1.6 / 3, 2.0 / 3, 0.8, 0.8, 2.6 / 3, 2.8 / 3, 1.0],
    "ab2": [0.0, 0.2, 0.4, 0.8],
    "ab3": [0.0, 0.2, 0.4, 0.4, 0.6, 0.8, 0.8],
}


@pytest.mark.parametrize("method", FIXED)
def test_evaluations_are_counted_and_at_the_methods_times(method, backend):
    model = Counted()
    found = fm.sample(model, X0, method=method, grid=[0.0, 0.4, 0.8, 1.0], backend=backend)
    assert model.times == pytest.approx(TIMES[method], abs=1e-12)
    assert found.nfe == len(TIMES[method])


@pytest.mark.parametrize("method", FIXED)
def test_fewer_steps_than_a_method_remembers(method, backend):
    for steps in (1, 2, 3):
        found = fm.sample(network, X0, method=method, steps=steps, backend=backend)
        torch.testing.assert_close(found.x, solve(method, network, X0, np.arange(steps + 1) / steps), rtol=1e-12, atol=1e-13)


def test_a_table_of_ones_own(backend):
    found = fm.sample(network, X0, method=RungeKutta(((), (0.5,), (-1.0, 2.0)), (1 / 6, 2 / 3, 1 / 6)), steps=4, backend=backend)
    x = X0
    for n in range(4):
        x = kutta3(network, x, n / 4, 1 / 4)
    torch.testing.assert_close(found.x, x, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("objective", ["velocity", "noise"])
def test_a_stage_that_repeats_the_first(objective, backend):
    """Its row of the tableau is zero: Euler's method with its one evaluation twice."""
    twice = RungeKutta(((), (0.0,)), (0.5, 0.5))
    options = {"steps": 8, "objective": objective, "path": "vp", "backend": backend}
    for function in (fm.sample, fm.encode):
        found, euler = (function(network, X0, method=method, **options).x for method in (twice, "euler"))
        torch.testing.assert_close(found, euler, rtol=1e-13, atol=1e-13)


def test_a_table_with_many_stages(backend):
    """A Runge-Kutta step whose six stages are six Euler steps."""
    sixths = tuple((1 / 6,) * i for i in range(6))
    found = fm.sample(network, X0, method=RungeKutta(sixths, (1 / 6,) * 6), steps=2, backend=backend)
    torch.testing.assert_close(found.x, solve("euler", network, X0, np.arange(13) / 12), rtol=1e-12, atol=1e-13)


def test_orders_from_the_order_conditions():
    orders = {name: table.order() for name, table in METHODS.items()}
    assert orders == {"euler": 1, "midpoint": 2, "heun2": 2, "ralston": 2, "rk4": 4, "rk4_38": 4, "ab2": 2, "ab3": 3}
    assert RungeKutta(((), (0.4,)), (0.0, 1.0)).order() == 1, "a midpoint that is not in the middle"
    assert RungeKutta(((), (0.5,), (-1.0, 2.0)), (1 / 6, 2 / 3, 1 / 6)).order() == 3


@pytest.mark.parametrize(
    "table", [table for table in (*METHODS.values(), *(method.table for method in ADAPTIVE.values())) if isinstance(table, RungeKutta)]
)
def test_stage_times_are_sums_of_the_weights(table):
    """To the last bit, in any version of Python; and the step's end itself where only rounding keeps them from it."""
    exact = [sum(map(Fraction, row), Fraction(0)) for row in table.a]
    assert table.c == tuple(1.0 if abs(node - 1) < 1e-14 else float(node) for node in exact)


@pytest.mark.parametrize("history", [2, 3, 4])
def test_multistep_weights_are_integrals_of_lagrange_polynomials(history):
    table = AdamsBashforth(history, METHODS["rk4"])
    times, end = np.array([[0.7, 0.45, 0.4, 0.1][:history]]), np.array([0.8])
    np.testing.assert_allclose(table.weights(times, end)[0], lagrange_integral(times[0], times[0, 0], end[0]), rtol=1e-12)


@pytest.mark.parametrize("history", [5, 6, 8])
def test_more_history_than_the_first_steps_are_good_for(history):
    """dx/dt = -4 (1 + t) x, whose likelihood ends at x e^6: the errors of the first steps, by RK4, are of order 5."""
    table, x, end = AdamsBashforth(history, METHODS["rk4"]), torch.ones(1, 1, dtype=torch.float64), np.exp(6.0)
    exact, options = -0.5 * end * end - 0.5 * np.log(2 * np.pi) + 6.0, {"kind": "exact", "error_estimate": True}
    found = [fm.log_likelihood(lambda x, t: -4 * (1 + t[:, None]) * x, x, method=table, steps=n, **options) for n in (320, 640)]
    errors = [abs(float(solve.logp) - exact) for solve in found]
    assert np.log2(errors[0] / errors[1]) == pytest.approx(5.0, abs=0.15) and table.order() == 5
    assert float(found[1].disc_err) == pytest.approx(errors[1], rel=0.1)


def test_textbook_weights_on_even_steps():
    even = np.array([[0.4, 0.3, 0.2]])
    np.testing.assert_allclose(METHODS["ab3"].weights(even, np.array([0.5]))[0] / 0.1, [23 / 12, -16 / 12, 5 / 12], rtol=1e-12)
    np.testing.assert_allclose(METHODS["ab2"].weights(even[:, :2], np.array([0.5]))[0] / 0.1, [3 / 2, -1 / 2], rtol=1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RungeKutta(((), (0.5,)), (0.5, 0.6)), r"b must sum to 1, got 1.1"),
        (lambda: RungeKutta(((), (0.5,)), (0.5, float("nan"))), r"b must sum to 1, got nan"),
        (lambda: RungeKutta(((), (0.5, 0.5)), (0.5, 0.5)), r"a must have one row a weight of b, .* got rows of \[0, 2\] for 2 weights"),
        (lambda: RungeKutta((), ()), r"a must have one row a weight of b"),
        (lambda: RungeKutta(((), (float("inf"),)), (0.0, 1.0)), r"a must be finite"),
        (lambda: RungeKutta(((), (1.0,), (float("inf"), -float("inf"))), (0.5, 0.5, 0.0)), r"a must be finite"),
        (lambda: RungeKutta(((), (1e308,), (1e308, 1e308)), (0.5, 0.5, 0.0)), r"a must be finite"),
        (lambda: RungeKutta(((), (float("nan"),)), (0.5, 0.5)), r"a must be finite"),
        (lambda: AdamsBashforth(1, METHODS["rk4"]), r"history must be at least 2, got 1"),
        (lambda: AdamsBashforth(3, METHODS["euler"]), r"start must be at least of order 2, got order 1"),
    ],
)
def test_bad_tables(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdamsBashforth(2.0, METHODS["midpoint"]), r"history must be a whole number, got float"),
        (lambda: AdamsBashforth(True, METHODS["midpoint"]), r"history must be a whole number, got bool"),
        (lambda: AdamsBashforth(3, "rk4"), r"start must be a RungeKutta table, got str"),
        (lambda: AdamsBashforth(3, METHODS["ab2"]), r"start must be a RungeKutta table, got AdamsBashforth"),
        (lambda: RungeKutta("rk4", (1.0,)), r"a must be a sequence of rows of numbers, got 'rk4'"),
        (lambda: RungeKutta((0.0, 0.5), (0.0, 1.0)), r"a must be a sequence of rows of numbers, got \(0.0, 0.5\)"),
        (lambda: RungeKutta(((),), 1.0), r"b must be a sequence of numbers, got 1.0"),
        (lambda: RungeKutta(((),), ("one",)), r"b must be a sequence of numbers, got \('one',\)"),
    ],
)
def test_tables_of_the_wrong_type(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def test_tables_are_values():
    assert RungeKutta(((),), (1,)) == METHODS["euler"] and hash(RungeKutta(((),), (1,))) == hash(METHODS["euler"])
    with pytest.raises(AttributeError):
        METHODS["euler"].b = (2.0,)


@pytest.mark.parametrize("method", ["ab2", "ab3"])
def test_multistep_methods_with_a_constant_factor_of_x(method, backend):
    residual = Objective("residual", lambda p: Target(p.da, p.ds, 1.0, 1.0), lambda p: (-2.0, 1.0))
    nodes = [0.0, 0.1, 0.3, 0.45, 0.7, 0.8, 1.0]
    found = fm.sample(network, X0, method=method, grid=nodes, objective=residual, backend=backend).x
    torch.testing.assert_close(found, solve(method, lambda x, t: network(x, t) - 2.0 * x, X0, nodes))
