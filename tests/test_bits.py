"""fm.bits_per_dim: the paper's protocol on densities whose bits per dimension are known, and its arguments."""

import math

import numpy as np
import oracle
import pytest
import torch

import fm_fast as fm


def still(x, t):
    """Nothing moves: the density of the data is the prior."""
    return 0 * x


def uniform_prior(x):
    """log-density of U(-1, 1)^D."""
    inside = (x.abs() <= 1).flatten(1).all(1)
    level = torch.tensor(-x[0].numel() * math.log(2.0), dtype=torch.float64)
    return torch.where(inside, level, -math.inf)


def images(levels, *shape):
    return torch.randint(0, levels, shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("levels", "bits"), [(256, 8.0), (16, 4.0), (17, math.log2(17))])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.int16, torch.uint16, torch.uint32, torch.uint64])
def test_a_uniform_density_needs_the_logarithm_of_the_levels(levels, bits, dtype):
    b = fm.bits_per_dim(still, images(levels, 4, 3, 5, 5).to(dtype), levels=levels, steps=1, kind="exact", prior=uniform_prior, seed=0)
    torch.testing.assert_close(b.bpd, torch.full((4,), bits, dtype=torch.float64), rtol=1e-12, atol=0)


def test_all_sixteen_bits_of_unsigned_numbers():
    x = images(65536, 2, 3, 4)
    x[0, 0, 0], x[1, 0, 0] = 0, 65535
    arguments = {"levels": 65536, "steps": 2, "kind": "exact", "seed": 0}
    found, expected = (fm.bits_per_dim(still, y, **arguments).bpd for y in (x.to(torch.uint16), x))
    assert torch.equal(found, expected)


def test_every_draw_is_averaged_as_a_density_on_the_dequantised_data_of_the_noise_contract():
    x, levels, draws = images(17, 3, 2, 4), 17, 5
    b = fm.bits_per_dim(still, x, levels=levels, draws=draws, steps=1, kind="exact", seed=6, sample_ids=40, dtype=torch.float64)
    logp = []
    for draw in range(draws):
        u = oracle.uniform((3, 2, 4), 6, draw, "dequantise", [40, 41, 42])
        y = 2 * (x.numpy() + u) / levels - 1
        logp.append((-0.5 * y**2 - 0.5 * math.log(2 * math.pi)).reshape(3, -1).sum(1))
    density = np.exp(np.array(logp)).mean(0) * (2 / levels) ** 8
    np.testing.assert_allclose(b.bpd.numpy(), -np.log2(density) / 8, rtol=1e-12)
    np.testing.assert_allclose(b.logp.numpy(), np.array(logp), rtol=1e-12)
    assert b.nfe == 2 * draws and b.nvjp == 8 * draws


def test_more_draws_never_loosen_the_bound_on_average():
    x = images(4, 400, 6)

    def narrow(y):
        return -12.5 * y.double().square().sum(1)

    def bits(draws):
        return fm.bits_per_dim(still, x, levels=4, draws=draws, steps=1, kind="exact", prior=narrow, seed=1).mean

    one, four, sixteen = bits(1), bits(4), bits(16)
    assert one > four > sixteen


def test_standard_errors_come_from_the_probes_and_the_batch():
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(12, 12, generator=generator)

    def model(x, t):
        return (x.flatten(1) @ matrix * 0.3).reshape(x.shape)

    x = images(256, 64, 3, 4)
    b = fm.bits_per_dim(model, x, steps=10, probes=2, draws=2, seed=2, kind="rademacher")
    exact = fm.bits_per_dim(model, x, steps=10, draws=2, seed=2, kind="exact")
    score = (b.bpd - exact.bpd) / b.std_err
    assert 0.5 < float(score.square().mean()) < 2.0
    assert exact.std_err is not None and float(exact.std_err.max()) == 0.0
    assert fm.bits_per_dim(model, x, steps=2, seed=2, kind="rademacher").std_err is None
    assert b.mean == pytest.approx(float(b.bpd.mean())) and b.mean_std_err == pytest.approx(float(b.bpd.std()) / 8)


def test_draws_use_different_noise_and_the_same_seed_repeats():
    x = images(256, 4, 30)
    first = fm.bits_per_dim(still, x, draws=3, steps=1, kind="rademacher", seed=5)
    assert torch.equal(first.bpd, fm.bits_per_dim(still, x, draws=3, steps=1, kind="rademacher", seed=5).bpd)
    assert len(first.logp.unique()) == 12
    torch.manual_seed(0)
    drawn = fm.bits_per_dim(still, x, steps=1, kind="exact")
    torch.manual_seed(0)
    assert torch.equal(drawn.bpd, fm.bits_per_dim(still, x, steps=1, kind="exact").bpd)


@pytest.mark.parametrize(
    ("x", "arguments", "message"),
    [
        (torch.zeros(2, 3), {}, "x_int must hold whole numbers, got torch.float32"),
        (torch.zeros(2, dtype=torch.uint8), {}, r"x_int must be \[B, ...\] with at least one element"),
        (torch.full((2, 3), 17), {"levels": 17}, r"x_int must lie in 0..16 for levels=17, got 17..17"),
        (torch.full((2, 3), 300, dtype=torch.uint16), {}, r"x_int must lie in 0..255 for levels=256, got 300..300"),
        (torch.full((2, 3), -1), {}, r"x_int must lie in 0..255 for levels=256, got -1..-1"),
        (torch.zeros(2, 3, dtype=torch.uint8), {"levels": 1}, r"levels must lie in \[2, 65536\], got 1"),
        (torch.zeros(2, 3, dtype=torch.uint8), {"draws": 0}, "draws must be at least 1, got 0"),
        (torch.zeros(2, 3, dtype=torch.uint8), {"step": 3}, "step counts the draws here"),
        (torch.zeros(2, 3, dtype=torch.uint8), {"stepz": 3}, "unexpected keyword argument 'stepz'"),
        (torch.zeros(2, 3, dtype=torch.uint8), {}, "steps must be given"),
    ],
)
def test_bad_arguments(x, arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        fm.bits_per_dim(still, x, **arguments)


def test_an_error_estimate_belongs_to_log_likelihood():
    with pytest.raises(ValueError, match="error_estimate is a matter of log_likelihood"):
        fm.bits_per_dim(still, images(4, 2, 3), levels=4, steps=2, error_estimate=True)
    assert math.isnan(fm.bits_per_dim(still, images(4, 1, 3), levels=4, steps=2).mean_std_err)


def swirl(x, t):
    return torch.sin(3 * x.flip(1)) * t[:, None]


def test_calls_without_a_seed_differ():
    x = images(256, 4, 30)
    one, other = (fm.bits_per_dim(still, x, steps=1, kind="exact").bpd for _ in range(2))
    assert not torch.equal(one, other)


def test_a_part_of_a_batch_has_its_bits():
    x = images(16, 4, 8)
    options = {"levels": 16, "steps": 2, "draws": 2, "kind": "rademacher", "seed": 3}
    whole = fm.bits_per_dim(swirl, x, sample_ids=7, **options)
    half = fm.bits_per_dim(swirl, x[2:], sample_ids=9, **options)
    torch.testing.assert_close(half.bpd, whole.bpd[2:], rtol=1e-6, atol=0)


def test_errors_of_draws_weigh_as_their_densities():
    x = images(16, 3, 8)
    options = {"levels": 16, "steps": 3, "kind": "rademacher", "probes": 2, "seed": 3}
    b = fm.bits_per_dim(swirl, x, draws=3, **options)
    errors = []
    for draw in range(3):
        u = fm.noise(x.shape, seed=3, step=draw, stream="dequantise")
        y = (x + u) * (2 / 16) - 1.0
        errors.append(fm.log_likelihood(swirl, y, steps=3, kind="rademacher", probes=2, seed=3).std_err)
    weights = torch.softmax(b.logp, 0)
    torch.testing.assert_close(b.std_err, (weights * torch.stack(errors)).sum(0) / (8 * math.log(2.0)), rtol=1e-6, atol=0)


def test_the_standard_error_has_no_gradient():
    scale = torch.ones(1, requires_grad=True)
    b = fm.bits_per_dim(
        lambda x, t: scale * swirl(x, t),
        images(16, 3, 8),
        levels=16,
        steps=2,
        draws=2,
        probes=2,
        kind="rademacher",
        seed=0,
        create_graph=True,
    )
    assert b.bpd.requires_grad and not b.std_err.requires_grad


def test_truth_values_are_no_grey_levels():
    with pytest.raises(TypeError, match=r"x_int must hold whole numbers, got torch.bool"):
        fm.bits_per_dim(still, torch.zeros(2, 3, dtype=torch.bool), levels=2, steps=1)


def test_an_error_estimate_may_be_declined():
    plain, asked = (
        fm.bits_per_dim(still, images(4, 2, 3), levels=4, steps=2, kind="exact", seed=0, **e) for e in ({}, {"error_estimate": False})
    )
    assert torch.equal(plain.bpd, asked.bpd)


def test_an_empty_batch_has_no_bits():
    assert fm.bits_per_dim(still, images(4, 0, 3), levels=4, steps=1, kind="exact", seed=0).bpd.shape == (0,)


def test_samples_without_elements_have_no_bits():
    with pytest.raises(ValueError, match=r"x_int must be \[B, ...\] with at least one element a sample, got shape \(2, 0\)"):
        fm.bits_per_dim(still, images(4, 2, 0), levels=4, steps=1)
