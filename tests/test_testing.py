"""The closed-form oracles against facts they were not made from: automatic differentiation, continuity, moments, quadrature."""

import math

import pytest
import torch
from flows import solve

import fm_fast as fm
from fm_fast import testing
from fm_fast.objectives import velocity_coefficients

PATHS = {"ot": fm.OT(), "ot-0.1": fm.OT(sigma_min=0.1), "vp": fm.VP(), "ve": fm.VE(sigma_max=5.0), "cosine": fm.Cosine()}
OBJECTIVES = ["velocity", "noise", "score", "scoreflow", "data"]
WIDE = torch.float64
pytestmark = pytest.mark.usefixtures("one_thread")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def mixture(path="ot", shape=(3,), components=4):
    means = torch.randn(components, *shape, generator=generator(1), dtype=WIDE)
    return testing.GaussianMixture(torch.arange(1.0, components + 1), means, torch.linspace(0.3, 0.8, components, dtype=WIDE), path)


def gaussian(path="ot", shape=(3,)):
    root = torch.randn(math.prod(shape), math.prod(shape), generator=generator(2), dtype=WIDE)
    mean = torch.randn(shape, generator=generator(3), dtype=WIDE)
    covariance = root @ root.T / 3 + 0.1 * torch.eye(len(root))
    return testing.GaussianToGaussian(mean, 0.5 * (covariance + covariance.T), path)


def images(path="ot"):
    return testing.StationaryImages(3, channels=2, path=path)


def linear():
    return testing.LinearField(torch.randn(3, 3, generator=generator(4), dtype=WIDE), torch.tensor([0.5, -1.0, 2.0]))


PATH_FIELDS = {"mixture": mixture, "gaussian": gaussian, "images": images}


def points(oracle, count=5, dtype=WIDE):
    shape = getattr(oracle, "shape", (3,))
    return torch.randn(count, *shape, generator=generator(5), dtype=dtype)


def times(path, count=5):
    """Spread over the path, its own ends included."""
    return torch.linspace(path.t_min, path.t_max, count, dtype=WIDE)


def traces(field, x, t):
    """The divergence [B] from the whole Jacobian."""

    def velocity(flat):
        return field(flat.reshape(x.shape), t).flatten(1)

    jacobian = torch.autograd.functional.jacobian(velocity, x.flatten(1), vectorize=True)
    return torch.stack([jacobian[b, :, b].trace() for b in range(len(x))])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", PATH_FIELDS)
def test_divergence_and_score_are_the_derivatives(kind, path):
    oracle = PATH_FIELDS[kind](PATHS[path])
    x, t = points(oracle), times(PATHS[path])
    torch.testing.assert_close(oracle.divergence(x, t), traces(oracle, x, t), rtol=1e-9, atol=1e-9)
    x.requires_grad_()
    (score,) = torch.autograd.grad(oracle.log_prob(x, t).sum(), x)
    torch.testing.assert_close(oracle.score(x, t), score, rtol=1e-9, atol=1e-9)


def test_divergence_of_the_linear_field():
    x = torch.randn(4, 3, dtype=WIDE)
    torch.testing.assert_close(linear().divergence(x, 0.3), traces(linear(), x, 0.3))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", ["mixture", "gaussian"])
def test_continuity_equation_in_one_dimension(kind, path):
    """dp/dt + d(p u)/dx = 0 (equation 26), by central differences."""
    oracle, eps = PATH_FIELDS[kind](PATHS[path], (1,)), 1e-4
    x = torch.linspace(-3, 3, 61, dtype=WIDE)[:, None]
    for t in (0.2, 0.5, 0.9):
        change = (oracle.log_prob(x, t + eps).exp() - oracle.log_prob(x, t - eps).exp()) / (2 * eps)
        flux = [oracle.log_prob(y, t).exp() * oracle.velocity(y, t)[:, 0] for y in (x + eps, x - eps)]
        torch.testing.assert_close(change, -(flux[0] - flux[1]) / (2 * eps), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", ["mixture", "gaussian"])
def test_density_integrates_to_one_with_the_moments_of_the_path(kind, path):
    oracle, p = PATH_FIELDS[kind](PATHS[path], (1,)), PATHS[path]
    x = torch.linspace(-60, 60, 240_001, dtype=WIDE)
    if kind == "mixture":
        mean, second = oracle.weights @ oracle.means[:, 0], oracle.weights @ (oracle.means[:, 0] ** 2 + oracle.stds**2)
    else:
        mean, second = oracle.mean[0], oracle.mean[0] ** 2 + oracle.covariance[0, 0]
    for t in times(p, 3):
        density = oracle.log_prob(x[:, None], float(t)).exp() * (x[1] - x[0])
        a, s = p.alpha(t), p.sigma(t)
        expected = torch.stack([torch.ones((), dtype=WIDE), a * mean, a**2 * second + s**2])
        torch.testing.assert_close(torch.stack([(density * x**n).sum() for n in range(3)]), expected, rtol=1e-6, atol=1e-7)


def test_density_at_the_data_end_is_the_textbook_one():
    oracle = gaussian(fm.VP(), (2, 2))
    x = points(oracle)
    expected = torch.distributions.MultivariateNormal(oracle.mean.flatten(), oracle.covariance).log_prob(x.flatten(1))
    torch.testing.assert_close(oracle.log_prob(x), expected)
    cluster = mixture(fm.VP(), (2, 2))
    parts = torch.distributions.Normal(cluster.means, cluster.stds.reshape(-1, 1, 1, 1).squeeze(-1)).log_prob(x[:, None]).sum((2, 3))
    torch.testing.assert_close(cluster.log_prob(x), (parts + cluster.weights.log()).logsumexp(1))


@pytest.mark.parametrize("path", PATHS)
def test_a_mixture_of_one_is_a_gaussian(path):
    mean = torch.randn(2, 3, generator=generator(), dtype=WIDE)
    one = testing.GaussianMixture(torch.ones(1), mean[None], torch.tensor([0.4], dtype=WIDE), PATHS[path])
    same = testing.GaussianToGaussian(mean, 0.16 * torch.eye(6, dtype=WIDE), PATHS[path])
    x, t = points(same), times(PATHS[path])
    for objective in OBJECTIVES:
        torch.testing.assert_close(one.output(objective, x, t), same.output(objective, x, t), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(one.divergence(x, t), same.divergence(x, t), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(one.log_prob(x, t), same.log_prob(x, t), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(one.sample(7, 0.5, seed=1), same.sample(7, 0.5, seed=1), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", ["gaussian", "images"])
def test_flow_follows_the_velocity(kind, path):
    oracle = PATH_FIELDS[kind](PATHS[path])
    x = points(oracle)
    torch.testing.assert_close(oracle.flow(x, 0.1, 0.9), solve(oracle, x, 0.1, 0.9, steps=200), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(oracle.flow(oracle.flow(x, 0.1, 0.9), 0.9, 0.1), x)


def test_flow_and_density_of_the_linear_field():
    oracle, x = linear(), torch.randn(4, 3, dtype=WIDE)
    torch.testing.assert_close(oracle.flow(x, 0.2, 0.8), solve(oracle, x, 0.2, 0.8, steps=200), rtol=1e-9, atol=1e-9)
    lengths = torch.tensor([0.0, 0.3, 0.5, 1.0])
    for row, end in enumerate(lengths):
        torch.testing.assert_close(oracle.flow(x, 0.0, lengths)[row], oracle.flow(x, 0.0, float(end))[row])
    root, shift = torch.matrix_exp(oracle.matrix), oracle.flow(torch.zeros(1, 3, dtype=WIDE), 0.0, 1.0)[0]
    expected = torch.distributions.MultivariateNormal(shift, root @ root.T).log_prob(x)
    torch.testing.assert_close(oracle.log_prob(x), expected)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", PATH_FIELDS)
def test_every_output_gives_the_velocity(kind, path, objective):
    oracle, p = PATH_FIELDS[kind](PATHS[path]), PATHS[path]
    x, model = points(oracle), PATH_FIELDS[kind](PATHS[path]).model(objective)
    low, high = fm.objectives.velocity_range(p, fm.objectives.as_objective(objective))
    for t in (low, 0.01, 0.5, 0.99, high):
        x_factor, output_factor = velocity_coefficients(p, objective, t)
        velocity = x_factor * x + output_factor * model(x, t, label=3)
        torch.testing.assert_close(velocity, oracle(x, t), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_outputs_are_the_posterior_means_that_training_finds(path, objective):
    """E[x1 | x_t] and E[x0 | x_t] by a sum over a grid of x1, with Bayes' rule and no formula of the mixture's posterior."""
    oracle, p, t = mixture(PATHS[path], (1,)), PATHS[path], torch.tensor(0.6, dtype=WIDE)
    x, x1 = torch.tensor([[-0.7], [0.1], [1.3]], dtype=WIDE), torch.linspace(-6, 6, 40_001, dtype=WIDE)
    x0 = (x - p.alpha(t) * x1) / p.sigma(t)
    posterior = torch.softmax(mixture("ot", (1,)).log_prob(x1[:, None]) - 0.5 * x0**2, dim=1)
    data, noise = (posterior * x1).sum(1, keepdim=True), (posterior * x0).sum(1, keepdim=True)
    velocity = p.d_alpha(t) * data + p.d_sigma(t) * noise
    score = -noise / p.sigma(t)
    expected = {"velocity": velocity, "noise": noise, "data": data}.get(objective, score)
    torch.testing.assert_close(oracle.output(objective, x, t), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", PATH_FIELDS)
def test_samples_have_the_density(kind):
    """Stein's identity E[score x^T] = -I: it holds for the samples of the density whose score is taken, and not for those of another."""
    oracle = PATH_FIELDS[kind](fm.VP())
    for t in (0.0, 0.7, 1.0):
        x = oracle.sample(8192, t, seed=3)
        assert x.shape == (8192, *oracle.shape) and x.dtype == WIDE
        products = oracle.score(x, t).flatten(1)[:, :, None] * x.flatten(1)[:, None]
        spread = products.std(0) / math.sqrt(len(x))
        assert bool(((products.mean(0) + torch.eye(oracle.dimension)).abs() < 5 * spread).all())


def test_samples_are_counted_and_independent_of_the_starting_noise():
    oracle = mixture()
    assert torch.equal(oracle.sample(9, seed=4, step=2)[:5], oracle.sample(5, seed=4, step=2))
    assert not torch.equal(oracle.sample(5, seed=4, step=2), oracle.sample(5, seed=4, step=3))
    x0 = fm.noise((4096, 3), seed=4, step=2, dtype=WIDE)
    x1 = oracle.sample(4096, seed=4, step=2)
    assert float(torch.corrcoef(torch.cat([x0, x1], 1).T)[:3, 3:].abs().max()) < 5 / math.sqrt(4096)


def test_component_shares_are_the_weights():
    far = torch.tensor([[-100.0], [0.0], [100.0]])
    x = testing.GaussianMixture(torch.tensor([1.0, 2.0, 5.0]), far, torch.ones(3)).sample(8000, seed=0)
    counts = torch.stack([((x - mean).abs() < 10).sum() for mean in far])
    expected = 8000 * torch.tensor([0.125, 0.25, 0.625])
    assert bool(((counts - expected).abs() < 5 * expected.sqrt()).all()) and int(counts.sum()) == 8000


@pytest.mark.parametrize("kind", [*PATH_FIELDS, "linear"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_answers_in_the_dtype_and_shape_of_x(kind, dtype):
    oracle = linear() if kind == "linear" else PATH_FIELDS[kind]()
    x = points(oracle, dtype=dtype)
    for t in (0.25, torch.tensor(0.25), torch.full((5,), 0.25)):
        assert oracle(x, t).shape == x.shape and oracle(x, t).dtype == dtype
        torch.testing.assert_close(oracle(x, t), oracle(x.double(), 0.25).to(dtype), rtol=0, atol=0)
        for numbers in (oracle.divergence(x, t), oracle.log_prob(x, t)):
            assert numbers.shape == (5,) and numbers.dtype == dtype
    assert oracle(x[:0], 0.25).shape == x[:0].shape and oracle.log_prob(x[:0]).shape == (0,)


@pytest.mark.parametrize("kind", [*PATH_FIELDS, "linear"])
def test_answers_on_the_device_of_x(kind):
    """The meta device stands for any other one: an operation that mixes devices is an error there too."""
    oracle = linear() if kind == "linear" else PATH_FIELDS[kind]()
    x = points(oracle).to("meta")
    for t in (0.25, torch.full((5,), 0.25, device="meta")):
        for answer in (oracle(x, t), oracle.divergence(x, t), oracle.log_prob(x, t)):
            assert answer.device.type == "meta"
    if hasattr(oracle, "flow"):
        assert oracle.flow(x, 0.0, 1.0).device.type == "meta"


@pytest.mark.parametrize("kind", PATH_FIELDS)
def test_derivatives_of_any_order(kind):
    oracle = PATH_FIELDS[kind]()
    x, t = points(oracle, 2).requires_grad_(), torch.tensor([0.3, 0.8], dtype=WIDE, requires_grad=True)
    assert torch.autograd.gradcheck(oracle, (x, t))
    assert torch.autograd.gradcheck(lambda x, t: (oracle.log_prob(x, t), oracle.divergence(x, t)), (x, t))
    assert torch.autograd.gradgradcheck(oracle, (x, t))


@pytest.mark.parametrize("path", ["ot", "ot-0.1", "cosine", "ve"])
def test_both_ends_are_finite_for_every_objective(path):
    oracle = mixture(PATHS[path])
    x = 30 * points(oracle)  # far from every component, where densities underflow
    for t in (0.0, 1.0):
        for objective in OBJECTIVES:
            assert bool(oracle.output(objective, x, t).isfinite().all())
        assert bool(oracle.log_prob(x, t).isfinite().all() and oracle.divergence(x, t).isfinite().all())


@pytest.mark.parametrize("path", ["ot", "vp"])
def test_jacobians_are_those_of_the_field(path):
    for oracle in (gaussian(PATHS[path]), images(PATHS[path])):
        x = points(oracle, 1)
        expected = torch.autograd.functional.jacobian(lambda flat, of=oracle: of(flat.reshape(1, *of.shape), 0.4).flatten(), x.flatten())
        torch.testing.assert_close(oracle.jacobian(0.4), expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(oracle.jacobian(0.4, rows=[2, 1]), expected[[2, 1]], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(expected, expected.T, rtol=1e-9, atol=1e-9)


def test_stationary_images_have_the_promised_statistics():
    field = testing.StationaryImages(16, correlation=0.6, variance=0.25)
    x = field.sample(2000, seed=0)
    assert float(x.var(0).mean()) == pytest.approx(0.25, rel=0.03)
    between = torch.corrcoef(x.transpose(0, 1).reshape(3, -1))
    torch.testing.assert_close(between, torch.full((3, 3), 0.6, dtype=WIDE).fill_diagonal_(1.0), rtol=0, atol=0.03)
    power = torch.fft.fft2(x).abs().square().mean((0, 1))
    for frequency in (2, 4, 8):
        assert float(power[0, frequency] / power[0, 1]) == pytest.approx(frequency**-2, rel=0.15)


def test_observed_order():
    assert testing.observed_order([9.0, 4.0, 1.0], [16, 32, 64]) == pytest.approx(2.0)
    assert testing.observed_order([1.0, 1 / 27], [10, 30]) == pytest.approx(3.0)
    for errors, steps in (([1.0], [2]), ([1.0, 2.0], [4, 2]), ([1.0, 2.0, 3.0], [1, 2])):
        with pytest.raises(ValueError, match="steps must be two or more increasing"):
            testing.observed_order(errors, steps)
    with pytest.raises(ValueError, match="errors must be positive"):
        testing.observed_order([1.0, 0.0], [2, 4])


def test_bad_input_names_what_is_wrong():
    with pytest.raises(ValueError, match=r"x must be \[B, ...\] with 3 elements"):
        mixture()(torch.zeros(2, 4), 0.5)
    with pytest.raises(TypeError, match="x must be a torch"):
        mixture()([1.0, 2.0, 3.0], 0.5)
    with pytest.raises(ValueError, match="weights must be"):
        testing.GaussianMixture(torch.ones(2), torch.zeros(3, 2), torch.ones(3))
    with pytest.raises(ValueError, match="must be positive"):
        testing.GaussianMixture(torch.ones(2), torch.zeros(2, 2), torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match="covariance must be symmetric"):
        testing.GaussianToGaussian(torch.zeros(2), torch.tensor([[1.0, 0.5], [0.0, 1.0]]))
    with pytest.raises(ValueError, match="positive definite"):
        testing.GaussianToGaussian(torch.zeros(2), -torch.eye(2))
    with pytest.raises(ValueError, match=r"matrix must be \[D, D\]"):
        testing.LinearField(torch.zeros(2, 3), torch.zeros(2))
    with pytest.raises(ValueError, match="path must be one of"):
        mixture("OT")
    with pytest.raises(ValueError, match="correlation"):
        testing.StationaryImages(correlation=1.0)
    with pytest.raises(ValueError, match="variance must be finite, got nan"):
        testing.StationaryImages(variance=float("nan"))
    with pytest.raises(TypeError, match="size must be a whole number, got float"):
        testing.StationaryImages(size=8.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="objective must be one of"):
        mixture().model("epsilon")
