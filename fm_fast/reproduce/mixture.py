"""Small images whose flow is known exactly: a mixture of 256 smooth 8x8 pictures, each blurred by a little noise."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fm_fast.objectives import Schedule
from fm_fast.random import noise
from fm_fast.testing import GaussianMixture

SIZE = 8
CENTRES = 256
COMPONENT_SD = 0.02
BLOBS = 3


@dataclass(frozen=True, eq=False)
class FastMixture(GaussianMixture):
    """:class:`fm_fast.testing.GaussianMixture` by matrix products: O(B K) memory, not O(B K D), and as many times faster."""

    def _data_and_score(self, x: Tensor, p: Schedule) -> tuple[Tensor, Tensor]:
        centres, variances = self.centres.to(x.device), self.stds.to(x.device) ** 2
        spread = p.a**2 * variances + p.s**2
        squares = x.square().sum(1, keepdim=True) - 2.0 * p.a * (x @ centres.T) + p.a**2 * centres.square().sum(1)
        log_joint = self.weights.to(x.device).log() - 0.5 * (squares / spread + self.dimension * spread.log())
        posterior = torch.softmax(log_joint, dim=1)
        pull = posterior / spread
        score = p.a * (pull @ centres) - pull.sum(1, keepdim=True) * x
        shrunk = pull * variances
        data = posterior @ centres + p.a * (shrunk.sum(1, keepdim=True) * x - p.a * (shrunk @ centres))
        return data, score


def blob_images(count: int, draw: int) -> Tensor:
    """Smooth pictures in [-1, 1], float64 [count, 64]: three bumps of random place, width and sign each; a function of `draw`."""
    u = noise((count, BLOBS * 4), seed=draw, step=0, index=4, kind="uniform", dtype=torch.float64).reshape(count, BLOBS, 4)
    place, width, height = (SIZE - 1) * u[..., :2], 1.0 + 1.5 * u[..., 2], 2.0 * u[..., 3] - 1.0
    axis = torch.arange(SIZE, dtype=torch.float64)
    rows, columns = (-0.5 * ((axis - place[..., i, None]) / width[..., None]) ** 2 for i in (0, 1))
    bumps = height[..., None, None] * torch.exp(rows[..., :, None] + columns[..., None, :])
    images = bumps.sum(1).flatten(1)
    return images / images.abs().amax(1, keepdim=True)


def image_mixture(draw: int, path: str) -> FastMixture:
    """The exact flow of data set number `draw` along a path."""
    weights, stds = torch.ones(CENTRES, dtype=torch.float64), torch.full((CENTRES,), COMPONENT_SD, dtype=torch.float64)
    return FastMixture(weights, blob_images(CENTRES, draw), stds, path)
