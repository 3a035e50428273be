"""How near samples are to data, as numbers of two sets of vectors or images; each function names its source and formula."""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from fm_fast.train.reporting.picture import to_8_bit

CHUNK = 1000  # images whose distances to all others are in memory at once
SCORE_PARTS = 10  # of the images, over whose inception scores the mean is taken


def frechet_distance(mean: Tensor, covariance: Tensor, other_mean: Tensor, other_covariance: Tensor) -> float:
    """Squared Fréchet distance of two normal distributions, means [D] and covariances [D, D], float64.

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)): Dowson & Landau (1982), "The Fréchet distance between multivariate normal distributions".
    It is also the squared 2-Wasserstein distance. The eigenvalues of C1 C2 are those of C1^(1/2) C2 C1^(1/2), which is symmetric.
    """
    values, basis = torch.linalg.eigh(covariance)
    root = (basis * values.clamp_min(0.0).sqrt()) @ basis.T
    cross = torch.linalg.eigvalsh(root @ other_covariance @ root).clamp_min(0.0).sqrt().sum()
    distance = (mean - other_mean).square().sum() + covariance.trace() + other_covariance.trace() - 2.0 * cross
    return max(float(distance), 0.0)  # rounding makes that of equal distributions negative


def feature_distance(one: Tensor, other: Tensor) -> float:
    """Fréchet distance of the normal distributions fitted to two sets of features, [N, D] and [M, D].

    The formula of FID (Heusel et al. 2017, "GANs trained by a two time-scale update rule"), on whatever features are given. It is FID only
    for the features of the Inception network: see :func:`inception`. Biased upwards for few samples, so compare at equal N and M.
    Raises ValueError for fewer than two rows or unequal dimensions.
    """
    if one.ndim != 2 or other.ndim != 2 or one.shape[1] != other.shape[1] or min(len(one), len(other)) < 2:
        raise ValueError(f"features: expected [N, D] and [M, D] with N, M >= 2, got {list(one.shape)} and {list(other.shape)}")
    (mean, covariance), (other_mean, other_covariance) = _moments(one), _moments(other)
    return frechet_distance(mean, covariance, other_mean, other_covariance)


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    wide = features.to(torch.float64)
    return wide.mean(0), torch.cov(wide.T).reshape(wide.shape[1], wide.shape[1])


def nearest_neighbour_accuracy(one: Tensor, other: Tensor) -> float:
    """Leave-one-out accuracy of the 1-nearest-neighbour classifier that tells two sets of equal size apart, [N, ...] each.

    The two-sample test of Lopez-Paz & Oquab (2017), "Revisiting classifier two-sample tests", as used for samples by Xu et al. (2018).
    1/2 if both come from one distribution, 1 if they are far apart, below 1/2 if one copies the other; standard error about
    1/(2 sqrt(2 N)). Euclidean distance. Raises ValueError for sets of unequal shape or fewer than two elements.
    """
    if one.shape != other.shape or len(one) < 2:
        raise ValueError(f"expected two sets of equal shape with at least 2 elements, got {list(one.shape)} and {list(other.shape)}")
    both = torch.cat([one, other]).flatten(1).double()
    from_one = torch.arange(len(both), device=both.device) < len(one)
    nearest = torch.cat([_nearest_others(both, first) for first in range(0, len(both), CHUNK)])
    return float((from_one[nearest] == from_one).double().mean())


def _nearest_others(points: Tensor, first: int) -> Tensor:
    """Of CHUNK points [N, D] from the first: the index of another one that is nearest."""
    distances = torch.cdist(points[first : first + CHUNK], points, compute_mode="donot_use_mm_for_euclid_dist")
    distances.diagonal(first).fill_(torch.inf)
    return distances.argmin(1)


def median_distance(images: Tensor, references: Tensor) -> float:
    """Median over `images` of the Euclidean distance to the nearest of `references`, which may be on another device, in their units."""
    rows = images.flatten(1).float()
    return float((rows - _nearest(rows, references)).norm(dim=1).median())


def _nearest(rows: Tensor, references: Tensor) -> Tensor:
    """Of each row [N, D]: float32 [N, D]. Distances are compared by products of matrices, which round: a copy may be next to 0 away."""
    parts = (part.to(rows.device, torch.float32).flatten(1) for part in references.split(CHUNK))
    found = [torch.cdist(rows, part).min(1) for part in parts]
    chunk = torch.stack([each.values for each in found]).argmin(0)
    place = torch.stack([each.indices for each in found]).gather(0, chunk[None]).squeeze(0)
    return references[(chunk * CHUNK + place).to(references.device)].to(rows.device, torch.float32).flatten(1)


def inception(images: Tensor, references: Tensor, levels: int = 256) -> tuple[float, float]:
    """(Fréchet Inception distance of two sets of images, inception score of the first), uint8 [N, C, H, W], C = 1 or 3, by torch-fidelity.

    Heusel et al. (2017), as in :func:`feature_distance`, and Salimans et al. (2016), "Improved techniques for training GANs": the mean
    over ten parts of the images, or one an image where they are fewer. Grey images are repeated to three channels and `levels` grey levels
    are stretched to 256. The network's weights are downloaded at the first call. Raises ImportError, naming the extra, where torch-fidelity
    is not installed.
    """
    inputs = [_Images(_as_rgb(part, levels)) for part in (images, references)]
    measured = require_torch_fidelity().calculate_metrics(
        input1=inputs[0], input2=inputs[1], fid=True, isc=True, isc_splits=min(SCORE_PARTS, len(images)), cuda=images.is_cuda,
        batch_size=min(64, len(images)), verbose=False,
    )  # fmt: skip
    return float(measured["frechet_inception_distance"]), float(measured["inception_score_mean"])


def require_torch_fidelity() -> Any:
    """The module, or an ImportError that names the extra."""
    try:
        return import_module("torch_fidelity")
    except ImportError as error:
        raise ImportError("FID needs torch-fidelity: pip install 'fm_fast[fid]'") from error


class _Images(torch.utils.data.Dataset):
    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


def _as_rgb(images: Tensor, levels: int) -> Tensor:
    if images.shape[1] not in (1, 3):
        raise ValueError(f"images: expected 1 or 3 channels for FID, got {images.shape[1]}")
    return to_8_bit(images, levels).expand(-1, 3, -1, -1).cpu()
