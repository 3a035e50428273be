"""Sample quality against closed forms: distances of known normals, two-sample tests whose answer is known, judges of real digits."""

import dataclasses
import math
import sys
import types

import pytest
import torch

from fm_fast.train.data import digits
from fm_fast.train.evaluation.classifier import agreement, features, train_classifier
from fm_fast.train.evaluation.quality import feature_distance, frechet_distance, inception, median_distance, nearest_neighbour_accuracy

WIDE = torch.float64


def normals(count, dimension, seed, scale=1.0):
    return scale * torch.randn(count, dimension, generator=torch.Generator().manual_seed(seed), dtype=WIDE)


def test_frechet_distance_of_commuting_covariances_is_that_of_the_standard_deviations():
    mean, other = torch.tensor([1.0, -2.0, 0.5], dtype=WIDE), torch.tensor([0.0, 1.0, 0.5], dtype=WIDE)
    one_sd, other_sd = torch.tensor([1.0, 0.3, 2.0], dtype=WIDE), torch.tensor([0.5, 0.3, 5.0], dtype=WIDE)
    basis = torch.linalg.qr(normals(3, 3, 0)).Q
    covariances = [basis * sd.square() @ basis.T for sd in (one_sd, other_sd)]
    expected = (mean - other).square().sum() + (one_sd - other_sd).square().sum()
    assert frechet_distance(mean, covariances[0], other, covariances[1]) == pytest.approx(float(expected), rel=1e-12)


def test_frechet_distance_of_any_covariances_against_a_matrix_root():
    roots = [normals(4, 4, seed) for seed in (1, 2)]
    one, other = (root @ root.T for root in roots)
    eigenvalues = torch.linalg.eigvals(one @ other).real  # of a product of positive matrices: real and positive
    expected = one.trace() + other.trace() - 2 * eigenvalues.sqrt().sum()
    zero = torch.zeros(4, dtype=WIDE)
    assert frechet_distance(zero, one, zero, other) == pytest.approx(float(expected), rel=1e-9)
    assert frechet_distance(zero, one, zero, one) == pytest.approx(0.0, abs=1e-9)
    assert frechet_distance(zero, other, zero, one) == pytest.approx(float(expected), rel=1e-9)


def test_frechet_distance_of_a_covariance_without_full_rank():
    flat = torch.diag(torch.tensor([1.0, 0.0], dtype=WIDE))
    zero = torch.zeros(2, dtype=WIDE)
    assert frechet_distance(zero, flat, zero, torch.eye(2, dtype=WIDE)) == pytest.approx(1.0)


def test_feature_distance_is_that_of_the_fitted_normals():
    one, other = normals(60_000, 3, 3), normals(60_000, 3, 4, scale=2.0) + torch.tensor([1.0, 0.0, 0.0])
    assert feature_distance(one, other) == pytest.approx(1.0 + 3.0, rel=0.03)
    shifted = one + torch.tensor([3.0, 4.0, 0.0])
    assert feature_distance(one, shifted) == pytest.approx(25.0, rel=1e-9), "equal covariances: only the means count"
    assert feature_distance(one[:, :1], 3.0 * one[:, :1] - 2.0 * one[:, :1].mean()) == pytest.approx(4.0 * float(one[:, 0].var()))


def test_feature_distance_refuses_what_has_no_covariance():
    with pytest.raises(ValueError, match=r"features: expected \[N, D\] and \[M, D\] with N, M >= 2, got \[1, 3\] and \[5, 3\]"):
        feature_distance(torch.zeros(1, 3), torch.zeros(5, 3))


@pytest.mark.parametrize("dimension", [1, 8])
def test_nearest_neighbours_cannot_tell_equal_distributions_apart(dimension):
    count = 2000
    accuracy = nearest_neighbour_accuracy(normals(count, dimension, 5), normals(count, dimension, 6))
    assert abs(accuracy - 0.5) < 4 * 0.5 / math.sqrt(2 * count)


def test_nearest_neighbours_tell_distant_distributions_apart_and_know_copies():
    one = normals(200, 4, 7)
    assert nearest_neighbour_accuracy(one, one + 100.0) == 1.0
    assert nearest_neighbour_accuracy(one, one + 1e-6) == 0.0, "everyone's nearest neighbour is its copy in the other set"
    assert nearest_neighbour_accuracy(one, one) == 0.0


def test_nearest_neighbour_accuracy_by_hand():
    # On a line: 0 and 1 are the first set, 1.4 and 3 the second; the neighbours are 1, 1.4, 1, 1.4: right for 0 and 3.
    assert nearest_neighbour_accuracy(torch.tensor([[0.0], [1.0]]), torch.tensor([[1.4], [3.0]])) == 0.5
    with pytest.raises(ValueError, match=r"two sets of equal shape with at least 2 elements, got \[3, 1\] and \[4, 1\]"):
        nearest_neighbour_accuracy(torch.zeros(3, 1), torch.zeros(4, 1))


def test_distances_in_parts_are_those_of_the_whole(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randint(0, 256, (23, 1, 4, 4), dtype=torch.uint8, generator=generator) for _ in range(2))
    both = torch.cat([one, other]).flatten(1).double()
    distances = (both[:, None] - both).norm(dim=2).fill_diagonal_(torch.inf)
    accuracy = float(((distances.argmin(1) < 23) == (torch.arange(46) < 23)).double().mean())
    for chunk in (5, 23, 100):
        monkeypatch.setattr("fm_fast.train.evaluation.quality.CHUNK", chunk)
        assert nearest_neighbour_accuracy(one, other) == accuracy
        assert median_distance(one, other) == pytest.approx(float(distances[:23, 23:].amin(1).median()), rel=1e-5)


def test_median_distance_by_hand():
    images = torch.tensor([[0.0], [10.0], [20.0]]).reshape(3, 1, 1, 1)
    assert median_distance(images, torch.tensor([1.0, 12.0]).reshape(2, 1, 1, 1)) == 2.0


def test_features_tell_noise_from_digits():
    training, held_out = digits(), digits("test")
    classifier = train_classifier(training)
    of_held_out = features(classifier, held_out.images)
    assert of_held_out.shape == (297, 64) and of_held_out.dtype == WIDE
    whole = classifier.body(held_out.images[:3].float()).mean((2, 3)).detach()
    torch.testing.assert_close(of_held_out[:3], whole.double(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(whole.shape[1], classifier.head.in_features // 16)
    real = feature_distance(features(classifier, training.images[:297]), of_held_out)
    noise = torch.randint(0, 17, (297, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert feature_distance(features(classifier, noise), of_held_out) > 10 * real


# FID and the inception score, of which the network is a download


def test_fid_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ImportError, match=r"FID needs torch-fidelity: pip install 'fm_fast\[fid\]'"):
        inception(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.zeros(2, 1, 8, 8, dtype=torch.uint8))


def test_torch_fidelity_gets_rgb_images_of_8_bits(monkeypatch):
    seen = {}

    def calculate_metrics(**arguments):
        seen.update(arguments)
        return {"frechet_inception_distance": 12.5, "inception_score_mean": 3.25, "inception_score_std": 0.5}

    monkeypatch.setitem(sys.modules, "torch_fidelity", types.SimpleNamespace(calculate_metrics=calculate_metrics))
    grey = torch.full((3, 1, 8, 8), 16, dtype=torch.uint8)
    assert inception(grey, torch.zeros(5, 1, 8, 8, dtype=torch.uint8), levels=17) == (12.5, 3.25)
    assert (len(seen["input1"]), len(seen["input2"]), seen["fid"], seen["cuda"]) == (3, 5, True, False)
    assert seen["isc"] and seen["isc_splits"] == 3, "a part without images has no score"
    image = seen["input1"][0]
    assert image.shape == (3, 8, 8) and image.dtype == torch.uint8 and set(image.flatten().tolist()) == {255}
    with pytest.raises(ValueError, match="images: expected 1 or 3 channels for FID, got 2"):
        inception(torch.zeros(2, 2, 8, 8, dtype=torch.uint8), grey)
    inception(torch.zeros(20, 1, 8, 8, dtype=torch.uint8), grey)
    assert seen["isc_splits"] == 10


def test_the_judge_of_a_few_images_is_trained():
    """However small a share of an epoch's steps they are: an untrained one would judge by chance."""
    data = digits()
    rows = torch.tensor([int((data.labels == label).nonzero()[0]) for label in range(6)])
    few = dataclasses.replace(data, images=data.images[rows], labels=data.labels[rows])
    assert agreement(train_classifier(few), few.images, few.labels) == 1.0
