"""A small network, its gradients and averages: what the tests of AdamWEMA share."""

import torch
from torch import nn

from fm_fast.train.optimiser.averaging import power_function, warmed_up_decay

HALF_TYPES = [torch.bfloat16, torch.float16]
AVERAGES = (warmed_up_decay(0.95), power_function(3.0))


def network(dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(4 * 36, 2))
    return layers.to(dtype)


def gradients(model, step, scale=1.0):
    """Fill the gradients with numbers that depend on the step only."""
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = torch.empty_like(p).copy_(scale * torch.randn(p.shape, generator=generator))


def backward(model, step):
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step))
    loss = model(x.to(next(model.parameters()).dtype)).float().square().mean()
    loss.backward()
    return loss.detach()


# 16-bit weights that others write


def half_steps(model, optimiser, steps):
    for step in steps:
        gradients(model, step)
        optimiser.step()
