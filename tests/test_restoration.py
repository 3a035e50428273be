"""PSNR and SSIM: against loops over windows in float64, and where the answer is known."""

import numpy as np
import pytest
import torch

from fm_fast.train.condition import reduced
from fm_fast.train.evaluation.restoration import bicubic, likeness, restoration, similarity, window_that_fits
from fm_fast.train.evaluation.sample import to_integers


def pictures(count, channels, height, width, levels=256, seed=0):
    return torch.randint(0, levels, (count, channels, height, width), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def by_loops(one, other, levels, side):
    """Wang et al. (2004), window by window, of one channel: float64 [H, W] each."""
    axis = np.arange(side) - (side - 1) / 2
    weights = np.exp(-(axis[:, None] ** 2 + axis[None, :] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    c1, c2, found = (0.01 * (levels - 1)) ** 2, (0.03 * (levels - 1)) ** 2, []
    for top in range(one.shape[0] - side + 1):
        for left in range(one.shape[1] - side + 1):
            x, y = (image[top : top + side, left : left + side] for image in (one, other))
            mx, my = (weights * x).sum(), (weights * y).sum()
            vx, vy, cov = (weights * (x - mx) ** 2).sum(), (weights * (y - my) ** 2).sum(), (weights * (x - mx) * (y - my)).sum()
            found.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    return float(np.mean(found))


@pytest.mark.parametrize(
    ("shape", "levels", "side"), [((2, 3, 20, 14), 256, 11), ((2, 1, 11, 12), 17, 11), ((3, 2, 8, 8), 17, 7), ((2, 1, 2, 3), 5, 1)]
)
def test_similarity_is_that_of_its_definition(shape, levels, side):
    one, noise = pictures(*shape, levels), pictures(*shape, levels, seed=1)
    other = torch.where(noise > levels // 2, one, noise)
    assert window_that_fits(shape[2:]) == side
    pairs = [
        [by_loops(x.astype(float), y.astype(float), levels, side) for x, y in zip(*images, strict=True)]
        for images in zip(one.numpy(), other.numpy(), strict=True)
    ]
    np.testing.assert_allclose(similarity(one, other, levels).numpy(), np.mean(pairs, axis=1), rtol=1e-10, atol=1e-12)


def test_similarity_where_it_is_known():
    one, other = pictures(4, 3, 16, 16), pictures(4, 3, 16, 16, seed=1)
    assert similarity(one, one, 256).tolist() == pytest.approx([1.0] * 4, abs=1e-12)
    torch.testing.assert_close(similarity(one, other, 256), similarity(other, one, 256), rtol=1e-12, atol=0.0)
    assert float(similarity(one, other, 256).abs().max()) < 0.2, "independent noise"
    assert float(similarity(one, 255 - one, 256).max()) < -0.5, "a negative is anticorrelated"


def test_similarity_of_constant_images_is_the_luminance_term():
    levels, a, b = 17, 4.0, 10.0
    one, other = (torch.full((1, 2, 12, 12), value, dtype=torch.uint8) for value in (int(a), int(b)))
    c1 = (0.01 * 16) ** 2
    assert float(similarity(one, other, levels)) == pytest.approx((2 * a * b + c1) / (a * a + b * b + c1), rel=1e-12)


def test_means_are_over_all_images_in_any_chunk(monkeypatch):
    one, other = pictures(5, 1, 12, 12), pictures(5, 1, 12, 12, seed=1)
    whole = likeness(one, other, 256)
    monkeypatch.setattr("fm_fast.train.evaluation.restoration.CHUNK", 2)
    assert likeness(one, other, 256) == whole
    assert whole.ssim == pytest.approx(float(similarity(one, other, 256).mean()))


def test_a_restoration_is_compared_with_interpolation():
    """Of a ramp, which interpolation restores but for its ends, and samples that are the originals."""
    ramp = torch.arange(0, 240, 10, dtype=torch.uint8).expand(3, 1, 24, 24)
    found = restoration(ramp, ramp, 256, 2)
    assert found.samples.ssim == pytest.approx(1.0) and found.samples.psnr == pytest.approx(20 * np.log10(510)) and found.window == 11
    assert 0.9 < found.bicubic.ssim < 1.0 and 30.0 < found.bicubic.psnr < found.samples.psnr
    interpolated = to_integers(bicubic(reduced(ramp, 256, 2), (24, 24)), 256)
    assert likeness(interpolated, ramp, 256) == found.bicubic
