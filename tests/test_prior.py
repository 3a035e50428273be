"""The prior of a likelihood: functions and distributions are taken, what is neither or has a wrong shape is refused before the solve."""

import math
import warnings

import pytest
import torch
from flows import Linear, mixture
from sampling_helpers import Counted, noise64
from torch.distributions import Independent, MultivariateNormal, Normal, Uniform

import fm_fast as fm

X = noise64(4, 2)
ZERO, ONE = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)


def wide_normal(x):
    return Normal(0.0, 2.0).log_prob(x).flatten(1).sum(1)


@pytest.mark.parametrize("prior", [Independent(Normal(ZERO, 2 * ONE), 1), MultivariateNormal(ZERO, 4 * torch.eye(2, dtype=torch.float64))])
def test_a_distribution_of_whole_samples_is_a_prior(prior):
    for solve in (fm.log_likelihood, fm.sample_with_log_prob):
        found, expected = (solve(Counted(), X, steps=3, prior=p).logp for p in (prior, wide_normal))
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("draw", [fm.sample, fm.sample_with_log_prob])
def test_narrow_noise_on_a_path_that_begins_wide_is_told(draw):
    noise = fm.noise((32, 2), seed=0, step=0)
    with pytest.warns(UserWarning, match=r"noise has a standard deviation of about \S+, where VE\(.*\) begins with 50: give"):
        draw(Counted(), noise, path="ve", steps=2)


@pytest.mark.parametrize("draw", [fm.sample, fm.sample_with_log_prob])
def test_noise_that_may_be_right_is_not_warned_of(draw):
    noise = fm.noise((32, 2), seed=0, step=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw(Counted(), fm.paths.prior_scale("ve") * noise, path="ve", steps=2)
        draw(Counted(), 0.1 * noise, path="vp", steps=2)  # temperature
        draw(Counted(), noise[:1], path="ve", steps=2)  # too few numbers to tell
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        draw(Counted(), noise, path="ve", t0=0.5, steps=2)
    assert not [warning for warning in found if "standard deviation" in str(warning.message)]


@pytest.mark.parametrize("solve", [fm.log_likelihood, fm.sample_with_log_prob])
@pytest.mark.parametrize(("path", "late", "early"), [("ot", 0.1, 0.01), ("cosine", 0.1, 0.01), ("vp", 0.5, 0.1), ("ve", 0.1, 0.001)])
def test_a_solve_that_begins_where_the_density_is_another_is_told(path, late, early, solve):
    field = mixture(path)
    x = field.sample(16, 1.0 if solve is fm.log_likelihood else late, seed=0)

    def log_prob(**prior):
        return solve(field, x, path=path, method="rk4", steps=16, t0=late, **prior).logp

    right = log_prob(prior=lambda x0: field.log_prob(x0, late))
    with pytest.warns(
        UserWarning, match=rf"takes the state at t0 = {late} for the noise that \w+\(.*\) begins with, but has another density"
    ):
        wrong = log_prob()
    assert float((wrong - right).abs().max()) > 0.1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solve(Counted(), x, path=path, t0=early, steps=2)
        solve(Counted(), x, path=Linear(), t0=late, steps=2)


@pytest.mark.parametrize(("path", "share"), [(fm.VP(0.1, 10.0), "0.08"), (fm.VE(0.01, 20.0), "0.05")])
def test_a_path_whose_noise_holds_data_is_told(path, share):
    """By so much it is off: with the density that is really there it is right."""
    field = mixture(path)
    x = field.sample(16, 1.0, seed=0)
    options = {"path": path, "method": "rk4", "grid": "karras", "steps": 48, "kind": "exact"}
    with pytest.warns(UserWarning, match=rf"takes what V\w\(.*\) begins with for noise alone, but data are in it, {share}\d* of its"):
        wrong = fm.log_likelihood(field, x, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        right = fm.log_likelihood(field, x, prior=lambda x0: field.log_prob(x0, 0.0), **options)
        for usual in ("vp", "ve", "ot", "cosine"):
            fm.log_likelihood(Counted(), x, path=usual, steps=2)
    # What the path keeps of noise at its end is in both.
    assert float((right.logp - field.log_prob(x)).abs().max()) < 0.25 * float((wrong.logp - field.log_prob(x)).abs().max())


BAD_PRIORS = [
    ("normal", TypeError, r"prior must be callable as prior\(x\) with x \[B, ...\], returning log-densities \[B\], got str"),
    (2.0, TypeError, r"prior must be callable .*, got float"),
    (
        Normal(0.0, 1.0),
        ValueError,
        r"prior must return a tensor of shape \[4\], one log-density a sample, got \(4, 2\); sum over .*log_prob\(x\)\.flatten",
    ),
    (lambda x: wide_normal(x).sum(), ValueError, r"prior must return a tensor of shape \[4\], one log-density a sample, got \(\)$"),
    (lambda x: 0.0, ValueError, r"prior must return a tensor of shape \[4\], one log-density a sample, got float"),
    (lambda x: None, ValueError, r"prior must return a tensor of shape \[4\], one log-density a sample, got NoneType"),
]


@pytest.mark.parametrize(("prior", "error", "message"), BAD_PRIORS)
def test_bad_priors_cost_no_call_of_the_model(prior, error, message):
    for solve in (fm.log_likelihood, fm.sample_with_log_prob):
        model = Counted()
        with pytest.raises(error, match=message):
            solve(model, X, steps=3, prior=prior)
        assert model.times == []


def test_data_may_lie_where_the_prior_has_no_density():
    """A uniform prior refuses data outside of it; the noise lies inside."""
    prior = Independent(Uniform(-ONE, ONE, validate_args=True), 1, validate_args=True)  # torch.compile switches checks off
    with pytest.raises(ValueError, match="support"):
        prior.log_prob(X)
    found = fm.log_likelihood(lambda x, t: 5 * x, X, steps=20, prior=prior, kind="exact")
    assert bool((found.x0.abs() < 1).all())
    factor = 1 - 5 / 20 + (5 / 20) ** 2 / 2  # of a midpoint step; the divergence is 10 everywhere
    torch.testing.assert_close(found.x0, X * factor**20)
    torch.testing.assert_close(found.logp, torch.full((4,), -2 * math.log(2.0) - 10.0, dtype=torch.float64))


def test_an_error_within_a_prior_is_its_own():
    def broken(x):
        raise KeyError("missing")

    with pytest.raises(KeyError, match="missing"):
        fm.log_likelihood(Counted(), X, steps=2, prior=broken)


def test_the_density_of_large_images_is_summed_in_float64():
    x = fm.noise((4, 3, 64, 64), seed=0, step=0)
    found = fm.log_likelihood(lambda x, t: 0.0 * x, x, method="euler", steps=1, seed=0).logp
    expected = -0.5 * x.double().square().flatten(1).sum(1) - 6144 * math.log(2 * math.pi)
    torch.testing.assert_close(found, expected, rtol=0.0, atol=2e-5)


def test_a_prior_is_asked_in_the_dtype_of_the_state():
    seen = []

    def prior(x):
        seen.append(x.dtype)
        return wide_normal(x)

    fm.log_likelihood(lambda x, t: 0.0 * x, X.bfloat16(), steps=1, prior=prior)
    assert seen == [torch.float32, torch.float32]
