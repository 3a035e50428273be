"""How near restored images are to their originals, each to its own: PSNR and SSIM, as in Table 2 of the paper."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fm_fast.train.condition import reduced
from fm_fast.train.evaluation.sample import to_integers

# Wang, Bovik, Sheikh & Simoncelli (2004), "Image quality assessment: from error visibility to structural similarity"
WINDOW, SIGMA, K1, K2 = 11, 1.5, 0.01, 0.03
CHUNK = 16  # images whose local moments are in memory at once


@dataclass(frozen=True)
class Likeness:
    """Means over images. psnr: peak signal-to-noise ratio in dB; ssim: structural similarity, 1 for equal images."""

    psnr: float
    ssim: float


@dataclass(frozen=True)
class Restoration:
    """Samples of reduced images, and bicubic interpolation of these, against the originals; window: side of that of SSIM, in pixels."""

    samples: Likeness
    bicubic: Likeness
    window: int


def restoration(samples: Tensor, originals: Tensor, levels: int, factor: int) -> Restoration:
    """Of samples and originals uint8 [N, C, H, W] of `levels` values; the reduced images are means over factor x factor pixels."""
    parts = (part.to(samples.device) for part in originals.split(CHUNK))
    interpolated = torch.cat([to_integers(bicubic(reduced(part, levels, factor), part.shape[2:]), levels) for part in parts])
    return Restoration(
        likeness(samples, originals, levels), likeness(interpolated, originals, levels), window_that_fits(originals.shape[2:])
    )


def bicubic(low: Tensor, size: tuple[int, ...]) -> Tensor:
    """Images [B, C, h, w] enlarged to height and width `size`, as the reference U-Net sees them."""
    return F.interpolate(low, size=tuple(size), mode="bicubic")


def likeness(images: Tensor, originals: Tensor, levels: int) -> Likeness:
    """Of images uint8 [N, C, H, W] with values 0..levels-1; the originals may be on another device."""
    pairs = list(zip(images.split(CHUNK), originals.split(CHUNK), strict=True))
    measured = [(signal_to_noise(one, other.to(one.device), levels), similarity(one, other.to(one.device), levels)) for one, other in pairs]
    psnr, ssim = (torch.cat(values) for values in zip(*measured, strict=True))
    return Likeness(float(psnr.mean()), float(ssim.mean()))


def signal_to_noise(images: Tensor, originals: Tensor, levels: int) -> Tensor:
    """Peak ratio in dB of each image of uint8 [N, C, H, W]: float64 [N]; one that equals its original counts as half a level off."""
    errors = (images.double() - originals.double()).square().flatten(1).mean(1).clamp(min=0.25)
    return 20.0 * math.log10(levels - 1) - 10.0 * errors.log10()


def similarity(images: Tensor, originals: Tensor, levels: int) -> Tensor:
    """Structural similarity of each image [N, C, H, W] with values 0..levels-1: float64 [N], mean over windows and channels.

    Gaussian windows that lie within the image, of WINDOW pixels a side, or the largest odd number that fits a smaller image.
    """
    x, y = images.double(), originals.double()
    weights = _gaussian(window_that_fits(x.shape[2:]), x)
    mean_x, mean_y, of_xx, of_yy, of_xy = (_averaged(part, weights) for part in (x, y, x * x, y * y, x * y))
    var_x, var_y, cov = of_xx - mean_x**2, of_yy - mean_y**2, of_xy - mean_x * mean_y
    c1, c2 = (K1 * (levels - 1)) ** 2, (K2 * (levels - 1)) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return (luminance * (2 * cov + c2) / (var_x + var_y + c2)).flatten(1).mean(1)


def window_that_fits(size: tuple[int, ...]) -> int:
    """Side of the window for images of that height and width."""
    return min(WINDOW, min(size) - (min(size) + 1) % 2)


def _gaussian(side: int, like: Tensor) -> Tensor:
    """[side], of sum 1."""
    distance = torch.arange(side, dtype=like.dtype, device=like.device) - side // 2
    weights = torch.exp(-0.5 * (distance / SIGMA) ** 2)
    return weights / weights.sum()


def _averaged(images: Tensor, weights: Tensor) -> Tensor:
    """Weighted means of [N, C, H, W] over all windows within: [N, C, H - side + 1, W - side + 1]."""
    rows = images.flatten(0, 1).unsqueeze(1)
    return F.conv2d(F.conv2d(rows, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1)).unflatten(0, images.shape[:2])
