"""Orders of convergence and exactness of the fixed-step solvers, against closed forms and a solver of the tests' own."""

from functools import cache

import flows
import numpy as np
import pytest
import torch
from flows import WIDE, log_normal, mixture, rms

import fm_fast as fm
from fm_fast import objectives, solvers, testing

ORDERS = {"euler": 1, "midpoint": 2, "heun2": 2, "ralston": 2, "ab2": 2, "ab3": 3, "rk4": 4, "rk4_38": 4}
# Highest power of t that the method integrates exactly: Ralston's weights and Simpson's rule gain one.
DEGREES = {"euler": 0, "midpoint": 1, "heun2": 1, "ralston": 2, "ab2": 1, "ab3": 2, "rk4": 3, "rk4_38": 3}
KUTTA = solvers.RungeKutta(((), (0.5,), (-1.0, 2.0)), (1 / 6, 2 / 3, 1 / 6))
FIRST_ORDER = solvers.RungeKutta(((), (0.5,)), (0.5, 0.5))
PATHS = {"ot": fm.OT(), "ot-0.1": fm.OT(sigma_min=0.1), "vp": fm.VP(), "ve": fm.VE(sigma_max=5.0), "cosine": fm.Cosine()}
OBJECTIVES = ["velocity", "noise", "score", "scoreflow", "data"]
STEPS = (64, 128)
ALL_STEPS = (32, 64, 128, 256)
pytestmark = pytest.mark.usefixtures("one_thread")


def noise(*shape, dtype=WIDE):
    return fm.noise(shape, seed=0, step=0, dtype=dtype)


@cache
def endpoints():
    """Where the flow of the mixture carries the noise, to 1e-12."""
    return flows.solve(mixture(), noise(32, 2), 0.0, 1.0, 1000)


def errors_of_x(method, counts=STEPS, grid=lambda steps: {"steps": steps}):
    return [rms(fm.sample(mixture(), noise(32, 2), method=method, **grid(n)).x - endpoints()) for n in counts]


def errors_of_log_prob(method, counts=STEPS):
    oracle = mixture()
    x1 = oracle.sample(16, seed=1)
    results = [fm.log_likelihood(oracle, x1, method=method, steps=n, kind="exact").logp for n in counts]
    return [rms(logp - oracle.log_prob(x1)) for logp in results]


def times(path, objective):
    """Ends of the range in which the velocity is finite."""
    return objectives.velocity_range(PATHS[path], objectives.as_objective(objective))


@cache
def ends(path, limits):
    """Samples of the mixture's path at both ends of a flow line."""
    x0 = mixture(PATHS[path]).sample(16, limits[0], seed=3)
    return x0, flows.solve(mixture(PATHS[path]), x0, *limits, 200)


def shows(errors, order, counts=STEPS):
    return abs(testing.observed_order(errors, counts) - order) < testing.ORDER_TOLERANCE[order]


@pytest.mark.parametrize("method", ORDERS)
def test_order_of_x(method):
    assert shows(errors_of_x(method), ORDERS[method])


@pytest.mark.parametrize("method", ORDERS)
def test_order_of_log_prob(method):
    assert shows(errors_of_log_prob(method), ORDERS[method])


@pytest.mark.slow
@pytest.mark.parametrize("method", ORDERS)
def test_orders_over_all_step_counts(method):
    for errors in (errors_of_x(method, ALL_STEPS), errors_of_log_prob(method, ALL_STEPS)):
        for pair in range(3):
            assert shows(errors[pair : pair + 2], ORDERS[method], ALL_STEPS[pair : pair + 2])


def test_a_table_of_the_user_has_the_order_it_tells():
    assert KUTTA.order() == 3 and FIRST_ORDER.order() == 1
    for table in (KUTTA, FIRST_ORDER):
        assert shows(errors_of_x(table), table.order()) and shows(errors_of_log_prob(table), table.order())


def irregular(steps):
    """Steps of alternating length on a bent grid: weights made for equal steps would fall to order 1."""
    u = (np.arange(steps + 1) + 0.3 * (np.arange(steps + 1) % 2)) / steps
    u[-1] = 1.0
    return (u + 0.1 * np.sin(2 * np.pi * u) / np.pi).tolist()


@pytest.mark.parametrize("method", ORDERS)
def test_order_on_an_irregular_grid(method):
    assert shows(errors_of_x(method, STEPS, lambda n: {"grid": irregular(n)}), ORDERS[method])


@pytest.mark.parametrize("grid", ["cosine", "shift", fm.grids.ShiftGrid(0.5)], ids=str)
@pytest.mark.parametrize("method", ["midpoint", "ab2", "rk4"])
def test_order_on_the_named_grids(method, grid):
    assert shows(errors_of_x(method, STEPS, lambda n: {"steps": n, "grid": grid}), ORDERS[method])


@pytest.mark.parametrize(("steps", "digits"), [(300, 10), pytest.param(1000, 11, marks=pytest.mark.slow)])
def test_runge_kutta_of_order_four_reaches_ten_digits_of_log_prob(steps, digits):
    oracle = mixture()
    x1 = oracle.sample(16, seed=2)
    likelihood = fm.log_likelihood(oracle, x1, method="rk4", steps=steps, kind="exact")
    assert float((likelihood.logp - oracle.log_prob(x1)).abs().max()) <= 10.0**-digits
    torch.testing.assert_close(likelihood.x0, flows.solve(oracle, x1, 1.0, 0.0, 400), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", ORDERS)
def test_linear_field_against_the_matrix_exponential(method):
    matrix = torch.tensor([[0.3, -1.2, 0.1], [0.8, -0.5, 0.4], [0.0, 0.6, 0.7]])
    oracle, x0 = testing.LinearField(matrix, torch.tensor([0.5, -1.0, 0.2])), noise(8, 3)
    exact = oracle.flow(x0, 0.0, 1.0)
    assert shows([rms(fm.sample(oracle, x0, method=method, steps=n).x - exact) for n in STEPS], ORDERS[method])
    # The divergence is constant, so its integral is exact and log p off by the prior's argument alone.
    likelihood = fm.log_likelihood(oracle, exact, method=method, steps=5, kind="exact")
    torch.testing.assert_close(likelihood.logp, log_normal(likelihood.x0) - matrix.double().trace(), rtol=1e-12, atol=1e-12)


def test_a_rotation_keeps_the_norm_and_the_volume():
    turn = testing.LinearField(torch.tensor([[0.0, -3.0], [3.0, 0.0]]), torch.zeros(2))
    x0 = noise(8, 2)
    x1 = fm.sample(turn, x0, method="rk4", steps=128).x
    torch.testing.assert_close(x1.norm(dim=1), x0.norm(dim=1), rtol=1e-6, atol=0)
    likelihood = fm.log_likelihood(turn, x1, method="rk4", steps=128, kind="exact")
    torch.testing.assert_close(likelihood.logp, log_normal(x1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("grid", ["uniform", "cosine", irregular(6)], ids=["uniform", "cosine", "irregular"])
@pytest.mark.parametrize("method", DEGREES)
def test_powers_of_time_are_integrated_exactly_up_to_the_degree(method, grid):
    x0, degree = noise(4, 3), DEGREES[method]

    def error(power):
        def model(x, t):
            return (power + 1) * t[:, None] ** power * torch.ones_like(x)

        result = fm.sample(model, x0, method=method, steps=6, grid=grid)
        back = fm.encode(model, x0 + 1.0, method=method, steps=6, grid=grid)
        return max(float((result.x - x0 - 1.0).abs().max()), float((back.x - x0).abs().max()))

    assert all(error(power) < 1e-14 for power in range(degree + 1))
    assert error(degree + 1) > 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", ORDERS)
def test_constant_field_is_exact_both_ways(method, dtype):
    x0 = noise(4, 3, 5).to(dtype)

    def model(x, t):
        return 0.0 * x + 1.5

    forward = fm.sample(model, x0, method=method, steps=7)
    back = fm.encode(model, forward.x, method=method, steps=7)
    wide = WIDE if dtype == WIDE else torch.float32
    assert forward.x.dtype == back.x.dtype == wide
    rounding = 20 * torch.finfo(wide).eps
    torch.testing.assert_close(forward.x, x0.to(wide) + 1.5, rtol=0, atol=rounding)
    torch.testing.assert_close(back.x, x0.to(wide), rtol=0, atol=rounding)
    likelihood = fm.log_likelihood(model, forward.x, method=method, steps=7, kind="exact")
    torch.testing.assert_close(likelihood.logp, log_normal(x0.double()), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("method", ORDERS)
def test_encode_returns_at_the_order(method):
    """A step of even order p and its reverse share their leading error, so the round trip may gain an order but not lose one."""
    x0, errors = noise(32, 2), []
    for steps in STEPS:
        x1 = fm.sample(mixture(), x0, method=method, steps=steps).x
        errors.append(rms(fm.encode(mixture(), x1, method=method, steps=steps).x - x0))
    order = ORDERS[method]
    assert testing.observed_order(errors, STEPS) > order - testing.ORDER_TOLERANCE[order]


@pytest.mark.parametrize("dtype", [torch.float32, WIDE], ids=str)
@pytest.mark.parametrize("method", ORDERS)
def test_samples_do_not_depend_on_their_neighbours(method, dtype):
    """Bit for bit, whatever the others are: with a model of products and sums, which do not depend on them either."""

    def model(x, t):
        return x * (1.0 - t.reshape(-1, 1, 1)) - 0.1 * x * x * x

    x0 = noise(7, 3, 5, dtype=dtype)
    together = fm.sample(model, x0, method=method, steps=6)
    alone = torch.cat([fm.sample(model, x0[i : i + 1], method=method, steps=6).x for i in range(7)])
    assert torch.equal(together.x, alone)
    spoilt = x0.clone()
    spoilt[3] = float("nan")
    marked = fm.sample(model, spoilt, method=method, steps=6, on_nonfinite="mark")
    others = [0, 1, 2, 4, 5, 6]
    assert torch.equal(marked.x[others], together.x[others])
    assert marked.finite.tolist() == [True, True, True, False, True, True, True]


def test_a_bfloat16_model_loses_nothing_to_a_thousand_steps():
    x0, oracle = noise(64, 2, dtype=torch.float32), mixture()
    exact = flows.solve(oracle, x0.double(), 0.0, 1.0, 1000)
    errors = {}
    for dtype in (torch.float32, torch.bfloat16):
        result = fm.sample(oracle, x0, method="euler", steps=1000, dtype=dtype)
        errors[dtype] = rms(result.x - exact)
        assert result.x.dtype == torch.float32
    assert errors[torch.bfloat16] <= 1.1 * errors[torch.float32]


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("path", PATHS)
def test_every_path_and_objective_samples_and_encodes_the_mixture(path, objective):
    model, limits = mixture(PATHS[path]).model(objective), times(path, objective)
    x0, x1 = ends(path, limits)
    options = {"path": PATHS[path], "objective": objective, "method": "rk4", "steps": 40}
    torch.testing.assert_close(fm.sample(model, x0, **options).x, x1, rtol=5e-5, atol=5e-5)
    torch.testing.assert_close(fm.encode(model, x1, **options).x, x0, rtol=5e-5, atol=5e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("path", PATHS)
def test_every_path_and_objective_gives_the_density_of_the_mixture(path, objective):
    oracle, (low, high) = mixture(PATHS[path]), times(path, objective)
    x1 = oracle.sample(8, high, seed=4)
    likelihood = fm.log_likelihood(
        oracle.model(objective), x1, path=PATHS[path], objective=objective, method="rk4", steps=40, kind="exact",
        prior=lambda x0: oracle.log_prob(x0, low),
    )  # fmt: skip
    torch.testing.assert_close(likelihood.logp, oracle.log_prob(x1, high), rtol=0, atol=1e-4)


@pytest.mark.parametrize("path", PATHS)
def test_the_flow_between_gaussians(path):
    oracle = testing.GaussianToGaussian(torch.tensor([0.4, -1.0]), torch.tensor([[0.5, 0.3], [0.3, 0.8]]), PATHS[path])
    low, high = times(path, "velocity")
    x0 = oracle.sample(8, low, seed=5)
    x1 = fm.sample(oracle, x0, path=PATHS[path], method="rk4", steps=200).x
    torch.testing.assert_close(x1, oracle.flow(x0, low, high), rtol=1e-6, atol=1e-6)
