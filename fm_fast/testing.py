"""Closed-form velocity fields, with which solvers, likelihoods and networks can be tested without training anything.

Each oracle is a model: ``oracle(x, t, **cond)`` is its velocity for x [B, ...] of D elements a sample and t a number, [] or [B]; the
condition is ignored. They compute in float64, answer in the dtype of x on its device, and can be differentiated more than once.

* :class:`LinearField`: u = A x + b, whose flow is a matrix exponential and whose divergence is constant.
* :class:`GaussianToGaussian`: data N(m, C) under any path; the flow map is affine, the Jacobian symmetric and the same for all x.
* :class:`StationaryImages`: the same for images with a 1/f^2 spectrum and correlated channels, where C is too large to write down.
* :class:`GaussianMixture`: data from a mixture under any path: nonlinear, with everything known but the flow map.

The last three give the exact output for every objective: ``oracle.model("noise")`` is E[x0 | x_t], for ``objective="noise"``.
Past a path's own limits, as on VP at t = 1, there is a density but no finite velocity.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from types import MappingProxyType

import torch
from torch import Tensor

from fm_fast import _checks
from fm_fast._path_check import check_path
from fm_fast.objectives import Objective, Schedule, as_objective, schedule
from fm_fast.paths import Path, as_path
from fm_fast.random import Whole, noise

__all__ = ["ORDER_TOLERANCE", "GaussianMixture", "GaussianToGaussian", "LinearField", "StationaryImages", "check_path", "observed_order"]

Time = float | Tensor
ORDER_TOLERANCE: Mapping[int, float] = MappingProxyType({1: 0.1, 2: 0.1, 3: 0.15, 4: 0.2})
"""How far :func:`observed_order` may lie from an order, for steps from 32 to 256."""


def observed_order(errors: Sequence[float], steps: Sequence[int]) -> float:
    """The order p of a method whose error falls as steps^-p, from the two finest of at least two solves.

    Raises ValueError unless steps increase and every error is positive and finite.
    """
    if len(errors) != len(steps) or len(steps) < 2 or any(fine <= coarse for coarse, fine in pairwise(steps)):
        raise ValueError(f"steps must be two or more increasing counts, one an error, got {list(steps)} for {len(errors)} errors")
    if not all(0.0 < error < math.inf for error in errors):
        raise ValueError(f"errors must be positive and finite, got {list(errors)}; a method that is exact shows no order")
    return math.log(errors[-2] / errors[-1]) / math.log(steps[-1] / steps[-2])


def _flat(x: Tensor, dimension: int) -> Tensor:
    """x [B, ...] as float64 [B, D]."""
    _checks.tensor("x", x)
    if x.dim() == 0 or math.prod(x.shape[1:]) != dimension:
        raise ValueError(f"x must be [B, ...] with {dimension} elements a sample, got shape {tuple(x.shape)}")
    return x.reshape(x.shape[0], dimension).to(torch.float64)


def _times(t: Time, x: Tensor) -> Tensor:
    return torch.as_tensor(t, dtype=torch.float64, device=x.device).expand(x.shape[0])


def _log_normal(squares: Tensor, variance: Tensor) -> Tensor:
    """Log-density of independent centred normals, summed over the last dimension, from the squares of their values."""
    return -0.5 * (squares / variance + torch.log(2.0 * math.pi * variance)).sum(-1)


def _store(oracle: object, **values: Tensor) -> None:
    """Sets fields of a frozen dataclass while it is made, as float64."""
    for name, value in values.items():
        object.__setattr__(oracle, name, torch.as_tensor(value, dtype=torch.float64))


@dataclass(frozen=True, eq=False)
class LinearField:
    """Velocity A x + b, which carries N(0, I) at t = 0 to another normal: matrix [D, D], offset [D].

    Naive equivalent: ``x @ A.T + b``.
    """

    matrix: Tensor
    offset: Tensor

    def __post_init__(self) -> None:
        _store(self, matrix=self.matrix, offset=self.offset)
        if self.offset.dim() != 1 or self.matrix.shape != (self.dimension, self.dimension):
            raise ValueError(f"matrix must be [D, D] and offset [D], got {tuple(self.matrix.shape)} and {tuple(self.offset.shape)}")

    @property
    def dimension(self) -> int:
        return self.offset.numel()

    def __call__(self, x: Tensor, t: Time, **cond: object) -> Tensor:
        return self.velocity(x, t)

    def velocity(self, x: Tensor, t: Time) -> Tensor:
        """A x + b, shaped like x; the same at every time."""
        values = _flat(x, self.dimension) @ self.matrix.to(x.device).T + self.offset.to(x.device)
        return values.reshape(x.shape).to(x.dtype)

    def divergence(self, x: Tensor, t: Time) -> Tensor:
        """The trace of A, [B]."""
        return self.matrix.to(x.device).trace().expand(x.shape[0]).to(x.dtype)

    def flow(self, x: Tensor, start: Time, end: Time) -> Tensor:
        """Where x at time ``start`` is at time ``end``: exp(A (end - start)) x and the offset's part, exact (equation 1)."""
        generator = torch.zeros(self.dimension + 1, self.dimension + 1, dtype=torch.float64, device=x.device)
        generator[:-1] = torch.cat([self.matrix, self.offset[:, None]], dim=1).to(x.device)
        exponential = torch.matrix_exp((_times(end, x) - _times(start, x))[:, None, None] * generator)
        moved = (exponential[:, :-1, :-1] @ _flat(x, self.dimension)[..., None])[..., 0] + exponential[:, :-1, -1]
        return moved.reshape(x.shape).to(x.dtype)

    def log_prob(self, x: Tensor, t: Time = 1.0) -> Tensor:
        """Log-density at time t of the transported standard normal, [B] (equation 4)."""
        start = _flat(self.flow(x.to(torch.float64), t, 0.0), self.dimension)
        log_start = _log_normal(start.square(), torch.ones_like(start))
        return (log_start - _times(t, x) * self.matrix.to(x.device).trace()).to(x.dtype)


class _PathField:
    """What the oracles of a path share: all outputs follow from E[x1 | x_t] and the score, with no division by zero."""

    path: str | Path

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a sample."""
        raise NotImplementedError

    @property
    def dimension(self) -> int:
        return math.prod(self.shape)

    def __call__(self, x: Tensor, t: Time, **cond: object) -> Tensor:
        return self.velocity(x, t)

    def _data_and_score(self, x: Tensor, p: Schedule) -> tuple[Tensor, Tensor]:
        """E[x1 | x_t = x] and the gradient of log p_t at x, float64 [B, D], from x float64 [B, D] and the path [B, 1]."""
        raise NotImplementedError

    def model(self, objective: str | Objective) -> Callable[..., Tensor]:
        """The best network for this objective, as a model(x, t, **cond)."""
        chosen = as_objective(objective)
        return functools.partial(self._output_for, chosen)

    def _output_for(self, objective: Objective, x: Tensor, t: Time, **cond: object) -> Tensor:
        return self.output(objective, x, t)

    def velocity(self, x: Tensor, t: Time) -> Tensor:
        """The marginal velocity u_t(x), shaped like x (equation 8)."""
        return self.output("velocity", x, t)

    def score(self, x: Tensor, t: Time) -> Tensor:
        """The gradient of log p_t at x, shaped like x."""
        return self.output("score", x, t)

    def output(self, objective: str | Objective, x: Tensor, t: Time) -> Tensor:
        """What the best network for this objective answers, x's shape: u_t, E[x0 | x_t], the score or E[x1 | x_t]."""
        flat, p = _flat(x, self.dimension), self._schedule(x, t)
        data, score = self._data_and_score(flat, p)
        velocity, source = p.da * data - p.ds * p.s * score, -p.s * score
        values = {"velocity": velocity, "noise": source, "score": score, "scoreflow": score, "data": data}[as_objective(objective).name]
        return values.reshape(x.shape).to(x.dtype)

    def sample(self, count: int, t: float = 1.0, *, seed: Whole, step: Whole = 0) -> Tensor:
        """Samples of p_t, float64 [count, ...]: indices 1 and 2 of the noise contract's stream "x0", independent of index 0."""
        z = noise((count, self.dimension), seed=seed, step=step, index=1, dtype=torch.float64)
        u = noise((count, 1), seed=seed, step=step, index=2, kind="uniform", dtype=torch.float64)
        return self._draw(z, u, self._schedule(z, t)).reshape(count, *self.shape)

    def _draw(self, z: Tensor, u: Tensor, p: Schedule) -> Tensor:
        raise NotImplementedError

    def _schedule(self, x: Tensor, t: Time) -> Schedule:
        return schedule(as_path(self.path), _times(t, x)[:, None])


class _GaussianField(_PathField):
    """Data N(m, C) with C known by its eigenvalues: p_t = N(alpha m, alpha^2 C + sigma^2 I), and all is a function of C."""

    mean: Tensor
    eigenvalues: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.mean.shape)

    def _moments(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The mean and the eigenvalues of C, each [D]."""
        return self.mean.reshape(-1).to(device), self.eigenvalues.reshape(-1).to(device)

    def _apply(self, factors: Tensor, x: Tensor) -> Tensor:
        """The product of x [B, D] with the matrix that has C's eigenvectors and these eigenvalues, [D] or [B, D]."""
        raise NotImplementedError

    def _data_and_score(self, x: Tensor, p: Schedule) -> tuple[Tensor, Tensor]:
        mean, eigenvalues = self._moments(x.device)
        slope = self._apply(1.0 / (p.a**2 * eigenvalues + p.s**2), x - p.a * mean)
        return mean + p.a * self._apply(eigenvalues, slope), -slope

    def _variance_and_rates(self, x: Tensor, p: Schedule) -> tuple[Tensor, Tensor]:
        """Eigenvalues of the covariance of p_t and of the velocity's Jacobian, float64 [B, D]."""
        eigenvalues = self._moments(x.device)[1]
        variance = p.a**2 * eigenvalues + p.s**2
        return variance, (p.da * p.a * eigenvalues + p.ds * p.s) / variance

    def divergence(self, x: Tensor, t: Time) -> Tensor:
        """Divergence of the velocity, [B]; the same at every x."""
        return self._variance_and_rates(x, self._schedule(x, t))[1].sum(1).to(x.dtype)

    def jacobian(self, t: float, rows: Sequence[int] | None = None) -> Tensor:
        """Jacobian of the velocity at time t: float64 [D, D], or [len(rows), D]; symmetric, and the same at every x."""
        chosen = torch.arange(self.dimension) if rows is None else torch.tensor(rows)
        unit = (chosen[:, None] == torch.arange(self.dimension)).to(torch.float64)
        return self._apply(self._variance_and_rates(unit, self._schedule(unit, t))[1], unit)

    def flow(self, x: Tensor, start: Time, end: Time) -> Tensor:
        """Where x at time ``start`` is at time ``end``, exact: an affine map between the two normals (equation 1)."""
        before, after = self._schedule(x, start), self._schedule(x, end)
        scale = torch.sqrt(self._variance_and_rates(x, after)[0] / self._variance_and_rates(x, before)[0])
        mean, _ = self._moments(x.device)
        return (after.a * mean + self._apply(scale, _flat(x, self.dimension) - before.a * mean)).reshape(x.shape).to(x.dtype)

    def log_prob(self, x: Tensor, t: Time = 1.0) -> Tensor:
        """log p_t(x), [B]; at t = 1 the data's own where the path ends at the data."""
        p, (mean, _) = self._schedule(x, t), self._moments(x.device)
        centred, variance = _flat(x, self.dimension) - p.a * mean, self._variance_and_rates(x, p)[0]
        distances = centred * self._apply(1.0 / variance, centred)
        return -0.5 * (distances + torch.log(2.0 * math.pi * variance)).sum(1).to(x.dtype)

    def _draw(self, z: Tensor, u: Tensor, p: Schedule) -> Tensor:
        return p.a * self._moments(z.device)[0] + self._apply(torch.sqrt(self._variance_and_rates(z, p)[0]), z)


@dataclass(frozen=True, eq=False)
class GaussianToGaussian(_GaussianField):
    """Data N(mean, covariance) under any path: mean [...] of D elements, covariance [D, D], symmetric and positive definite.

    Naive equivalent: u = alpha' m + (alpha' alpha C + sigma' sigma I) (alpha^2 C + sigma^2 I)^-1 (x - alpha m).
    """

    mean: Tensor
    covariance: Tensor
    path: str | Path = "ot"
    eigenvalues: Tensor = field(init=False, repr=False)
    basis: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        as_path(self.path)
        _store(self, mean=self.mean, covariance=self.covariance)
        if self.covariance.shape != (self.dimension, self.dimension) or not torch.equal(self.covariance, self.covariance.T):
            raise ValueError(f"covariance must be symmetric, [{self.dimension}, {self.dimension}], got {tuple(self.covariance.shape)}")
        eigenvalues, basis = torch.linalg.eigh(self.covariance)
        if not float(eigenvalues.min()) > 0.0:
            raise ValueError(f"covariance must be positive definite, got the eigenvalue {float(eigenvalues.min())}")
        _store(self, eigenvalues=eigenvalues, basis=basis)

    def _apply(self, factors: Tensor, x: Tensor) -> Tensor:
        return (x @ self.basis.to(x.device) * factors) @ self.basis.T.to(x.device)


@dataclass(frozen=True, eq=False)
class StationaryImages(_GaussianField):
    """Images [channels, size, size] on a torus, normal with mean 0, a 1/f^2 power spectrum and equally correlated channels, under any path.

    A stand-in for natural images whose Jacobian is known exactly: by stationarity its rows for one pixel of each channel tell all of it.
    """

    size: int = 32
    channels: int = 3
    correlation: float = 0.8
    variance: float = 0.25
    path: str | Path = "ot"
    mean: Tensor = field(init=False, repr=False)
    eigenvalues: Tensor = field(init=False, repr=False)
    channel_basis: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        as_path(self.path)
        _checks.count("size", self.size)
        _checks.count("channels", self.channels)
        _checks.positive_number("variance", self.variance)
        if not 0.0 <= _checks.finite_number("correlation", self.correlation) < 1.0:
            raise ValueError(f"correlation must lie in [0, 1), got {self.correlation}")
        frequency = torch.fft.fftfreq(self.size, 1.0 / self.size, dtype=torch.float64)
        power = 1.0 / (frequency[:, None] ** 2 + frequency**2).clamp_min(1.0)
        between = torch.full((self.channels, self.channels), self.correlation, dtype=torch.float64).fill_diagonal_(1.0)
        shares, basis = torch.linalg.eigh(between)
        eigenvalues = shares[:, None, None] * (self.variance * power / power.mean())
        _store(self, mean=torch.zeros_like(eigenvalues), eigenvalues=eigenvalues, channel_basis=basis)

    def _apply(self, factors: Tensor, x: Tensor) -> Tensor:
        if x.shape[0] == 0:  # the transform of nothing is an error
            return x
        basis = self.channel_basis.to(x.device)
        modes = torch.fft.fft2(torch.einsum("dc,bdhw->bchw", basis, x.unflatten(1, self.shape)))
        mixed = torch.fft.ifft2(modes * factors.unflatten(-1, self.shape)).real
        return torch.einsum("cd,bdhw->bchw", basis, mixed).reshape(x.shape)


@dataclass(frozen=True, eq=False)
class GaussianMixture(_PathField):
    """Data from a mixture of spherical normals under any path: weights [K], means [K, ...] of D elements each, stds [K], all positive.

    The weights are scaled to sum to one. The velocity is the components' own, weighted by their posterior probabilities (equation 8):
    u = sum_k r_k (alpha' m_k + (alpha' alpha s_k^2 + sigma' sigma) / (alpha^2 s_k^2 + sigma^2) (x - alpha m_k)).
    """

    weights: Tensor
    means: Tensor
    stds: Tensor
    path: str | Path = "ot"
    centres: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        as_path(self.path)
        _store(self, weights=self.weights, means=self.means, stds=self.stds)
        if self.weights.dim() != 1 or self.stds.shape != self.weights.shape or self.means.shape[:1] != self.weights.shape:
            shapes = [tuple(value.shape) for value in (self.weights, self.means, self.stds)]
            raise ValueError(f"weights must be [K], means [K, ...] and stds [K], got shapes {shapes}")
        if not bool((self.weights > 0).all()) or not bool((self.stds > 0).all()):
            raise ValueError(f"weights and stds must be positive, got {self.weights.tolist()} and {self.stds.tolist()}")
        _store(self, weights=self.weights / self.weights.sum(), centres=self.means.reshape(-1, self.dimension))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.means.shape[1:])

    def _components(self, x: Tensor, p: Schedule) -> tuple[Tensor, Tensor, Tensor]:
        """The components' variances [B, K], negative scores [B, K, D] and log joint densities [B, K] at x, float64 [B, D]."""
        variance = (p.a * self.stds.to(x.device)) ** 2 + p.s**2
        offset = x[:, None] - p.a[..., None] * self.centres.to(x.device)
        log_joint = _log_normal(offset.square(), variance[..., None]) + self.weights.to(x.device).log()
        return variance, offset / variance[..., None], log_joint

    def _data_and_score(self, x: Tensor, p: Schedule) -> tuple[Tensor, Tensor]:
        _, slopes, log_joint = self._components(x, p)
        posterior = torch.softmax(log_joint, dim=1)[..., None]
        means = self.centres.to(x.device) + (p.a * self.stds.to(x.device) ** 2)[..., None] * slopes
        return (posterior * means).sum(1), -(posterior * slopes).sum(1)

    def divergence(self, x: Tensor, t: Time) -> Tensor:
        """Divergence of the velocity, [B]: that of each component, and of the posterior probabilities, whose gradient is r_k (g_k - g)."""
        flat, p = _flat(x, self.dimension), self._schedule(x, t)
        variance, slopes, log_joint = self._components(flat, p)
        posterior = torch.softmax(log_joint, dim=1)
        rates = (p.da * p.a * self.stds.to(x.device) ** 2 + p.ds * p.s) / variance
        velocities = p.da[..., None] * self.centres.to(x.device) + (rates * variance)[..., None] * slopes
        pulls = (posterior[..., None] * slopes).sum(1, keepdim=True) - slopes
        return (posterior * (self.dimension * rates + (velocities * pulls).sum(-1))).sum(1).to(x.dtype)

    def log_prob(self, x: Tensor, t: Time = 1.0) -> Tensor:
        """log p_t(x), [B]; at t = 1 the data's own where the path ends at the data."""
        log_joint = self._components(_flat(x, self.dimension), self._schedule(x, t))[2]
        return torch.logsumexp(log_joint, dim=1).to(x.dtype)

    def _draw(self, z: Tensor, u: Tensor, p: Schedule) -> Tensor:
        chosen = torch.searchsorted(self.weights.cumsum(0), u[:, 0]).clamp_max(len(self.weights) - 1)
        return p.a * self.centres[chosen] + torch.sqrt((p.a * self.stds[chosen, None]) ** 2 + p.s**2) * z
