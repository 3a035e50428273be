"""The variance of each kind of probe equals its formula, by Monte Carlo over the batch, and every kind is unbiased.

With S the symmetric part of the Jacobian: Rademacher 2 sum_{i != j} S_ij^2, Gaussian 2 ||S||_F^2, K Hadamard rows (D - K) / (D - 1) of
Rademacher's over K with D the padded power of two, coloured 2 sum over the pairs of one colour. Tolerances are four standard errors.
"""

import math

import numpy as np
import pytest
import torch

import fm_fast as fm
from fm_fast import testing
from fm_fast._solver.probes import colours

WIDE = torch.float64
SAMPLES = 20_000
pytestmark = pytest.mark.usefixtures("one_thread")


def matrix(dimension):
    """Not symmetric, and shifted as the Jacobian of a flow-matching velocity is."""
    generator = torch.Generator().manual_seed(dimension)
    return torch.randn(dimension, dimension, generator=generator, dtype=WIDE) - 3.0 * torch.eye(dimension, dtype=WIDE)


def pair_sum(a, of=None):
    """sum S_ij^2 over the pairs i != j, or over those that the mask ``of`` marks."""
    symmetric = 0.5 * (a + a.T)
    mask = ~torch.eye(len(a), dtype=torch.bool) if of is None else of & ~torch.eye(len(a), dtype=torch.bool)
    return float(symmetric[mask].square().sum())


def estimates(a, count=SAMPLES, shape=None, step=0, **options):
    """div [count] of x -> A x minus its trace."""
    x = torch.zeros(count, *(shape or (len(a),)), dtype=WIDE)

    def model(x, t):
        return (x.flatten(1) @ a.T).reshape(x.shape)

    return fm.divergence(model, x, 0.5, seed=3, step=step, **options).div - a.trace()


def assert_variance(errors, formula):
    """The mean of ``errors`` is 0, and that of their squares ``formula``, within four standard errors, which are small themselves."""
    squares = errors.square()
    uncertainty = float(squares.std()) / math.sqrt(len(errors))
    assert uncertainty < 0.04 * formula, "too few samples to tell"
    assert abs(float(squares.mean()) - formula) < 4 * uncertainty
    assert abs(float(errors.mean())) < 4 * math.sqrt(formula / len(errors))


@pytest.mark.parametrize("probes", [1, 4])
@pytest.mark.parametrize("dimension", [16, 23, 64])
def test_rademacher(dimension, probes):
    a = matrix(dimension)
    assert_variance(estimates(a, kind="rademacher", probes=probes), 2 * pair_sum(a) / probes)


@pytest.mark.parametrize("probes", [1, 4])
@pytest.mark.parametrize("dimension", [16, 23])
def test_gaussian(dimension, probes):
    a, symmetric = matrix(dimension), 0.5 * (matrix(dimension) + matrix(dimension).T)
    assert_variance(estimates(a, kind="gaussian", probes=probes), 2 * float(symmetric.square().sum()) / probes)


@pytest.mark.parametrize("probes", [3, 8])
@pytest.mark.parametrize("dimension", [16, 23])
def test_hadamard(dimension, probes):
    """Rows are drawn once a call for all samples, so the variance is that over calls too: one sample of each of many steps counts."""
    a, padded, calls = matrix(dimension), 1 << (dimension - 1).bit_length(), 400
    errors = [estimates(a, 50, step=step, kind="hadamard", probes=probes) for step in range(calls)]
    formula = (padded - probes) / (padded - 1) * 2 * pair_sum(a) / probes
    squares = torch.stack([error.square().mean() for error in errors])
    uncertainty = float(squares.std()) / math.sqrt(calls)
    assert uncertainty < 0.04 * formula, "too few calls to tell"
    assert abs(float(squares.mean()) - formula) < 4 * uncertainty
    assert abs(float(torch.cat(errors).mean())) < 4 * math.sqrt(formula / (50 * calls))


@pytest.mark.parametrize("dimension", [16, 23])
def test_one_hadamard_row_is_rademacher(dimension):
    a = matrix(dimension)
    assert_variance(estimates(a, kind="hadamard", probes=1), 2 * pair_sum(a))


@pytest.mark.parametrize("kind", ["hadamard", "coloured", "exact", "auto"])
@pytest.mark.parametrize("shape", [(2, 2, 4), (3, 2, 3)], ids=str)
def test_exact_with_as_many_probes_as_elements(kind, shape):
    a, probes = matrix(math.prod(shape)), 1 << (math.prod(shape) - 1).bit_length()
    errors = estimates(a, 5, shape, kind=kind, probes=probes)
    assert float(errors.abs().max()) < 1e-12 * float(a.abs().sum())


def same_colour(shape, probes):
    """Pairs of one colour, bool [D, D]: equal coordinates modulo 2 (4 colours) or 4 (16), in other channels shifted as far as it goes."""
    channels, height, width = shape
    cell = {4: 2, 16: 4}[probes]
    half = cell // 2
    shifts = torch.tensor([[0, 0], [half, half], [half, 0], [0, half]])[:channels]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    colour = (y + shifts[:, 0, None, None]) % cell * cell + (x + shifts[:, 1, None, None]) % cell
    return colour.reshape(-1, 1) == colour.reshape(-1)


@pytest.mark.parametrize(("shape", "probes"), [((1, 6, 6), 4), ((3, 4, 4), 4), ((2, 6, 5), 16), ((4, 4, 4), 16)], ids=str)
def test_coloured(shape, probes):
    a = matrix(math.prod(shape))
    formula = 2 * pair_sum(a, same_colour(shape, probes))
    assert_variance(estimates(a, SAMPLES // 2, shape, kind="coloured", probes=probes), formula)


@pytest.mark.parametrize(("kind", "probes"), [("rademacher", 4), ("gaussian", 4), ("hadamard", 1), ("coloured", 1)])
def test_replicates_divide_the_variance(kind, probes):
    """Independent groups: two replicates halve it, for any kind."""
    a = matrix(16)
    single = {"gaussian": 2 * float((0.5 * (a + a.T)).square().sum())}.get(kind, 2 * pair_sum(a))
    errors = estimates(a, SAMPLES, (1, 4, 4), kind=kind, probes=probes, replicates=2)
    assert_variance(errors, single / (2 * probes))


@pytest.mark.parametrize(("kind", "options"), [
    ("rademacher", {"probes": 5}), ("gaussian", {"probes": 5}), ("hadamard", {"probes": 4, "replicates": 3}),
    ("coloured", {"probes": 4, "replicates": 3}),
])  # fmt: skip
def test_standard_errors_are_honest(kind, options):
    """The mean of std_err^2 over samples is the variance that is seen: both are estimates, so both uncertainties count."""
    a = matrix(16)
    x = torch.zeros(SAMPLES, 1, 4, 4, dtype=WIDE)

    def model(x, t):
        return (x.flatten(1) @ a.T).reshape(x.shape)

    told, seen = [], []
    for step in range(20 if kind == "hadamard" else 1):  # rows are shared by the samples of a call
        result = fm.divergence(model, x, 0.5, seed=4, step=step, kind=kind, **options)
        told.append(result.std_err.square())
        seen.append((result.div - a.trace()).square())
    difference = torch.cat(told) - torch.cat(seen)
    uncertainty = float(difference.std()) / math.sqrt(len(difference))
    assert abs(float(difference.mean())) < 5 * uncertainty < 0.2 * float(torch.cat(seen).mean())


def image_variances(field, t, probes):
    """(independent, coloured) variances with as many probes on the image field, from its Jacobian."""
    jacobian = field.jacobian(t)
    return 2 * pair_sum(jacobian) / probes, 2 * pair_sum(jacobian, same_colour(field.shape, probes))


@pytest.mark.parametrize(("probes", "t", "factor"), [(4, 0.5, 3.0), (4, 0.7, 15.0), (16, 0.5, 50.0), (16, 0.7, 15.0)])
def test_colours_on_images_with_a_natural_spectrum(probes, t, factor):
    """Neighbours are correlated most, so colours that separate them remove most of the variance: measured, and at least by ``factor``."""
    field = testing.StationaryImages(16)
    independent, coloured = image_variances(field, t, probes)
    assert independent > factor * coloured
    x = field.sample(600, t, seed=0)
    errors = fm.divergence(field, x, t, kind="coloured", probes=probes, seed=1).div - field.divergence(x, t)
    squares = errors.square()
    assert abs(float(squares.mean()) - coloured) < 4 * float(squares.std()) / math.sqrt(len(x))
    assert abs(float(errors.mean())) < 4 * math.sqrt(coloured / len(x))


def test_two_colours_are_a_checkerboard():
    y, x = np.mgrid[:4, :6]
    assert colours((1, 1, 4, 6), 2).reshape(4, 6).tolist() == ((y + x) % 2).tolist()


def test_channels_are_shifted_apart():
    """Channels are shifted apart as long as there are shifts."""
    assert sorted(colours((1, 16, 4, 4), 16).reshape(16, 16)[:, 0].tolist()) == list(range(16))
