"""torch.func transforms of divergences and likelihoods against autograd and loops; what they cannot do is refused in our words."""

import warnings

import pytest
import torch
from sampling_helpers import network, noise64
from torch.func import functional_call, grad, hessian, jacfwd, jvp, vjp, vmap

import fm_fast as fm

X = noise64(3, 6)
FACTOR = torch.tensor(0.7, dtype=torch.float64)
KINDS = pytest.mark.parametrize(
    "arguments", [{"kind": "exact"}, {"kind": "rademacher", "probes": 3}, {"kind": "hadamard", "probes": 2}], ids=str
)
MODES = pytest.mark.parametrize("mode", ["auto", "loop", "batched"])


def field(factor):
    return lambda x, t: network(factor * x, t)


def likelihood(x, factor=FACTOR, ids=0, **arguments):
    settings = {"steps": 3, "seed": 5, "sample_ids": ids, "create_graph": True, **arguments}
    return fm.log_likelihood(field(factor), x, **settings).logp


def divergence(x, factor=FACTOR, ids=0, **arguments):
    return fm.divergence(field(factor), x, 0.4, seed=5, sample_ids=ids, create_graph=True, **arguments).div


FUNCTIONS = pytest.mark.parametrize("function", [likelihood, divergence])


def autograd(function, *inputs):
    free = [x.clone().requires_grad_() for x in inputs]
    return torch.autograd.grad(function(*free).sum(), free)


@KINDS
@MODES
@FUNCTIONS
def test_grad_is_that_of_autograd(function, mode, arguments):
    def total(x, factor):
        return function(x, factor, mode=mode, **arguments).sum()

    torch.testing.assert_close(grad(total, (0, 1))(X, FACTOR), autograd(total, X, FACTOR))


@KINDS
@MODES
@FUNCTIONS
def test_jvp_is_the_gradient_along_the_direction(function, mode, arguments):
    direction = noise64(3, 6).flip(0)

    def one(x):
        return function(x, mode=mode, **arguments)

    expected = (autograd(one, X)[0] * direction).sum()
    value, tangent = jvp(one, (X,), (direction,))
    torch.testing.assert_close(value, one(X))
    torch.testing.assert_close(tangent.sum(), expected)
    with torch.autograd.forward_ad.dual_level():
        dual = one(torch.autograd.forward_ad.make_dual(X, direction))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent.sum(), expected)


def test_jvp_needs_no_graph():
    direction = noise64(3, 6).flip(0)
    found = jvp(lambda x: likelihood(x, create_graph=False), (X,), (direction,))[1]
    torch.testing.assert_close(found, jvp(likelihood, (X,), (direction,))[1])


@KINDS
@MODES
@FUNCTIONS
@pytest.mark.parametrize("create_graph", [True, False])
def test_vmap_over_ids_is_the_batch(function, mode, arguments, create_graph):
    settings = {"mode": mode, "create_graph": create_graph, **arguments} if function is likelihood else {"mode": mode, **arguments}
    found = vmap(lambda x, i: function(x[None], ids=i[None], **settings)[0])(X, torch.arange(3))
    torch.testing.assert_close(found, function(X, **settings))


def test_vmap_over_parameters_and_per_sample_gradients():
    factors = torch.tensor([0.5, 0.9], dtype=torch.float64)
    torch.testing.assert_close(vmap(lambda f: likelihood(X, f))(factors), torch.stack([likelihood(X, f) for f in factors]))
    one = grad(lambda x, i: likelihood(x[None], ids=i[None]).sum())
    ids = torch.arange(3)
    torch.testing.assert_close(vmap(one)(X, ids), torch.stack([one(x, i) for x, i in zip(X, ids, strict=True)]))


def test_autograd_through_vmap():
    x = X.clone().requires_grad_()
    vmap(lambda x, i: likelihood(x[None], ids=i[None])[0])(x, torch.arange(3)).sum().backward()
    torch.testing.assert_close(x.grad, autograd(likelihood, X)[0])


def test_second_derivatives_of_a_parameter():
    def total(factor):
        return likelihood(X, factor, kind="exact").sum()

    step = 1e-5
    expected = (grad(total)(FACTOR + step) - grad(total)(FACTOR - step)) / (2 * step)
    torch.testing.assert_close(hessian(total)(FACTOR), expected, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(jacfwd(total)(FACTOR), grad(total)(FACTOR))


def test_gradients_of_a_module_by_functional_call():
    torch.manual_seed(0)
    linear = torch.nn.Linear(6, 6).double()
    parameters = {name: value.detach() for name, value in linear.named_parameters()}

    def total(parameters):
        return fm.log_likelihood(
            lambda x, t: torch.tanh(functional_call(linear, parameters, (x,))), X, steps=2, seed=0, create_graph=True
        ).logp.sum()

    found = grad(total)(parameters)
    fm.log_likelihood(lambda x, t: torch.tanh(linear(x)), X, steps=2, seed=0, create_graph=True).logp.sum().backward()
    torch.testing.assert_close(found, {name: value.grad for name, value in linear.named_parameters()})


def test_a_module_stays_as_it_is_under_vmap():
    torch.manual_seed(0)
    linear = torch.nn.Linear(6, 6).double()

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = linear

        def forward(self, x, t):
            return torch.tanh(self.linear(x))

    model = Model()
    found = vmap(lambda x: fm.log_likelihood(model, x[None], steps=2, kind="exact", seed=0).logp[0])(X)
    torch.testing.assert_close(found, fm.log_likelihood(model, X, steps=2, kind="exact").logp)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("model", [lambda x, t: torch.ones_like(x), lambda x, t: x.detach() * 2, torch.no_grad()(lambda x, t: x * 2)])
def test_outputs_without_a_gradient_are_refused_under_transforms_too(model):
    with pytest.raises(RuntimeError, match="the divergence needs the gradient of the model's output in x"):
        vmap(lambda x: fm.divergence(model, x[None], 0.5, seed=0).div[0])(X)


@pytest.mark.parametrize("transform", [grad, lambda f: lambda x: vjp(f, x)])
def test_a_gradient_that_is_not_recorded_is_refused(transform):
    for function in (likelihood, lambda x, create_graph: fm.divergence(field(FACTOR), x, 0.4, create_graph=create_graph).div):
        with pytest.raises(ValueError, match=r"create_graph must be True under torch\.func\.grad, vjp, .*, got False"):
            transform(lambda x: function(x, create_graph=False).sum())(X)  # noqa: B023


@pytest.mark.filterwarnings("ignore:the finite number of steps")
def test_error_estimates_stay():
    expected = fm.log_likelihood(field(FACTOR), X, steps=4, seed=5, error_estimate=True).disc_err

    def estimate(x):
        found = fm.log_likelihood(field(FACTOR), x, steps=4, seed=5, create_graph=True, error_estimate=True)
        return found.logp.sum(), found.disc_err

    gradient, found = grad(estimate, has_aux=True)(X)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient, autograd(lambda x: likelihood(x, steps=4), X)[0])
    torch.testing.assert_close(vmap(lambda x: estimate(x)[1])(X[None])[0], expected)


TRANSFORMS = pytest.mark.parametrize(
    "transform", [lambda f: grad(f)(X), lambda f: vmap(f)(X[:, None]), lambda f: jvp(f, (X,), (X,))], ids=["grad", "vmap", "jvp"]
)


@TRANSFORMS
@pytest.mark.parametrize(
    "solve",
    [
        lambda x: fm.sample(network, x, method="dopri5", grad="direct").x,
        lambda x: fm.encode(network, x, method="bosh3", grad="direct").x,
        lambda x: fm.log_likelihood(network, x, method="dopri5", create_graph=True, seed=0).logp,
    ],
    ids=["sample", "encode", "log_likelihood"],
)
def test_adaptive_methods_are_refused(solve, transform):
    with pytest.raises(ValueError, match=r"method must be a fixed-step one under torch\.func transforms .*, got '(dopri5|bosh3)'"):
        transform(lambda x: solve(x).sum())


@pytest.mark.parametrize("solve", [fm.sample, fm.encode])
def test_samples_whose_gradient_is_not_recorded_are_refused(solve):
    with pytest.raises(ValueError, match=r'grad must be "direct" under torch\.func\.grad, .*, or the derivative would be zero, got "none"'):
        grad(lambda x: solve(network, x, steps=2).x.sum())(torch.ones(2, 3))


@pytest.mark.parametrize(
    ("solve", "name", "setting"),
    [
        (lambda x, **options: fm.sample(network, x, steps=2, **options), "noise", {"grad": "direct"}),
        (lambda x, **options: fm.encode(network, x, steps=2, **options), "x1", {"grad": "checkpoint"}),
        (lambda x, **options: fm.log_likelihood(network, x, steps=2, seed=0, **options), "x1", {"create_graph": True}),
        (lambda x, **options: fm.sample_with_log_prob(network, x, steps=2, seed=0, **options), "noise", {"create_graph": True}),
        (lambda x, **options: fm.divergence(network, x, 0.5, seed=0, **options), "x", {"create_graph": True}),
    ],
    ids=["sample", "encode", "log_likelihood", "sample_with_log_prob", "divergence"],
)
def test_a_gradient_that_is_not_recorded_is_told(solve, name, setting):
    x = torch.ones(2, 3, requires_grad=True)
    with pytest.warns(UserWarning, match=rf"^{name} requires a gradient, which is not recorded: give .*, else {name}\.detach\(\)$") as told:
        solve(x)
    assert [warning.filename for warning in told] == [__file__], "it points at the caller"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solve(x, **setting)
        solve(x.detach())
        with torch.no_grad():
            solve(x)


@TRANSFORMS
def test_checkpoints_are_refused(transform):
    with pytest.raises(ValueError, match=r'grad must be "none" or "direct" under torch\.func transforms, .*, got "checkpoint"'):
        transform(lambda x: fm.sample(network, x, steps=2, grad="checkpoint").x.sum())


class Traced(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return fm.divergence(self.model, x, 0.5, kind="exact").div


class Linear(torch.nn.Module):
    """v = A diag(b) x."""

    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Parameter(X[:3, :3].clone()), torch.nn.Parameter(X[0, :3].clone())

    def forward(self, x, t):
        return x * self.b @ self.a.T


def test_computed_parameters_cannot_be_frozen_and_stop_nothing():
    """As functional_call puts them in, here after one that can be."""
    model = Linear()
    found = functional_call(Traced(model), {"model.a": model.a, "model.b": 2.0 * model.b}, (X[:, :3],))
    torch.testing.assert_close(found, (2.0 * model.a.diagonal() * model.b).sum().detach().expand(3))
    assert all(parameter.requires_grad for parameter in model.parameters())
