"""Preconditioned networks: their formula, the variance of their target, and what they refuse."""

import pytest
import torch
from torch import nn

import fm_fast as fm
from fm_fast.nn import Preconditioned


class Constant(nn.Module):
    """A network whose output is 1 and which remembers its input."""

    def forward(self, x, t, y=None):
        self.x = x
        return torch.ones_like(x)


@pytest.mark.parametrize("path", [fm.VP(), fm.VE(0.1, 5.0), fm.Cosine()])
@pytest.mark.parametrize("objective", ["noise", "score", "scoreflow"])
def test_preconditioned_is_the_formula(path, objective):
    network, t = Constant(), torch.tensor([0.1, 0.5, 0.99])
    x = fm.noise((3, 1, 2, 2), seed=0, step=0)
    a, s = (value.reshape(3, 1, 1, 1) for value in (path.alpha(t.double()), path.sigma(t.double())))
    expected = s * x / (a**2 + s**2) + a / (a**2 + s**2).sqrt()
    if objective != "noise":
        expected = -expected / s
    output = Preconditioned(network, path, objective)(x, t, y=None)
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(network.x.double(), x / (a**2 + s**2).sqrt(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("path", [fm.VP(), fm.VE(0.1, 5.0)])
def test_preconditioned_velocity_is_that_of_its_noise(path):
    # u = a' x1 + s' x0 with the x1 that lies at (x - s x0) / a
    t, x = torch.tensor([0.1, 0.5, 0.99]), fm.noise((3, 1, 2, 2), seed=0, step=0)
    a, s, da, ds = (f(t.double()).reshape(3, 1, 1, 1) for f in (path.alpha, path.sigma, path.d_alpha, path.d_sigma))
    x0 = Preconditioned(Constant(), path, "noise")(x, t).double()
    expected = da * (x - s * x0) / a + ds * x0
    torch.testing.assert_close(Preconditioned(Constant(), path, "velocity")(x, t).double(), expected, rtol=1e-5, atol=1e-5)


def test_preconditioned_network_has_a_target_of_unit_variance_uncorrelated_with_its_input():
    # Data and noise of unit variance: what the wrapped network has left to predict is (x0 - c_skip x) / c_out.
    path, t = fm.VE(0.1, 5.0), torch.tensor(0.3, dtype=torch.float64)
    a, s = path.alpha(t), path.sigma(t)
    x1, x0 = (fm.noise((1, 100_000), seed=0, step=0, index=index, dtype=torch.float64) for index in (0, 1))
    x = a * x1 + s * x0
    target = (x0 - s / (a**2 + s**2) * x) / (a / (a**2 + s**2).sqrt())
    assert abs(float(target.var()) - 1) < 0.02 and abs(float((target * x).mean() / x.std())) < 0.02


@pytest.mark.parametrize(("name", "path"), [("vp", fm.VP()), ("ve", fm.VE())])
def test_a_path_by_its_name(name, path):
    x, t = fm.noise((3, 2), seed=0, step=0), torch.tensor([0.1, 0.5, 0.9])
    for objective in ("noise", "velocity"):
        found, expected = (Preconditioned(Constant(), given, objective)(x, t) for given in (name, path))
        assert torch.equal(found, expected)


class OfNoise(nn.Module):
    """What a perfect network of data N(0, 1/4) says of x0, as its score: infinite where sigma is 0."""

    def forward(self, x, t):
        a, s = t.reshape(-1, 1), 1 - t.reshape(-1, 1)
        return -(s * x / (a**2 / 4 + s**2)) / s


@pytest.mark.parametrize("objective", ["score", "scoreflow"])
@pytest.mark.parametrize("method", ["midpoint", "heun2", "rk4", "ab3", "dopri5"])
def test_a_score_is_not_asked_for_where_it_is_infinite(method, objective):
    """At t = 1 of a path that ends at the data the factor of the score is 0, and 0 times infinity no number."""
    x, steps = fm.noise((4, 2), seed=0, step=0, dtype=torch.float64), None if method == "dopri5" else 400
    settings = {"objective": objective, "method": method, "steps": steps, "t0": 1e-3}
    torch.testing.assert_close(fm.sample(OfNoise(), x, **settings).x, x / 2, rtol=5e-3, atol=5e-3)
    torch.testing.assert_close(fm.encode(OfNoise(), x / 2, **settings).x, x, rtol=5e-3, atol=5e-3)
    exact = torch.distributions.Normal(0.0, 0.5).log_prob(x / 2).sum(1)
    torch.testing.assert_close(fm.log_likelihood(OfNoise(), x / 2, kind="exact", **settings).logp, exact, rtol=0, atol=0.02)
    assert bool(fm.divergence(OfNoise(), x, 1.0, objective=objective).div.isfinite().all())


@pytest.mark.parametrize("objective", ["score", "scoreflow"])
def test_preconditioned_scores_sample_on_a_path_that_ends_at_the_data(objective):
    network = Preconditioned(Constant(), fm.Cosine(), objective)
    x = fm.noise((2, 1, 2, 2), seed=0, step=0)
    for method in ("heun2", "dopri5"):
        found = fm.sample(network, x, path="cosine", objective=objective, method=method, steps=20 if method == "heun2" else None, t0=0.01)
        assert bool(found.x.isfinite().all())


def test_preconditioned_is_finite_at_both_ends_and_refuses_other_objectives():
    t = torch.tensor([0.0, 1.0])
    assert torch.isfinite(Preconditioned(Constant(), fm.VP(), "score")(torch.zeros(2, 1, 2, 2), t)).all()
    with pytest.raises(ValueError, match="objective: expected one of velocity, noise, score, scoreflow, got 'data'"):
        Preconditioned(Constant(), fm.VP(), "data")
    with pytest.raises(ValueError, match=r"path: expected one whose alpha is not 0 at t = 0 with objective 'velocity', got OT"):
        Preconditioned(Constant(), fm.OT(), "velocity")
