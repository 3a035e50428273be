"""What the tests of solvers and likelihoods share: a smooth nonlinear field with known density, and a solver of their own."""

import math

import torch

from fm_fast import testing

WIDE = torch.float64


class Linear:
    """OT again, as somebody else would write a path."""

    def alpha(self, t):
        return t

    def sigma(self, t):
        return 1 - t

    def d_alpha(self, t):
        return torch.ones_like(t)

    def d_sigma(self, t):
        return -torch.ones_like(t)


def mixture(path="ot"):
    """Four clusters in the plane, smooth enough for 32 steps to be in the asymptotic range of every method."""
    means = torch.tensor([[1.5, 0.0], [0.0, 1.5], [-1.5, 0.0], [0.0, -1.0]], dtype=WIDE)
    return testing.GaussianMixture(torch.tensor([0.1, 0.2, 0.3, 0.4]), means, torch.tensor([0.55, 0.6, 0.5, 0.55]), path)


def images(size=4, channels=1):
    """A mixture of three clusters of images [channels, size, size]."""
    means = torch.randn(3, channels, size, size, generator=torch.Generator().manual_seed(1), dtype=WIDE)
    return testing.GaussianMixture(torch.tensor([0.2, 0.3, 0.5]), means, torch.tensor([0.5, 0.6, 0.7]))


def solve(field, x, start, end, steps):
    """Classical Runge-Kutta of order four for dx/dt = field(x, t)."""
    h = (end - start) / steps
    for n in range(steps):
        t = start + n * h
        k1 = field(x, t)
        k2 = field(x + h / 2 * k1, t + h / 2)
        k3 = field(x + h / 2 * k2, t + h / 2)
        k4 = field(x + h * k3, t + h)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


def log_normal(x, scale=1.0):
    """Log-density [B] of N(0, scale^2 I)."""
    flat = x.flatten(1) / scale
    return -0.5 * (flat.square() + math.log(2 * math.pi) + 2 * math.log(scale)).sum(1)


def rms(x):
    return float(x.square().mean().sqrt())
