"""Likelihoods against densities that are known: unbiased with honest error bars, whatever the probes, path and prior."""

import math

import pytest
import torch
from flows import WIDE, images, log_normal, mixture, rms

import fm_fast as fm
from fm_fast import testing

PROBES = {
    "rademacher": {"kind": "rademacher", "probes": 8},
    "gaussian": {"kind": "gaussian", "probes": 8},
    "hadamard": {"kind": "hadamard", "probes": 2, "replicates": 8},
    "coloured": {"kind": "coloured", "probes": 2, "replicates": 8},
}
PATHS = {"vp": fm.VP(), "ve": fm.VE(sigma_max=5.0)}
pytestmark = pytest.mark.usefixtures("one_thread")


def repeated(oracle, count):
    """One sample of the data, ``count`` times: a batch whose probes alone differ."""
    return oracle.sample(1, seed=0).expand(count, *oracle.shape).contiguous()


@pytest.mark.parametrize("name", PROBES)
def test_every_kind_is_unbiased_with_an_honest_standard_error(name):
    """Against the same solve with the exact divergence, so that nothing but the probes differs."""
    oracle, count = images(), 1500
    x1 = repeated(oracle, count)
    options = {"method": "midpoint", "steps": 6}
    exact = fm.log_likelihood(oracle, x1[:1], kind="exact", **options)
    told = fm.log_likelihood(oracle, x1, seed=7, **PROBES[name], **options)
    errors = told.logp - exact.logp
    spread = float(errors.std())
    assert exact.std_err.tolist() == [0.0] and spread > 0.0
    assert abs(float(errors.mean())) < 4 * spread / math.sqrt(count)
    assert math.sqrt(float(told.std_err.square().mean())) == pytest.approx(spread, rel=0.1)
    # Eight groups: between Student's t with 7 degrees of freedom (one evaluation dominates) and a normal (none does).
    within = float((errors.abs() < 2 * told.std_err).double().mean())
    assert 0.88 < within < 0.97
    torch.testing.assert_close(told.x0[:1], exact.x0, rtol=1e-12, atol=1e-12)


def test_variance_falls_with_probes_replicates_and_steps():
    oracle = images()
    x1 = repeated(oracle, 1500)

    def variance(steps=4, **options):
        return float(fm.log_likelihood(oracle, x1, steps=steps, kind="rademacher", seed=3, **options).logp.var())

    single = variance()
    assert variance(probes=4) == pytest.approx(single / 4, rel=0.15)
    assert variance(probes=2, replicates=2) == pytest.approx(single / 4, rel=0.15)
    # new probes at every step: the errors of the steps are independent
    assert variance(steps=16) < single / 2.5


def test_auto_is_exact_where_dimensions_are_few():
    oracle = mixture()
    x1 = oracle.sample(4, seed=0)
    exact = fm.log_likelihood(oracle, x1, steps=4, kind="exact")
    auto = fm.log_likelihood(oracle, x1, steps=4)
    assert torch.equal(auto.logp, exact.logp) and torch.equal(auto.std_err, torch.zeros(4, dtype=WIDE))
    assert (exact.nfe, exact.nvjp) == (8, 8), "midpoint needs the divergence of two dimensions at one of its two stages"


def discretisation(oracle, x1, method, steps):
    """|log p_N - log p_(N/2)| / (2^order - 1) by exact divergences: what the estimate is to find."""
    fine, coarse = (fm.log_likelihood(oracle, x1, method=method, steps=n, kind="exact").logp for n in (steps, steps // 2))
    return (fine - coarse).abs() / (2 ** fm.solvers.METHODS[method].order() - 1), fine


# From steps whose error everybody sees to steps whose error is a hundredth of the probes' noise.
STEPS = [
    ("euler", 16),
    ("midpoint", 16),
    pytest.param("midpoint", 64, marks=pytest.mark.slow),
    ("ab2", 32),
    ("ab3", 32),
    pytest.param("rk4", 16, marks=pytest.mark.slow),
    ("rk4", 32),
]


@pytest.mark.filterwarnings("ignore:the finite number of steps")
@pytest.mark.parametrize(("method", "steps"), STEPS)
def test_error_estimate_with_one_probe_measures_the_discretisation(method, steps):
    """On images of 75 dimensions, and not the noise of the probes, which is larger than what is measured."""
    oracle = testing.StationaryImages(5)
    x1 = oracle.sample(8, seed=5)
    expected, fine = discretisation(oracle, x1, method, steps)
    estimated = fm.log_likelihood(oracle, x1, method=method, steps=steps, kind="rademacher", seed=1, error_estimate=True)
    assert float(expected.mean()) / 2 < float(estimated.disc_err.mean()) < float(expected.mean()) * 2
    if (method, steps) == ("rk4", 32):
        assert rms(estimated.logp - fine) > 100 * float(estimated.disc_err.mean())


@pytest.mark.filterwarnings("ignore:the finite number of steps")
@pytest.mark.parametrize(("method", "steps"), [("midpoint", 8), ("midpoint", 32), ("heun2", 16), ("ab3", 32), ("rk4", 16)])
def test_error_estimate_on_a_nonlinear_field_of_64_dimensions(method, steps):
    """Median of three seeds: a single probe sees this field's few curved directions or not."""
    oracle = images(8)
    x1 = oracle.sample(32, seed=5)
    expected, fine = discretisation(oracle, x1, method, steps)
    options = {"method": method, "steps": steps, "kind": "rademacher", "error_estimate": True}
    found = sorted(float(fm.log_likelihood(oracle, x1, seed=seed, **options).disc_err.mean()) for seed in range(3))[1]
    assert float(expected.mean()) / 2 < found < float(expected.mean()) * 2
    if (method, steps) == ("midpoint", 8):  # what it is for: the error itself
        error = float((fine - oracle.log_prob(x1)).abs().mean())
        assert error / 2.5 < found < error * 2.5


@pytest.mark.parametrize("name", PROBES)
def test_the_same_seed_gives_the_same_bits(name):
    oracle = images()
    x1 = oracle.sample(6, seed=0)
    first, again, other = (fm.log_likelihood(oracle, x1, steps=3, seed=seed, **PROBES[name]).logp for seed in (5, 5, 6))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("path", PATHS)
def test_prior_of_the_paths_that_do_not_end_at_a_normal(path):
    oracle = mixture(PATHS[path])
    x1 = oracle.sample(8, seed=2)
    options = {"path": PATHS[path], "method": "rk4", "steps": 60, "kind": "exact"}
    default = fm.log_likelihood(oracle, x1, **options)
    exact = fm.log_likelihood(oracle, x1, prior=lambda x0: oracle.log_prob(x0, 0.0), **options)
    high = fm.objectives.velocity_range(PATHS[path], fm.objectives.as_objective("velocity"))[1]
    torch.testing.assert_close(exact.logp, oracle.log_prob(x1, high), rtol=0, atol=1e-4)
    normal = log_normal(default.x0, PATHS[path].prior_scale)
    torch.testing.assert_close(default.logp - exact.logp, normal - oracle.log_prob(exact.x0, 0.0), rtol=1e-9, atol=1e-9)
    # the paper's measurement: the approximate prior of VP costs about a hundredth of a nat, that of VE with sigma 5 more
    assert 1e-5 < float((default.logp - exact.logp).abs().mean()) < 0.2


@pytest.mark.parametrize("path", ["ot", "vp", "cosine"])
def test_samples_come_with_their_likelihood(path):
    oracle = mixture(path)
    x0 = oracle.sample(16, 0.0, seed=6)
    options = {"path": path, "method": "rk4", "steps": 60}
    result = fm.sample_with_log_prob(oracle, x0, kind="exact", prior=lambda x: oracle.log_prob(x, 0.0), **options)
    assert torch.equal(result.x, fm.sample(oracle, x0, **options).x)
    high = fm.objectives.velocity_range(fm.paths.as_path(path), fm.objectives.as_objective("velocity"))[1]
    torch.testing.assert_close(result.logp, oracle.log_prob(result.x, high), rtol=0, atol=1e-4)
    again = fm.log_likelihood(oracle, result.x, kind="exact", prior=lambda x: oracle.log_prob(x, 0.0), **options)
    torch.testing.assert_close(result.logp, again.logp, rtol=0, atol=1e-4)
    torch.testing.assert_close(again.x0, x0, rtol=1e-4, atol=1e-4)
    assert result.nfe == again.nfe and result.nvjp == again.nvjp and result.std_err.tolist() == [0.0] * 16


def test_samples_with_probes_are_unbiased_too():
    oracle, count = images(), 1500
    x0 = torch.randn(1, *oracle.shape, dtype=WIDE, generator=torch.Generator().manual_seed(2)).expand(count, *oracle.shape)
    exact = fm.sample_with_log_prob(oracle, x0[:1], steps=4, kind="exact")
    told = fm.sample_with_log_prob(oracle, x0, steps=4, kind="rademacher", probes=3, seed=0)
    errors = told.logp - exact.logp
    assert abs(float(errors.mean())) < 4 * float(errors.std()) / math.sqrt(count)
    assert math.sqrt(float(told.std_err.square().mean())) == pytest.approx(float(errors.std()), rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_models_of_low_precision(dtype):
    oracle = mixture()
    x1 = oracle.sample(16, seed=8).float()
    exact = fm.log_likelihood(oracle, x1.double(), steps=16, kind="exact").logp
    low = fm.log_likelihood(oracle, x1, steps=16, kind="exact", dtype=dtype)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.06, torch.float16: 0.01}[dtype]
    assert low.logp.dtype == WIDE and low.x0.dtype == torch.float32
    torch.testing.assert_close(low.logp, exact, rtol=0, atol=tolerance)


@pytest.mark.parametrize("objective", ["noise", "score", "data"])
def test_other_objectives_with_probes(objective):
    """div v = p D + r div o: the first part is exact, the second has the probes' noise."""
    oracle, count = images(), 1500
    x1 = repeated(oracle, count)
    options = {"path": fm.VP(), "objective": objective, "method": "midpoint", "steps": 6}
    oracle = testing.GaussianMixture(oracle.weights, oracle.means, oracle.stds, fm.VP())
    exact = fm.log_likelihood(oracle.model(objective), x1[:1], kind="exact", **options)
    velocity = fm.log_likelihood(oracle, x1[:1], kind="exact", **options | {"objective": "velocity"})
    torch.testing.assert_close(exact.logp, velocity.logp, rtol=1e-8, atol=1e-8)
    told = fm.log_likelihood(oracle.model(objective), x1, kind="rademacher", probes=4, seed=2, **options)
    errors = told.logp - exact.logp
    assert abs(float(errors.mean())) < 4 * float(errors.std()) / math.sqrt(count)
    assert math.sqrt(float(told.std_err.square().mean())) == pytest.approx(float(errors.std()), rel=0.1)


@pytest.mark.parametrize("path", ["ot", "vp"])
def test_adaptive_likelihoods(path):
    """Its probes are held for the whole solve, so that the error control sees one smooth integrand: unbiased all the same."""
    oracle = mixture(path)
    x1, tight = oracle.sample(8, seed=3), {"path": path, "method": "dopri5", "rtol": 1e-8, "atol": 1e-8}
    prior = {"prior": lambda x0: oracle.log_prob(x0, 0.0)}
    high = fm.objectives.velocity_range(fm.paths.as_path(path), fm.objectives.as_objective("velocity"))[1]
    exact = fm.log_likelihood(oracle, x1, kind="exact", **prior, **tight)
    torch.testing.assert_close(exact.logp, oracle.log_prob(x1, high), rtol=0, atol=1e-6)
    many = x1[:1].expand(1000, 2).contiguous()
    told = fm.log_likelihood(oracle, many, kind="gaussian", probes=4, seed=0, **prior, **tight | {"rtol": 1e-4, "atol": 1e-4})
    errors = told.logp - exact.logp[0]
    assert abs(float(errors.mean())) < 4 * float(errors.std()) / math.sqrt(1000)
    assert math.sqrt(float(told.std_err.square().mean())) == pytest.approx(float(errors.std()), rel=0.15)


def test_gradients_of_the_likelihood_are_the_score():
    oracle = mixture()
    x1 = oracle.sample(5, seed=3).requires_grad_()
    logp = fm.log_likelihood(oracle, x1, method="rk4", steps=30, kind="exact", create_graph=True).logp
    (gradient,) = torch.autograd.grad(logp.sum(), x1)
    torch.testing.assert_close(gradient, oracle.score(x1.detach(), 1.0), rtol=1e-3, atol=1e-3)


def test_plain_and_fused_computation_agree():
    """create_graph runs the plain one; memory formats and doubled probes change nothing either."""
    oracle = images(4, 3)
    x1 = oracle.sample(5, seed=0)

    def logp(x, **options):
        return fm.log_likelihood(oracle, x, steps=3, kind="coloured", probes=4, replicates=2, seed=1, **options).logp

    torch.testing.assert_close(logp(x1, create_graph=True).detach(), logp(x1), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(logp(x1, backend="reference"), logp(x1), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(logp(x1.to(memory_format=torch.channels_last)), logp(x1), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("path", ["ot", "vp", "cosine"])
def test_a_part_of_the_path(path):
    """Between two times within: the density of one end from that of the other."""
    oracle = testing.GaussianToGaussian(torch.tensor([0.4, -1.0]), torch.tensor([[0.5, 0.3], [0.3, 0.8]]), path)
    x0 = oracle.sample(8, 0.2, seed=1)
    options = {"path": path, "method": "rk4", "steps": 30, "t0": 0.2, "t1": 0.7}
    x1 = fm.sample(oracle, x0, **options).x
    torch.testing.assert_close(x1, oracle.flow(x0, 0.2, 0.7), rtol=1e-6, atol=1e-6)
    likelihood = fm.log_likelihood(oracle, x1, kind="exact", prior=lambda x: oracle.log_prob(x, 0.2), **options)
    torch.testing.assert_close(likelihood.logp, oracle.log_prob(x1, 0.7), rtol=0, atol=1e-6)
    torch.testing.assert_close(likelihood.x0, x0, rtol=1e-6, atol=1e-6)


def still(x, t):
    return 0.0 * x


def test_bits_of_the_standard_normal_at_its_centre():
    """N(0, I) at y = 0 is 8.3257 bits; the grey value 128 is dequantised to within 2^-7 of it."""
    x = torch.full((64, 3, 8, 8), 128, dtype=torch.uint8)
    result = fm.bits_per_dim(still, x, steps=2, seed=0)
    expected = 0.5 * math.log2(2 * math.pi) + 7
    assert expected == pytest.approx(8.3257, abs=5e-5)
    curvature = (2**-7) ** 2 / 6 / math.log(2)  # the mean of y^2 / 2 over the bin, in bits
    assert result.mean == pytest.approx(expected + curvature, abs=2e-6)


def test_more_draws_tighten_the_bound():
    """Equation 47 bounds the discrete log-likelihood from below, on average less so with more draws: bits fall towards the exact ones."""
    oracle = testing.GaussianMixture(torch.tensor([1.0, 2.0]), torch.tensor([[-0.6], [0.4]]), torch.tensor([0.2, 0.25]))
    cells = torch.linspace(-1, 1, 4 * 5000 + 1, dtype=WIDE)
    density = oracle.log_prob(0.5 * (cells[1:] + cells[:-1])[:, None]).exp()
    one_draw = 1.0 - float(density.log2().mean())
    exact = -float((density * (cells[1] - cells[0])).reshape(4, -1).sum(1).log2().mean())
    x = torch.arange(4).repeat_interleave(250)[:, None]
    options = {"levels": 4, "steps": 8, "dtype": WIDE, "kind": "exact", "method": "rk4", "seed": 1}
    results = [fm.bits_per_dim(oracle, x, draws=draws, **options) for draws in (1, 2, 4, 8, 16)]
    means = [result.mean for result in results]
    assert means == sorted(means, reverse=True) and one_draw > exact + 0.1
    assert abs(means[0] - one_draw) < 4 * results[0].mean_std_err and abs(means[-1] - exact) < 0.02


@pytest.mark.parametrize("draws", [1, 2, 8])
def test_bits_come_with_an_honest_standard_error(draws):
    """The same seed dequantises alike, so two kinds of probes differ by nothing but the probes."""
    oracle = images()
    x = torch.randint(256, (600, *oracle.shape), generator=torch.Generator().manual_seed(0))
    exact = fm.bits_per_dim(oracle, x, steps=4, kind="exact", draws=draws, seed=0)
    told = fm.bits_per_dim(oracle, x, steps=4, kind="rademacher", probes=8, draws=draws, seed=0)
    assert exact.std_err.tolist() == [0.0] * 600 and (told.nfe, told.nvjp) == (draws * 8, draws * 4 * 8)
    errors = told.bpd - exact.bpd
    assert math.sqrt(float(told.std_err.square().mean())) == pytest.approx(rms(errors), rel=0.15)
    assert abs(float(errors.mean())) < 4 * float(errors.std()) / math.sqrt(600)
    assert fm.bits_per_dim(oracle, x[:2], steps=4, kind="rademacher", draws=draws, seed=0).std_err is None
