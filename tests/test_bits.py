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
