"""Optimal pairings against every permutation, against sorting, and against squared distances in float64."""

import itertools
import pathlib
import sys

import pytest
import torch
from scipy.optimize import linear_sum_assignment

import fm_fast as fm

sys.path.append(str(pathlib.Path(__file__).parent.parent))

from benchmarks import pairing

IMAGES = (12, 3, 4, 6)


def squared_distances(x1, x0):
    """[B, B] in float64."""
    return torch.cdist(*(x.double()[:, None].flatten(1) for x in (x1, x0))).square()


def cost(x1, x0):
    return float((x1.double() - x0.double()).square().sum())


def least_cost(x1, x0):
    """Over all permutations."""
    distances = squared_distances(x1, x0).tolist()
    orders = itertools.permutations(range(len(x1)))
    return min(sum(distances[i][j] for i, j in enumerate(order)) for order in orders)


def random_images(shape=IMAGES, dtype=torch.float32):
    generator = torch.Generator().manual_seed(7)
    return torch.randn(shape, generator=generator).mul(0.5).add(0.3).to(dtype)


@pytest.mark.parametrize("shape", [(6,), (6, 2), (6, 1, 3), (6, 3, 2, 2), (6, 0)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_no_permutation_is_better(shape, dtype):
    x1 = random_images(shape, dtype)
    x0 = fm.noise(shape, seed=3, step=5, dtype=dtype)
    order = fm.couplings.optimal_order(x0, x1)
    assert sorted(order.tolist()) == list(range(6)) and order.dtype == torch.int64
    assert cost(x1, x0[order]) == pytest.approx(least_cost(x1, x0), rel=1e-6)


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 3e18), (torch.float64, 1e140), (torch.float32, 1e-18)])
def test_huge_and_tiny_data(dtype, scale):
    x1, x0 = (scale * random_images(shape, dtype) for shape in ((200, 3), (200, 3)))
    x0 = x0.flip(0)
    order = fm.couplings.optimal_order(x0, x1)
    assert torch.equal(order, torch.arange(199, -1, -1))


def test_data_whose_products_are_too_large_are_refused():
    x1 = 1e151 * random_images((20, 3), torch.float64)
    with pytest.raises(ValueError, match=r"x0 and x1 must be finite, and their products below 1e\+300, got values that are not"):
        fm.couplings.optimal_order(x1.flip(0), x1)


def test_points_on_a_line_are_paired_in_their_order():
    x1 = random_images((300, 1))
    ids = fm.couplings.optimal_ids(x1, seed=0, step=9)
    x0 = fm.noise((300, 1), seed=0, step=9, sample_ids=ids)
    assert torch.equal(x0[:, 0].argsort(), x1[:, 0].argsort())


@pytest.mark.parametrize("levels", [17, 256])
@pytest.mark.parametrize("path", ["ot", fm.VE(sigma_min=0.01, sigma_max=5.0), "vp"], ids=["ot", "ve", "vp"])
def test_the_loss_draws_what_was_paired(levels, path):
    x1 = torch.randint(0, levels, (40, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ids = fm.couplings.optimal_ids(x1, seed=2, step=3)
    s = fm.sample_path(x1, path=path, levels=levels, seed=2, step=3, sample_ids=ids)
    data, noise = 2.0 * (x1.double() + 0.5) / levels - 1.0, fm.noise(x1.shape, seed=2, step=3)
    _, best = linear_sum_assignment(squared_distances(data, noise))
    assert torch.equal(s.x0, noise[torch.from_numpy(best)])
    assert cost(data, s.x0) < 0.99 * cost(data, noise)


def test_mirrored_samples_are_paired_as_such():
    x1 = random_images((6, 1, 2, 5))
    ids = fm.couplings.optimal_ids(x1, seed=0, step=1, flip=0.5)
    s = fm.sample_path(x1, t=1.0, flip=0.5, seed=0, step=1, sample_ids=ids)  # at time 1 the point is the data as they are trained on
    costs = []
    for order in itertools.permutations(range(6)):
        other = fm.sample_path(x1, t=1.0, flip=0.5, seed=0, step=1, sample_ids=torch.tensor(order))
        costs.append(cost(other.x_t, other.x0))
    assert not torch.equal(s.x_t, x1)
    assert cost(s.x_t, s.x0) == pytest.approx(min(costs), rel=1e-6)


def test_classes_keep_their_noise():
    x1, labels = random_images((30, 2)), torch.arange(30) % 4 - 1
    ids = fm.couplings.optimal_ids(x1, seed=0, step=0, sample_ids=100, labels=labels)
    x0 = fm.noise((30, 2), seed=0, step=0, sample_ids=100)
    for label in range(-1, 3):
        members = (labels == label).nonzero()[:, 0]
        assert sorted(ids[members].tolist()) == (members + 100).tolist()
        order = fm.couplings.optimal_order(x0[members], x1[members])
        assert torch.equal(ids[members], members[order] + 100)


def test_given_ids_are_put_in_order():
    x1, scattered = random_images((9, 4)), torch.tensor([5, 1, 70, 2**32 - 1, 12, 900, 33, 2, 8])
    ids = fm.couplings.optimal_ids(x1, seed=0, step=0, sample_ids=scattered)
    order = fm.couplings.optimal_order(fm.noise((9, 4), seed=0, step=0, sample_ids=scattered), x1)
    assert torch.equal(ids, scattered[order])
    first = fm.couplings.optimal_ids(x1, seed=0, step=0, sample_ids=torch.tensor(20))
    assert sorted(first.tolist()) == list(range(20, 29))


def test_a_large_mean_takes_no_digits():
    x1 = random_images((64, 8))
    expected = fm.couplings.optimal_ids(x1.double(), seed=0, step=0)
    assert torch.equal(fm.couplings.optimal_ids(x1.round(decimals=2) + 1e4, seed=0, step=0), fm.couplings.optimal_ids(x1, seed=0, step=0))
    assert torch.equal(fm.couplings.optimal_ids(x1, seed=0, step=0), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_no_pair(dtype):
    x1 = 200.0 * random_images((64, 2))
    plain = fm.couplings.optimal_ids(x1, seed=0, step=0)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(fm.couplings.optimal_ids(x1, seed=0, step=0), plain)


@pytest.mark.parametrize("count", [0, 1])
def test_nothing_to_choose(count):
    x1 = random_images((count, 3, 2, 2))
    labels = torch.zeros(count, dtype=torch.int64)
    assert fm.couplings.optimal_ids(x1, seed=0, step=0, sample_ids=4, labels=labels).tolist() == [4][:count]
    assert fm.couplings.optimal_order(x1, x1).tolist() == [0][:count]


def test_layouts_and_gradients_do_not_matter():
    x1 = random_images()
    expected = fm.couplings.optimal_ids(x1, seed=0, step=0)
    channels_last = x1.to(memory_format=torch.channels_last).requires_grad_()
    ids = fm.couplings.optimal_ids(channels_last, seed=0, step=0)
    assert torch.equal(ids, expected) and not ids.requires_grad


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x1": [1.0]}, TypeError, r"x1 must be a torch\.Tensor"),
        ({"x1": torch.zeros(12, dtype=torch.int64)}, TypeError, "x1 must be float64"),
        ({"x1": torch.full((12, 2), torch.nan)}, ValueError, "x0 and x1 must be finite"),
        ({"seed": -1}, ValueError, r"seed must lie in \[0"),
        ({"step": 2**32}, ValueError, r"step must lie in \[0"),
        ({"sample_ids": torch.arange(5)}, ValueError, r"sample_ids must be a whole number or int64 of shape \[12\]"),
        ({"labels": torch.zeros(12)}, TypeError, "labels must be whole numbers, got torch.float32"),
        ({"labels": torch.zeros(12, 1, dtype=torch.int64)}, ValueError, r"labels must have shape \[12\], got \(12, 1\)"),
        ({"labels": [0] * 12}, TypeError, r"labels must be a torch\.Tensor"),
        ({"flip": 1.5}, ValueError, r"flip must lie in \[0, 1\]"),
        ({"flip": 0.5, "x1": torch.zeros(12, 4)}, ValueError, "flip mirrors the last dimension"),
    ],
)
def test_errors_name_the_argument(arguments, error, message):
    with pytest.raises(error, match=message):
        fm.couplings.optimal_ids(**{"x1": random_images(), "seed": 0, "step": 0, **arguments})


@pytest.mark.parametrize(
    ("x0", "error", "message"),
    [
        (torch.zeros(12, 3, 4, 5), ValueError, r"x0 must have the shape of x1, \(12, 3, 4, 6\)"),
        (torch.zeros(IMAGES, dtype=torch.int64), TypeError, "x0 must be float64"),
        (torch.full(IMAGES, torch.inf), ValueError, "x0 and x1 must be finite"),
    ],
)
def test_errors_of_given_noise(x0, error, message):
    with pytest.raises(error, match=message):
        fm.couplings.optimal_order(x0, random_images())


def test_transforms_are_refused():
    with pytest.raises(RuntimeError, match=r"find it outside torch\.compile, torch\.func transforms"):
        torch.func.vmap(lambda x: fm.couplings.optimal_order(x, x))(random_images((2, 3, 4)))


@pytest.mark.slow
def test_paired_noise_makes_the_flow_straighter(one_thread):
    (nfe, error, _), (paired_nfe, paired_error, _) = (
        pairing.measured(pairing.trained(0, 120, paired), 0, samples=256, many=100) for paired in (False, True)
    )
    assert paired_nfe < nfe and paired_error < 0.3 * error


def test_a_huge_mean_takes_no_digits():
    x1 = torch.randn(200, 3, generator=torch.Generator().manual_seed(7)).mul(4).round().add(1e6)
    costs = []
    for data in (x1, x1.double()):
        x0 = fm.noise((200, 3), seed=0, step=0, sample_ids=fm.couplings.optimal_ids(data, seed=0, step=0), dtype=torch.float64)
        costs.append(float((x1.double() - 1e6 - x0).square().sum()))
    assert costs[0] == pytest.approx(costs[1], rel=1e-6)


def test_complex_labels_are_refused():
    with pytest.raises(TypeError, match=r"labels must be whole numbers, got torch.complex64"):
        fm.couplings.optimal_ids(torch.zeros(2, 3), seed=0, step=0, labels=torch.zeros(2, dtype=torch.complex64))
