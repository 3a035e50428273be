"""``fm_fast.testing.check_path`` finds the usual mistakes in a path, and a path need not know of any shape of times but [N]."""

import math

import pytest
import torch
from sampling_helpers import noise64

import fm_fast as fm

X0 = noise64(3, 2)


class Quadratic:
    """alpha = t^2, sigma = 1 - t, for times in one row alone."""

    def alpha(self, t):
        return t[:, None].square().squeeze(1)

    def sigma(self, t):
        return 1.0 - t[:, None].squeeze(1)

    def d_alpha(self, t):
        return 2.0 * t

    def d_sigma(self, t):
        return -1.0


class SlightlyWrong(fm.OT):
    def d_alpha(self, t):
        return torch.full_like(t, 1.01)


class Learned(torch.nn.Module):
    """Whose derivative is autograd's."""

    d_sigma = Quadratic.d_sigma
    sigma = Quadratic.sigma

    def __init__(self):
        super().__init__()
        self.bend = torch.nn.Parameter(torch.tensor(0.2, dtype=torch.float64))

    def alpha(self, t):
        return t * (1.0 + self.bend * torch.tanh(t) * (1.0 - t))

    def d_alpha(self, t):
        with torch.enable_grad():
            t = t.detach().requires_grad_()
            return torch.autograd.grad(self.alpha(t).sum(), t, create_graph=True)[0]


class Forgotten(Quadratic):
    def d_alpha(self, t):
        return t


class WrongSigma(Quadratic):
    def d_sigma(self, t):
        return torch.ones_like(t)


class Reversed(Quadratic):
    def alpha(self, t):
        return 1.0 - t

    def d_alpha(self, t):
        return -1.0

    def sigma(self, t):
        return 0.5 + 0.5 * t

    def d_sigma(self, t):
        return 0.5


class Negative(Quadratic):
    def sigma(self, t):
        return 0.5 - t

    d_sigma = Quadratic.d_sigma


class NotFinite(Quadratic):
    def d_alpha(self, t):
        return math.nan * t


@pytest.mark.parametrize(
    "path",
    ["ot", "vp", "ve", "cosine", fm.paths.OT(sigma_min=0.1), Quadratic(), Learned()],
    ids=lambda path: path if isinstance(path, str) else type(path).__name__,
)
def test_paths_that_are_right(path):
    fm.testing.check_path(path)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (Forgotten(), r"d_alpha of a path must be the derivative of alpha, got 0\.99 at t = 0\.99, where it is 1\.98"),
        (WrongSigma(), r"d_sigma of a path must be the derivative of sigma, got 1 at t = .*, where it is -1"),
        (SlightlyWrong(), r"d_alpha of a path must be the derivative of alpha, got 1\.01 at t = .*, where it is 1"),
        (NotFinite(), "d_alpha of a path must be the derivative of alpha, got nan"),
        (Negative(), r"sigma of a path must not be negative, got -0\.49 at t = 0\.99"),
        (Reversed(), r"alpha / sigma of a path must grow with t, .* it falls at t = 0\.01"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_paths_that_are_wrong(path, message):
    with pytest.raises(ValueError, match=message):
        fm.testing.check_path(path)


@pytest.mark.parametrize(
    "arguments", [{"steps": 20}, {"method": "rk4", "steps": 20}, {"method": "dopri5"}, {"method": "dopri5", "per_sample": True}]
)
def test_methods_get_times_in_one_row(arguments):
    """Written for the times [B] of a batch, they serve a whole solve's and one time's too. Data at a point: an exact target."""
    found = fm.sample(lambda x, t: torch.full_like(x, 2.0), X0, path=Quadratic(), objective="data", t1=0.9, **arguments)
    expected, error = 0.81 * 2.0 + 0.1 * X0, 2e-3 if "steps" in arguments else 1e-4
    torch.testing.assert_close(found.x, expected, rtol=error, atol=error)
    loss = fm.flow_matching_loss(lambda x, t: x, X0, path=Quadratic(), seed=0, step=0)
    assert bool(loss.isfinite())
