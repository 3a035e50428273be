"""Gradients through a solve: by finite differences, checkpointed as direct, under torch.func transforms, and none unasked."""

import pytest
import torch
from sampling_helpers import FIXED, network, noise64
from torch import nn

import fm_fast as fm

X0 = noise64(3, 2, 4)
PARAMETER = torch.tensor(0.7, dtype=torch.float64)


def solved(noise, factor, grad, method="midpoint", **arguments):
    return fm.sample(lambda x, t: network(factor * x, t), noise, method=method, steps=3, grad=grad, **arguments).x


@pytest.mark.parametrize("grad", ["direct", "checkpoint"])
@pytest.mark.parametrize("method", ["midpoint", "ab2"])
def test_gradients_by_finite_differences(grad, method):
    noise, factor = noise64(2, 3).requires_grad_(), PARAMETER.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda *a: solved(*a, grad, method), (noise, factor))


def test_second_derivatives():
    noise, factor = noise64(2, 2).requires_grad_(), PARAMETER.clone().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda *a: solved(*a, "direct"), (noise, factor))


@pytest.mark.parametrize("save", [None, [0.3, 1.0]])
def test_checkpointed_gradients_are_the_direct_ones(save):
    model = Field().double()
    results = []
    for grad in ("direct", "checkpoint"):
        model.zero_grad()
        noise = X0.clone().requires_grad_()
        found = fm.sample(model, noise, method="rk4", steps=3, grad=grad, save=save)
        (found.x if save is None else found.saved).square().sum().backward()
        results.append((found.x.detach(), noise.grad, *(p.grad for p in model.parameters())))
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-14)
        assert float(one.abs().max()) > 0


def test_fused_and_differentiable_solves_agree():
    for method in FIXED:
        plain = fm.sample(network, X0, method=method, steps=4, grad="direct").x
        torch.testing.assert_close(fm.sample(network, X0, method=method, steps=4).x, plain, rtol=1e-13, atol=1e-14)


def test_nothing_is_recorded_unasked():
    noise = X0.clone().requires_grad_()
    assert not fm.sample(network, noise, steps=2).x.requires_grad
    assert fm.sample(network, noise, steps=2, grad="direct").x.requires_grad
    with torch.no_grad():
        assert not fm.sample(network, noise, steps=2, grad="direct").x.requires_grad


class Field(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, t):
        return torch.sin(self.linear(x)) * t[:, None, None]


def kept_bytes(compute):
    """The memory that the graph of a result keeps, each storage once, and the result."""
    storages = {}

    def pack(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = compute()
    return sum(storages.values()), result


def test_checkpointing_keeps_less_memory():
    wide = nn.Sequential(nn.Linear(4, 256), nn.SiLU(), nn.Linear(256, 256), nn.SiLU(), nn.Linear(256, 4)).double()
    kept = {}
    for grad in ("direct", "checkpoint"):
        noise = X0.clone().requires_grad_()
        kept[grad], x = kept_bytes(lambda: fm.sample(lambda x, t: wide(x), noise, steps=6, grad=grad).x)  # noqa: B023
        x.sum().backward()
    assert kept["checkpoint"] < kept["direct"] / 5


@pytest.mark.parametrize("dims", [2, 3], ids=["points", "images"])
def test_function_transforms(dims):
    """vmap over noise, grad and jvp with respect to a parameter, on a whole solve."""
    noise = noise64(4, 2, 3, *[2] * (dims - 1))

    def one(x, factor):
        return fm.sample(lambda x, t: network(factor * x, t), x, method="rk4", steps=2, grad="direct").x

    torch.testing.assert_close(torch.func.vmap(one, (0, None))(noise, PARAMETER), torch.stack([one(x, PARAMETER) for x in noise]))
    gradient = torch.func.grad(lambda f: one(noise[0], f).sum())(PARAMETER)
    _, tangent = torch.func.jvp(lambda f: one(noise[0], f).sum(), (PARAMETER,), (torch.ones_like(PARAMETER),))
    step = 1e-6
    expected = (one(noise[0], PARAMETER + step).sum() - one(noise[0], PARAMETER - step).sum()) / (2 * step)
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(tangent, expected, rtol=1e-6, atol=1e-8)


def test_per_sample_gradients():
    def loss(factor, x):
        return fm.sample(lambda x, t: network(factor * x, t), x[None], steps=2, grad="direct").x.square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(PARAMETER, X0)
    expected = torch.stack([torch.func.grad(loss)(PARAMETER, x) for x in X0])
    torch.testing.assert_close(found, expected)
