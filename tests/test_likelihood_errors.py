"""The estimate of a log-density's discretisation error, and what fm.log_likelihood and fm.sample_with_log_prob refuse."""

import math
import warnings

import pytest
import torch
from likelihood_cases import points, velocity

import fm_fast as fm

pytestmark = pytest.mark.usefixtures("poisoned_outputs")


@pytest.mark.parametrize("method", ["euler", "midpoint", "rk4", "ab2", "ab3"])
def test_the_error_estimate_is_the_difference_to_half_the_steps_on_the_same_probes(method):
    """With exact divergences there is no probe noise at all: the definition, by hand."""
    x1, order = points(4, 6), {"euler": 1, "midpoint": 2, "rk4": 4, "ab2": 2, "ab3": 3}[method]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fine = fm.log_likelihood(velocity, x1, method=method, steps=8, kind="exact", error_estimate=True)
    coarse = fm.log_likelihood(velocity, x1, method=method, steps=4, kind="exact")
    torch.testing.assert_close(fine.disc_err, (fine.logp - coarse.logp).abs() / (2**order - 1), rtol=1e-10, atol=1e-13)
    plain = fm.log_likelihood(velocity, x1, method=method, steps=8, kind="exact")
    assert torch.equal(fine.logp, plain.logp)
    assert fine.nfe == plain.nfe + coarse.nfe and fine.nvjp == plain.nvjp + coarse.nvjp


@pytest.mark.parametrize("method", ["euler", "midpoint", "rk4", "ab2", "ab3"])
def test_the_error_estimate_compares_both_solves_by_the_same_probes(method):
    """A velocity that is linear and constant in time: with the same probes both solves see the same z^T A z, so their noise cancels."""
    matrix, x1 = points(6, 6) / 5, points(3, 6)
    order = fm.solvers.METHODS[method].order()

    def log_likelihood(steps, **arguments):
        return fm.log_likelihood(lambda x, t: x @ matrix, x1, method=method, steps=steps, **arguments)

    found = log_likelihood(8, kind="rademacher", seed=1, error_estimate=True)
    fine, coarse = (log_likelihood(steps, kind="exact") for steps in (8, 4))
    # What is left is the prior's difference, which is the exact divergence's too: the integral of a constant has no error.
    torch.testing.assert_close(found.disc_err, (fine.logp - coarse.logp).abs() / (2**order - 1), rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("create_graph", [False, True])
def test_the_error_estimate_leaves_the_likelihood_as_it_is_and_costs_what_it_says(create_graph):
    options = {"method": "midpoint", "steps": 8, "kind": "rademacher", "probes": 3, "seed": 1, "create_graph": create_graph}
    x1 = points(3, 6)
    plain, estimated = (fm.log_likelihood(velocity, x1, error_estimate=error, **options) for error in (False, True))
    assert torch.equal(plain.logp, estimated.logp) and torch.equal(plain.std_err, estimated.std_err)
    assert not estimated.disc_err.requires_grad
    # eight and four evaluations count: one product more each
    assert (plain.nfe, plain.nvjp) == (16, 24) and (estimated.nfe, estimated.nvjp) == (24, 24 + 8 + 4)


def test_a_large_error_warns_and_a_small_one_does_not():
    stiff = lambda x, t: -8 * x * t[:, None]  # noqa: E731
    with pytest.warns(UserWarning, match="bits a dimension; take more steps"):
        fm.log_likelihood(stiff, points(3, 6), method="euler", steps=4, kind="exact", error_estimate=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fm.log_likelihood(stiff, points(3, 6), method="rk4", steps=100, kind="exact", error_estimate=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "steps must be given for a fixed-step method"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"steps": 4, "probes": 0}, "probes must be at least 1"),
        ({"steps": 4, "replicates": 0}, "replicates must be at least 1"),
        ({"steps": 4, "kind": "exakt"}, "kind must be one of"),
        ({"steps": 4, "method": "rk5"}, "method must be one of"),
        ({"steps": 4, "method": "dopri5"}, "steps must be None for the adaptive method"),
        ({"steps": 3, "error_estimate": True}, "steps must be even for error_estimate"),
        ({"method": "dopri5", "error_estimate": True}, "error_estimate needs a fixed-step method"),
        ({"steps": 4, "t0": 0.9, "t1": 0.1}, "t0 and t1 must satisfy"),
        ({"steps": 4, "t1": 1.5}, "t0 and t1 must satisfy"),
        ({"steps": 4, "on_nonfinite": "ignore"}, "on_nonfinite must be one of"),
        ({"steps": 4, "probe": 2}, "unexpected keyword argument 'probe'"),
        ({"steps": 4, "cond": [1]}, "cond must be a mapping"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_arguments(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        fm.log_likelihood(velocity, points(2, 6), **arguments)


def test_fields_that_are_not_finite_are_told():
    for method, steps in (("midpoint", 4), ("rk4", 4), ("ab2", 4)):
        with pytest.raises(FloatingPointError, match=r"2 of 2 log-densities are not finite"):
            fm.log_likelihood(lambda x, t: x / 0.0, points(2, 6), method=method, steps=steps, kind="exact")
    with pytest.raises(RuntimeError, match="the model's velocity is not finite"):
        fm.log_likelihood(lambda x, t: x * float("nan"), points(2, 6), method="dopri5", kind="exact")
    marked = fm.log_likelihood(lambda x, t: x / 0.0, points(2, 6), steps=4, kind="exact", on_nonfinite="mark")
    assert not bool(torch.isfinite(marked.logp).any())


def test_samples_that_are_not_finite_are_told_even_if_their_density_is():
    with pytest.raises(FloatingPointError, match=r"3 of 3 samples are not finite"):
        fm.sample_with_log_prob(lambda x, t: 1e40 * x, points(3, 6), steps=10, method="euler", kind="exact")


def test_progress_of_adaptive_methods_is_refused():
    with pytest.raises(ValueError, match="progress needs a fixed-step method"):
        fm.log_likelihood(velocity, points(3, 6), method="dopri5", progress=True)


def test_the_error_that_is_told_is_a_dimensions():
    """Of log p = log N(x(0)) + 256 on the flow x' = -x by Euler: known up to the linearity of its steps."""
    x1 = points(3, 256)

    def logp(steps):
        growth = (1 + 1 / steps) ** steps  # backwards from 1 to 0
        return -0.5 * ((growth * x1) ** 2).sum(1) - 128 * math.log(2 * math.pi) + 256.0

    bits = float((logp(20) - logp(10)).abs().mean()) / math.log(2.0) / 256
    assert bits > 0.01
    with pytest.warns(UserWarning, match=rf"about {bits:.2g} bits a dimension"):
        fm.log_likelihood(lambda x, t: -x, x1, method="euler", steps=20, seed=0, error_estimate=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # 20 times less a dimension, and still more than 0.01 in all
        found = fm.log_likelihood(lambda x, t: -x / 20, x1, method="euler", steps=20, seed=0, error_estimate=True)
    assert float(found.disc_err.mean()) / math.log(2.0) > 0.01


def test_a_hundredth_of_a_bit_is_told():
    x1 = points(3, 16)
    with pytest.warns(UserWarning, match="bits a dimension; take more steps"):
        found = fm.log_likelihood(lambda x, t: -x, x1, method="euler", steps=100, kind="exact", error_estimate=True)
    assert 0.01 < float(found.disc_err.mean()) / math.log(2.0) / 16 < 0.1


@pytest.mark.parametrize("shape", [(0, 6), (2, 0)])
def test_an_error_estimate_of_nothing(shape):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = fm.log_likelihood(lambda x, t: x * t[:, None], torch.zeros(shape), steps=2, kind="exact", error_estimate=True)
    assert found.disc_err.tolist() == [0.0] * shape[0]


def test_samples_whose_solve_fails_are_marked():
    x = points(3, 6)
    x[1] = 40.0

    def model(x, t):
        return torch.where(x.abs() > 30.0, torch.nan, velocity(x, t))

    found = fm.sample_with_log_prob(model, x, method="dopri5", per_sample=True, kind="exact", on_nonfinite="mark")
    assert found.logp.isfinite().tolist() == [True, False, True]


def test_a_density_that_is_not_finite_is_told():
    with pytest.raises(FloatingPointError, match="3 of 3 log-densities are not finite"):
        fm.sample_with_log_prob(velocity, points(3, 6), steps=2, kind="exact", prior=lambda x: torch.full((3,), -math.inf))


def test_the_standard_error_is_the_same_with_a_graph():
    options = {"steps": 4, "probes": 3, "kind": "gaussian", "seed": 1}
    plain, recorded = (fm.log_likelihood(velocity, points(3, 6), create_graph=graph, **options).std_err for graph in (False, True))
    torch.testing.assert_close(recorded, plain)


def test_the_standard_error_has_no_gradient():
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    found = fm.log_likelihood(
        lambda x, t: scale * velocity(x, t), points(3, 6), steps=2, probes=2, kind="rademacher", seed=0, create_graph=True
    )
    assert found.logp.requires_grad and not found.std_err.requires_grad


def test_exact_divergences_leave_torchs_generator():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    fm.divergence(velocity, points(2, 6), 0.5, kind="exact")
    fm.log_likelihood(velocity, points(2, 6), steps=1, kind="exact")
    fm.sample_with_log_prob(velocity, points(2, 6), steps=1, kind="exact")
    assert torch.equal(torch.get_rng_state(), state)
