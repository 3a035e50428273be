"""Gradients of a path's own parameters through solves and likelihoods: by finite differences, adaptive methods, transforms."""

import pytest
import torch
from sampling_helpers import network, noise64

import fm_fast as fm

X = noise64(3, 4)
POWER = torch.tensor(1.4, dtype=torch.float64)
INSIDE = {"t0": 0.05, "t1": 0.9}


class Power:
    """alpha = t^power, sigma = 1 - t; the prior's standard deviation may be learned as well."""

    def __init__(self, power, prior_scale=1.0):
        self.power, self.prior_scale, self.calls = power, prior_scale, 0

    def alpha(self, t):
        self.calls += 1
        return t**self.power

    def sigma(self, t):
        return 1 - t

    def d_alpha(self, t):
        return self.power * t ** (self.power - 1)

    def d_sigma(self, t):
        return -torch.ones_like(t)


def sampled(power, objective="data", method="midpoint", grad="direct", steps=4, **arguments):
    settings = {**INSIDE, "path": Power(power), "objective": objective, "method": method, "grad": grad, "steps": steps, **arguments}
    return fm.sample(network, X, **settings).x


def log_density(power, objective="data", method="midpoint", steps=4, kind="exact", **arguments):
    settings = {**INSIDE, "path": Power(power), "objective": objective, "method": method, "steps": steps, "kind": kind, "seed": 3}
    return fm.log_likelihood(network, X, create_graph=True, **settings, **arguments).logp


def leaf():
    return POWER.clone().requires_grad_()


def gradient(function, **arguments):
    power = leaf()
    return torch.autograd.grad(function(power, **arguments).square().sum(), power)[0]


@pytest.mark.parametrize("objective", ["noise", "score", "data"])
@pytest.mark.parametrize("method", ["euler", "midpoint", "rk4", "ab2", "ab3"])
@pytest.mark.parametrize("solve", [sampled, log_density])
def test_gradients_by_finite_differences(solve, method, objective):
    assert torch.autograd.gradcheck(lambda power: solve(power, objective, method), leaf())


@pytest.mark.parametrize("solve", [sampled, log_density])
def test_gradients_are_those_of_an_adaptive_solve(solve):
    adaptive = {"method": "dopri5", "steps": None, "rtol": 1e-11, "atol": 1e-11}
    torch.testing.assert_close(gradient(solve, method="rk4", steps=240), gradient(solve, **adaptive), rtol=1e-6, atol=0.0)


def test_gradients_with_probes():
    for kind in ("rademacher", "hadamard"):
        assert torch.autograd.gradcheck(lambda power: log_density(power, kind=kind, probes=2), leaf())  # noqa: B023


def test_gradients_of_samples_with_log_prob():
    def both(power):
        s = fm.sample_with_log_prob(network, X, path=Power(power), objective="noise", steps=3, create_graph=True, **INSIDE)
        return s.x, s.logp

    assert torch.autograd.gradcheck(both, leaf())


def test_gradients_checkpointed_encoded_and_guided():
    expected = gradient(sampled)
    torch.testing.assert_close(gradient(sampled, grad="checkpoint"), expected, rtol=1e-12, atol=0.0)
    guidance, cond = fm.Guidance(2.0, {"y": 0}, interval=(0.2, 0.8)), {"y": torch.ones(3, dtype=torch.int64)}

    def model(x, t, y):
        return network(x, t) * (1 + y.view(-1, 1))

    def solved(power, direction):
        return direction(
            model, X, path=Power(power), objective="data", steps=3, grad="direct", guidance=guidance, cond=cond, save="steps", **INSIDE
        ).saved

    for direction in (fm.sample, fm.encode):
        assert torch.autograd.gradcheck(lambda power: solved(power, direction), leaf())  # noqa: B023


@pytest.mark.parametrize("method", ["midpoint", "rk4", "ab3"])
def test_values_are_those_of_the_fast_solve(method):
    torch.testing.assert_close(sampled(leaf(), method=method).detach(), sampled(POWER, method=method), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(log_density(leaf(), method=method).detach(), log_density(POWER, method=method), rtol=1e-13, atol=1e-13)


def test_the_network_may_run_in_another_dtype():
    inputs = set()

    def model(x, t):
        inputs.add((x.dtype, t.dtype))
        return network(x, t)

    power = leaf()
    found = fm.sample(model, X.float(), path=Power(power), objective="data", steps=4, grad="direct", dtype=torch.float16, **INSIDE).x
    assert inputs == {(torch.float16, torch.float32)} and found.dtype == torch.float32
    torch.testing.assert_close(found.double(), sampled(POWER), rtol=0.02, atol=0.02)
    torch.testing.assert_close(torch.autograd.grad(found.square().sum(), power)[0], gradient(sampled), rtol=0.05, atol=0.0)


@pytest.mark.filterwarnings("ignore:the finite number of steps")
def test_the_error_estimate_stays():
    expected = fm.log_likelihood(network, X, path=Power(POWER), objective="data", steps=4, error_estimate=True, seed=1, **INSIDE)
    found = fm.log_likelihood(
        network, X, path=Power(leaf()), objective="data", steps=4, error_estimate=True, seed=1, create_graph=True, **INSIDE
    )
    torch.testing.assert_close(found.disc_err, expected.disc_err)


def test_nothing_is_recorded_unasked():
    for grad in ("none", "direct"):
        with torch.set_grad_enabled(grad == "none"):
            assert not sampled(leaf(), grad=grad).requires_grad
    path = Power(leaf())
    assert not fm.log_likelihood(network, X, path=path, objective="data", steps=2, **INSIDE).logp.requires_grad
    assert path.calls == 1


def test_a_learned_standard_deviation_of_the_prior():
    def density(scale):
        return fm.log_likelihood(network, X, path=Power(1.0, scale), steps=2, create_graph=True).logp

    scale = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(density, scale)
    torch.testing.assert_close(density(scale), density(1.7))


def test_a_velocity_that_is_not_finite_is_refused_as_without_gradients():
    for power in (POWER * float("nan"), (POWER * float("nan")).requires_grad_()):
        with pytest.raises(ValueError, match="objective 'data' has no finite velocity on path"):
            sampled(power)


def test_function_transforms_of_the_parameter():
    def loss(power):
        return sampled(power, method="rk4").square().sum() + log_density(power).square().sum()

    power = leaf()
    expected = torch.autograd.grad(loss(power), power)[0]
    torch.testing.assert_close(torch.func.grad(loss)(POWER), expected)
    torch.testing.assert_close(torch.func.jvp(loss, (POWER,), (torch.ones_like(POWER),))[1], expected)
    powers = torch.tensor([1.2, 1.4], dtype=torch.float64)
    torch.testing.assert_close(torch.func.vmap(loss)(powers), torch.stack([loss(power) for power in powers]))
