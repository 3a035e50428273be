"""Plain PyTorch sampling for the trainer's pictures and its quality report: Euler or midpoint on a uniform grid, with guidance.

The loop a fused solver replaces: only `sample` is called from elsewhere.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fm_fast.objectives import velocity_coefficients
from fm_fast.paths import prior_scale
from fm_fast.random import noise
from fm_fast.train.config import Recipe

Velocity = Callable[[Tensor, float], Tensor]


def starting_noise(shape: tuple[int, ...], recipe: Recipe, seed: int, index: int, device: torch.device) -> Tensor:
    """Noise of the path's prior, float32. `index` >= 1 keeps the draws apart from those of training, which have index 0."""
    return prior_scale(recipe.path) * noise(shape, seed=seed, step=0, stream="x0", index=index, device=device)


@torch.no_grad()
def sample(
    model: nn.Module, x0: Tensor, labels: Tensor, recipe: Recipe, steps: int, method: str = "midpoint", guidance: float = 1.0
) -> Tensor:
    """Integrate dx/dt = v(x, t) from noise x0 [B, ...] at t = 0 to data at t = 1; float32 of x0's shape.

    labels: int64 [B]. guidance w: v = v_u + w (v_c - v_u), with v_u for the null class; 1 evaluates the conditional network only.
    """
    velocity = _velocity(model, labels, recipe, guidance)
    x, width = x0.float(), 1.0 / steps
    for step in range(steps):
        time = step * width
        slope = velocity(x, time)
        if method == "midpoint":
            slope = velocity(x + 0.5 * width * slope, time + 0.5 * width)
        x = x + width * slope
    return x


def _velocity(model: nn.Module, labels: Tensor, recipe: Recipe, guidance: float) -> Velocity:
    def output(x: Tensor, t: float) -> Tensor:
        times = torch.full((len(x),), t, device=x.device)
        if guidance == 1.0:
            return model(x, times, y=labels).float()
        both = torch.cat([labels, torch.full_like(labels, -1)])
        conditional, unconditional = model(x.repeat(2, 1, 1, 1), times.repeat(2), y=both).float().chunk(2)
        # The velocity is linear in the output, so that mixing the outputs mixes the velocities.
        return unconditional + guidance * (conditional - unconditional)

    def velocity(x: Tensor, t: float) -> Tensor:
        x_factor, output_factor = velocity_coefficients(recipe.path, recipe.objective, t)
        return x_factor * x + output_factor * output(x, t)

    return velocity


def to_integers(y: Tensor, levels: int) -> Tensor:
    """Undo the data map y = 2 (x + 1/2) / levels - 1: the nearest level in 0..levels-1, uint8."""
    return ((y + 1.0) * (levels / 2.0)).floor().clamp(0, levels - 1).to(torch.uint8)
