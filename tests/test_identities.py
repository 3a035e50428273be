"""Identities of the paper that hold exactly: Theorem 2, and the change of volume along the conditional flow."""

import math

import pytest
import torch

import fm_fast as fm
from fm_fast.testing import GaussianMixture

pytestmark = pytest.mark.usefixtures("one_thread")
WIDE = torch.float64
DRAWS = 100_000
FIELDS = {
    "pull": lambda x, t: -x,
    "turn and drift": lambda x, t: torch.stack([-x[:, 1], x[:, 0]], 1) + t[:, None],
}


@pytest.fixture(scope="module", params=["ot", "vp"])
def drawn(request):
    """(the points of a step, the marginal velocity there) for data from a mixture whose marginal velocity is known."""
    weights, means, stds = (
        torch.tensor([1.0, 2.0], dtype=WIDE),
        torch.tensor([[1.0, 0.5], [-0.5, 0.0]], dtype=WIDE),
        torch.tensor([0.3, 0.5]),
    )
    oracle = GaussianMixture(weights, means, stds.to(WIDE), request.param)
    x1 = oracle.sample(DRAWS, seed=1)
    point = fm.sample_path(x1, path=request.param, seed=0, step=0)
    return point, oracle(point.x_t, point.t)


def nothing(x, t):
    return torch.zeros_like(x)


def losses(v, point, marginal):
    """(conditional, marginal) losses of each draw, summed over the dimensions."""
    output = v(point.x_t, point.t)
    return 2 * point.loss(output, reduction="none"), (output - marginal).square().sum(1)


def distance_from_constant(v, point, marginal):
    """How many standard errors lie between the gap of the two losses for v and that for the field 0."""
    gaps = [torch.sub(*losses(field, point, marginal)) for field in (v, nothing)]
    difference = gaps[0] - gaps[1]
    return abs(float(difference.mean())) / (float(difference.std()) / math.sqrt(DRAWS))


@pytest.mark.parametrize("name", FIELDS)
def test_both_losses_differ_by_a_constant(drawn, name):
    """Theorem 2: the conditional loss (equation 9) is the marginal one (equation 5) plus a number that no field changes."""
    point, marginal = drawn
    assert distance_from_constant(FIELDS[name], point, marginal) < 4
    other = marginal + 0.3 * FIELDS[name](point.x_t, point.t)
    assert distance_from_constant(FIELDS[name], point, other) > 10, "not so for another velocity"


def test_both_losses_have_the_same_gradient(drawn):
    """Theorem 2, of a field that is linear in features of (x, t)."""
    point, marginal = drawn
    features = torch.cat([point.x_t, point.t[:, None], torch.ones_like(point.t)[:, None]], 1)
    head = torch.randn(4, 2, dtype=WIDE, generator=torch.Generator().manual_seed(0)).requires_grad_()
    pairs = losses(lambda x, t: features @ head, point, marginal)
    conditional, wanted = (torch.autograd.grad(loss.mean(), head, retain_graph=True)[0] for loss in pairs)
    assert float((conditional - wanted).norm() / wanted.norm()) < 0.02


@pytest.mark.parametrize("sigma_min", [0.1, 1e-2, 1e-4])
def test_the_divergence_along_the_conditional_flow_adds_up_to_the_change_of_volume(sigma_min):
    """The flow scales the noise from 1 to sigma_min (equation 22), so the integral of the divergence is ln sigma_min a dimension."""

    def conditional(x, t):
        return (0.7 - (1.0 - sigma_min) * x) / (1.0 - (1.0 - sigma_min) * t[:, None])  # equation 21 for x1 = 0.7

    noise = torch.tensor([[0.4]], dtype=WIDE)
    x = 0.7 + sigma_min * noise
    solved = fm.log_likelihood(conditional, x, path=fm.OT(sigma_min=sigma_min), method="dopri5", rtol=1e-8, atol=1e-8, kind="exact")
    integral = -0.5 * float(solved.x0.square() + math.log(2 * math.pi)) - float(solved.logp)
    assert integral == pytest.approx(math.log(sigma_min), rel=1e-6)
    torch.testing.assert_close(solved.x0, noise, rtol=1e-6, atol=0)


def test_vp_keeps_its_digits_next_to_the_data():
    """sigma^2 = 1 - exp(-T) with T = 0.1 s + 9.95 s^2 -> T - T^2 / 2 + T^3 / 6 for small s = 1 - t."""
    t = torch.tensor([0.9999, 0.99999, 0.999999], dtype=WIDE)
    integral = 0.1 * (1 - t) + 9.95 * (1 - t) ** 2
    expected = (integral - integral**2 / 2 + integral**3 / 6).sqrt()
    torch.testing.assert_close(fm.VP().sigma(t), expected, rtol=1e-14, atol=0.0)
