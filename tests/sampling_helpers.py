"""Solvers and velocities written out by hand in float64, which share no code with fm_fast: what sampling is compared with."""

import itertools
import math

import numpy as np
import torch

FIXED = ("euler", "midpoint", "heun2", "ralston", "rk4", "rk4_38", "ab2", "ab3")


def euler(f, x, t, h):
    return x + h * f(x, t)


def midpoint(f, x, t, h):
    return x + h * f(x + h / 2 * f(x, t), t + h / 2)


def heun2(f, x, t, h):
    first = f(x, t)
    return x + h / 2 * (first + f(x + h * first, t + h))


def ralston(f, x, t, h):
    first = f(x, t)
    return x + h * (first / 4 + 3 / 4 * f(x + 2 / 3 * h * first, t + 2 / 3 * h))


def rk4(f, x, t, h):
    k1 = f(x, t)
    k2 = f(x + h / 2 * k1, t + h / 2)
    k3 = f(x + h / 2 * k2, t + h / 2)
    k4 = f(x + h * k3, t + h)
    return x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


def rk4_38(f, x, t, h):
    k1 = f(x, t)
    k2 = f(x + h / 3 * k1, t + h / 3)
    k3 = f(x + h * (k2 - k1 / 3), t + 2 * h / 3)
    k4 = f(x + h * (k1 - k2 + k3), t + h)
    return x + h / 8 * (k1 + 3 * k2 + 3 * k3 + k4)


def kutta3(f, x, t, h):
    k1 = f(x, t)
    k2 = f(x + h / 2 * k1, t + h / 2)
    return x + h / 6 * (k1 + 4 * k2 + f(x + h * (2 * k2 - k1), t + h))


ONE_STEP = {f.__name__: f for f in (euler, midpoint, heun2, ralston, rk4, rk4_38)}


def lagrange_integral(times, start, end):
    """The integrals from start to end of the Lagrange polynomials of the times."""
    weights = []
    for i, ti in enumerate(times):
        others = [t for j, t in enumerate(times) if j != i]
        polynomial = np.poly1d(others, r=True) / math.prod(ti - t for t in others)
        antiderivative = polynomial.integ()
        weights.append(antiderivative(end) - antiderivative(start))
    return weights


def solve(method, f, x, nodes):
    """x at the last of the nodes, rising or falling."""
    nodes = [float(t) for t in nodes]
    if method in ONE_STEP:
        for begin, end in itertools.pairwise(nodes):
            x = ONE_STEP[method](f, x, begin, end - begin)
        return x
    history, start = {"ab2": (2, midpoint), "ab3": (3, kutta3)}[method]
    slopes = []
    for n in range(len(nodes) - 1):
        begin, end = nodes[n], nodes[n + 1]
        slopes.append(f(x, begin))
        if n < history - 1:
            x = start(f, x, begin, end - begin)
        else:
            weights = lagrange_integral(nodes[n - history + 1 : n + 1], begin, end)
            x = x + sum(w * k for w, k in zip(weights, slopes[-history:], strict=True))
    return x


def schedule(path, t):
    """(alpha, sigma, alpha', sigma') of a path at a number t."""
    if path == "ot":
        return t, 1 - t, 1.0, -1.0
    if path == "cosine":
        angle = math.pi * t / 2
        return math.sin(angle), math.cos(angle), math.pi / 2 * math.cos(angle), -math.pi / 2 * math.sin(angle)
    if path == "ve":
        sigma = 50.0 * (0.01 / 50.0) ** t
        return 1.0, sigma, 0.0, math.log(0.01 / 50.0) * sigma
    s = 1 - t
    integral, beta = 0.1 * s + 9.95 * s * s, 0.1 + 19.9 * s
    alpha = math.exp(-integral / 2)
    sigma = math.sqrt(-math.expm1(-integral))
    return alpha, sigma, beta / 2 * alpha, -alpha * alpha * beta / 2 / sigma


def velocity_of(path, objective, output, x, t):
    """The flow's velocity alpha' x1 + sigma' x0, from the network's guess of x1 or x0."""
    a, s, da, ds = schedule(path, t)
    if objective == "velocity":
        return output
    if objective == "data":
        return da * output + ds * (x - a * output) / s
    source = output if objective == "noise" else -s * output
    return da * (x - s * source) / a + ds * source


def network(x, t, **cond):
    """A smooth nonlinear stand-in for a network that mixes the elements of a sample; t is a number or [B]."""
    t = torch.as_tensor(t, dtype=x.dtype).reshape(-1, *[1] * (x.dim() - 1))
    mean = x.flatten(1).mean(1).reshape(-1, *[1] * (x.dim() - 1)) if x.dim() > 1 else x
    return torch.sin(2 * x) * (1 + t) - x * torch.cos(3 * t) + 0.5 * mean


def noise64(*shape):
    """Numbers without a random generator, float64, of the size of noise."""
    return torch.sin(torch.arange(1, 1 + math.prod(shape), dtype=torch.float64) * 12.9898).mul(2).reshape(shape)


class Counted:
    """A model that counts its calls and remembers the times and sizes it was called with."""

    def __init__(self, model=network):
        self.model, self.times, self.batches = model, [], []

    def __call__(self, x, t, **cond):
        self.times.append(float(t[0]) if len(t) else None)
        self.batches.append(len(x))
        return self.model(x, t, **cond)
