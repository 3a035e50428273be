"""A nonlinear field and points: what the tests of likelihoods share."""

import torch

WEIGHT = torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 2


def velocity(x, t):
    """A nonlinear field that mixes six elements; t is a number or [B]."""
    t = torch.as_tensor(t, dtype=x.dtype).reshape(-1, 1)
    return (torch.tanh(x.reshape(len(x), 6) @ WEIGHT.to(x.dtype) * (1 + t)) - t * x.reshape(len(x), 6)).reshape(x.shape)


def points(*shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)
