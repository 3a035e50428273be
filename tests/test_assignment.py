"""Op assignment: the least sum of costs against every permutation and SciPy's solver, with ties, bad guesses and bad input."""

import itertools

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from fm_fast import _backends, _ops

needs_cpp = pytest.mark.skipif(_backends.why_not("assignment", "cpu", "cpp") is not None, reason="the C++ library is not built")


@pytest.fixture(autouse=True, params=["cpp", "reference"])
def on_each_backend(request, monkeypatch):
    if reason := _backends.why_not("assignment", "cpu", request.param):
        pytest.skip(reason)
    monkeypatch.setattr(_backends, "ENVIRONMENT_BACKEND", request.param)


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def total(costs, columns):
    """In float64, once every column is there once."""
    assert columns.dtype == torch.int64 and sorted(columns.tolist()) == list(range(len(costs)))
    return float(costs.double()[torch.arange(len(costs)), columns].sum())


def least(costs):
    """By SciPy, in float64."""
    return total(costs, torch.from_numpy(linear_sum_assignment(costs.double().numpy())[1]))


def assert_optimal(costs, guess=None):
    guess = torch.zeros(len(costs), dtype=torch.float64) if guess is None else guess
    found = total(costs, _ops.assignment(costs, guess))
    assert found == pytest.approx(least(costs), rel=1e-12, abs=1e-12 * float(costs.abs().max()) * len(costs))


@pytest.mark.parametrize("n", range(1, 7))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_no_permutation_is_better(n, dtype):
    for seed in range(20):
        costs = random(n, n, seed=seed, dtype=dtype)
        found = total(costs, _ops.assignment(costs, random(n, seed=seed)))
        orders = (sum(costs.double()[i, j] for i, j in enumerate(order)) for order in itertools.permutations(range(n)))
        assert found == pytest.approx(float(min(orders)), rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("n", [7, 8, 9, 15, 16, 17, 31, 64, 100, 129, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sizes(n, dtype):
    assert_optimal(random(n, n, dtype=dtype))


@pytest.mark.parametrize("size", [1, 2, 3, 50])
@pytest.mark.parametrize("multiple", [-1.0, 0.0, 0.5, 1.0, 1e6])
def test_products_of_points_whatever_is_guessed(size, multiple):
    """Products of low rank, which need the longest paths."""
    x1, x0 = random(150, size), random(150, size, seed=1)
    assert_optimal(-x1 @ x0.T, -0.5 * multiple * x0.square().sum(1))
    assert_optimal((-x1 @ x0.T).float(), multiple * random(150, seed=2))


@pytest.mark.parametrize("values", [1, 2, 5])
def test_many_equal_costs(values):
    generator = torch.Generator().manual_seed(0)
    for n in (2, 5, 40, 101):
        assert_optimal(torch.randint(values, (n, n), generator=generator).double())


def test_equal_rows_and_columns():
    assert_optimal(random(1, 60).expand(60, 60).contiguous())
    assert_optimal(random(60, 1).expand(60, 60).contiguous())
    assert_optimal(random(20, 20).repeat(3, 3))


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e30, 1e290])
def test_tiny_and_huge_costs(scale):
    assert_optimal(scale * random(50, 50))


def test_costs_of_very_different_sizes():
    assert_optimal(random(80, 80) * torch.logspace(-12, 12, 80, dtype=torch.float64))
    assert_optimal(random(80, 80) + torch.logspace(0, 9, 80, dtype=torch.float64)[:, None])


def test_nothing_to_pair():
    assert _ops.assignment(torch.empty(0, 0), torch.empty(0, dtype=torch.float64)).shape == (0,)


def test_the_same_every_time():
    costs, guess = random(120, 120), random(120, seed=3)
    assert torch.equal(_ops.assignment(costs, guess), _ops.assignment(costs, guess))


@pytest.mark.parametrize("chosen", [None, "cuda", "triton"])
def test_a_choice_of_a_devices_backend_says_nothing_about_the_host(chosen, monkeypatch):
    monkeypatch.setattr(_backends, "ENVIRONMENT_BACKEND", chosen)
    assert_optimal(random(40, 40))


def test_a_chosen_backend_that_cannot_run_is_an_error(monkeypatch):
    monkeypatch.setitem(_backends._REASONS, ("assignment", "cpu", "cpp"), "not built: a test")
    monkeypatch.setattr(_backends, "ENVIRONMENT_BACKEND", "cpp")
    with pytest.raises(RuntimeError, match="can't run assignment on cpu: not built: a test"):
        _ops.assignment(random(3, 3), random(3))


WRONG = {
    "argument costs: expected a row and a column": {"costs": torch.zeros(3, 2)},
    "argument costs: expected float32 or float64": {"costs": torch.zeros(3, 3, dtype=torch.float16)},
    "argument costs: expected a contiguous": {"costs": torch.zeros(3, 6)[:, ::2]},
    "argument costs: expected finite numbers below 1e300": {"costs": torch.full((3, 3), torch.nan)},
    "argument guess: expected finite": {"guess": torch.tensor([0.0, torch.inf, 0.0], dtype=torch.float64)},
    "argument guess: expected float64": {"guess": torch.zeros(3)},
    "argument guess: expected a contiguous tensor of 3": {"guess": torch.zeros(2, dtype=torch.float64)},
    "argument columns: expected a contiguous int64": {"columns": torch.zeros(3)},
}


@needs_cpp
@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments(message):
    arguments = {"columns": torch.zeros(3, dtype=torch.int64), "costs": torch.zeros(3, 3), "guess": torch.zeros(3, dtype=torch.float64)}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fm_fast.assignment(**arguments | WRONG[message])
