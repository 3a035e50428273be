"""Solves that multiply the network's errors are told; what is told is what an error does, and well-posed solves are left alone."""

import warnings

import pytest
import torch

import fm_fast as fm
from fm_fast import testing

X = torch.linspace(-1.0, 1.0, 12, dtype=torch.float64).reshape(4, 3)
ILL = "does not determine the velocity well at t = "


def told(**options):
    """The message of a solve of a network that predicts half its input, or None."""
    solve = options.pop("solve", fm.sample)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        solve(lambda x, t: 0.5 * x, X, on_nonfinite="mark", **options)
    messages = [str(entry.message) for entry in caught if ILL in str(entry.message)]
    assert all(entry.filename == __file__ for entry in caught if ILL in str(entry.message)), "it points at the caller"
    return messages[0] if messages else None


@pytest.mark.parametrize("method", ["euler", "midpoint", "rk4", "ab3"])
@pytest.mark.parametrize("path", ["ot", "cosine"])
@pytest.mark.parametrize("objective", ["noise", "score", "scoreflow"])
def test_noise_predicted_where_alpha_is_zero(method, path, objective):
    message = told(method=method, steps=50, path=path, objective=objective)
    assert f"objective {objective!r} {ILL}1e-05" in message and "Solve with t0=0.01" in message
    assert told(method=method, steps=50, path=path, objective=objective, t0=0.05, t1=0.95) is None


@pytest.mark.parametrize("solve", [fm.encode, fm.log_likelihood])
@pytest.mark.parametrize("method", ["euler", "midpoint", "dopri5"])
def test_data_predicted_where_the_solve_begins_at_the_data(solve, method):
    steps = {} if method == "dopri5" else {"steps": 50}
    message = told(solve=solve, method=method, objective="data", t0=0.9, **steps)
    assert f"objective 'data' {ILL}0.99999" in message and "Solve with t1=0.999," in message
    assert told(solve=solve, method=method, objective="data", t1=0.999, **steps) is None


@pytest.mark.parametrize("path", ["ot", "vp", "ve", "cosine"])
@pytest.mark.parametrize("method", ["euler", "midpoint", "ab2"])
@pytest.mark.parametrize("objective", ["velocity", "data"])
def test_towards_the_data_errors_shrink(path, method, objective):
    assert told(method=method, steps=20, path=path, objective=objective) is None


@pytest.mark.parametrize("objective", ["velocity", "noise", "score", "scoreflow"])
@pytest.mark.parametrize("path", ["vp", "ve"])
@pytest.mark.parametrize("solve", [fm.sample, fm.encode])
def test_the_papers_diffusion_paths_are_well_posed(objective, path, solve):
    assert told(solve=solve, method="midpoint", steps=20, path=path, objective=objective) is None


def test_the_factor_is_what_an_error_of_the_output_does():
    """One Euler step from t = 1e-5, the output off by 1e-3: x moves by the factor times that."""
    field = testing.GaussianToGaussian(torch.zeros(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64))
    exact = field.model("noise")
    options = {"method": "euler", "steps": 1, "objective": "noise", "t1": 0.02}
    with pytest.warns(UserWarning, match=r"multiplies an error of the network's output by 2e\+03"):
        moved = fm.sample(lambda x, t: exact(x, t) + 1e-3, X, **options).x - fm.sample(exact, X, **options).x
    torch.testing.assert_close(moved.abs().mean(), torch.tensor(2.0, dtype=torch.float64), rtol=0.01, atol=0.0)


def test_each_stage_is_judged_by_the_length_of_its_own_step():
    """A first step as short as its time, and a long one at the end."""
    assert told(method="midpoint", objective="noise", grid=[1e-5, 2e-5, 0.5, 1.0]) is None
    assert told(method="midpoint", objective="noise", grid=[1e-5, 0.5, 0.9999, 1.0]) is not None


class Black(torch.nn.Module):
    """E[x1 | x_t] where every element is of the lowest of 256 levels, dequantised: uniform in one bin, a normal distribution cut to it."""

    def forward(self, x, t):
        t = t[:, None]
        bin_of = -1.0 + (torch.arange(400, dtype=torch.float64) + 0.5) / 400 * 2 / 256
        distance = (bin_of - (x / t)[..., None]) * (t / (1 - t))[..., None]
        return (torch.softmax(-0.5 * distance**2, -1) * bin_of).sum(-1)


@pytest.mark.parametrize(("t1", "bits"), [(0.99, 2.5), (0.999, 0.4), (0.9999, 0.03)])
@pytest.mark.filterwarnings("ignore:objective 'data' does not determine")
def test_what_an_earlier_end_costs_data_of_one_grey_level(t1, bits):
    """The figures of docs/training.md; the truth is 0."""
    settings = {"objective": "data", "method": "dopri5", "kind": "exact", "t0": 1e-3, "dtype": torch.float64, "seed": 0}
    found = fm.bits_per_dim(Black(), torch.zeros(64, 4, dtype=torch.int64), t1=t1, **settings)
    assert found.mean == pytest.approx(bits, rel=0.2)


@pytest.mark.parametrize("path", ["ot", "cosine"])
def test_noise_on_the_way_back_to_where_alpha_is_zero(path):
    """What is told is what an error of the network does, which the solve without noise, or with little of it, does not."""
    options = {"objective": "noise", "path": path, "method": "euler", "t0": 0.1, "steps": 5}
    message = told(**options, churn=1.0, seed=0)
    assert f"{ILL}1e-05" in message and "Solve with a larger t0 or less churn" in message

    def end(error, **more):
        return fm.sample(lambda x, t: 0.5 * x + error, X, **options, **more).x

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert (end(1e-3, churn=1.0, seed=0) - end(0.0, churn=1.0, seed=0)).abs().max() > 0.05
    assert (end(1e-3) - end(0.0)).abs().max() < 0.01
    assert told(**options) is None and told(**options, churn=0.1, seed=0) is None


def test_noise_that_takes_later_steps_back():
    assert f"{ILL}1e-05" in told(objective="noise", method="euler", t0=0.2, steps=8, churn=4.0, seed=0)
