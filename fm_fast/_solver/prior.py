"""The density that a likelihood starts from: the path's own normal distribution, or what the caller gave, checked before the solve."""

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import Distribution

from fm_fast import _modes, reference
from fm_fast._codes import PathCode
from fm_fast.objectives import schedule
from fm_fast.paths import Path, kernel_form, prior_scale, time_limits

Prior = Callable[[Tensor], Tensor]
LATE = 0.03  # of a standard deviation: alpha / sigma more than at the path's start, or log sigma less; or alpha / sigma there
ENOUGH = 32  # numbers, whose root mean square is then within a third of what it should be


def as_prior(prior: Prior | Distribution | None) -> Prior | None:
    """The prior as a function; TypeError for what is none."""
    function = prior.log_prob if isinstance(prior, Distribution) else prior
    if function is not None and not callable(function):
        raise TypeError(f"prior must be callable as prior(x) with x [B, ...], returning log-densities [B], got {type(prior).__name__}")
    return function


def tried_prior(prior: Prior | Distribution | None, x: Tensor) -> Prior | None:
    """The same, tried on data x [B, ...]: ValueError for a wrong shape now instead of after the solve."""
    function = as_prior(prior)
    if function is None:
        return None
    try:
        with torch.no_grad():
            density = function(x.detach().to(reference.accumulation_dtype(x)))
    except Exception:  # data may lie where the prior has no density; the noise need not
        return function
    check_density("prior", density, x.shape[0])
    return function


def check_density(name: str, density: object, batch: int) -> None:
    """ValueError if what the function ``name`` returned is not one log-density a sample."""
    if isinstance(density, Tensor) and density.shape == (batch,):
        return
    found = tuple(density.shape) if isinstance(density, Tensor) else type(density).__name__
    each = isinstance(density, Tensor) and density.dim() > 1 and len(density) == batch
    remedy = "; sum over a sample's elements, as in lambda x: distribution.log_prob(x).flatten(1).sum(1)" if each else ""
    raise ValueError(f"{name} must return a tensor of shape [{batch}], one log-density a sample, got {found}{remedy}")


def warn_if_not_of_the_prior(noise: Tensor, path: Path, begin: float) -> None:
    """UserWarning where a solve from the beginning of a path with wide noise, as VE's is, starts from narrow noise."""
    if kernel_form(path)[0] == PathCode.given or prior_scale(path) == 1.0 or begin > time_limits(path)[0]:
        return
    if not _modes.worth_a_wait(noise) or noise.numel() < ENOUGH:
        return
    scale, found = float(prior_scale(path)), float(noise.detach().to(torch.float64).square().mean().sqrt())
    if found < 0.5 * scale:
        warnings.warn(
            f"noise has a standard deviation of about {found:.3g}, where {path!r} begins with {scale:.3g}: give "
            "fm.paths.prior_scale(path) * fm.noise(...)",
            stacklevel=3,
        )


def warn_of_another_start(path: Path, begin: float) -> None:
    """UserWarning where the path's normal distribution is not the density that a solve begins with: so late, or with data in the noise."""
    if kernel_form(path)[0] == PathCode.given or _modes.transforms_active():
        return
    with torch.no_grad(), _modes.host_arithmetic():
        point = schedule(path, torch.tensor([time_limits(path)[0], begin], dtype=torch.float64, device="cpu"))
        share = point.a / point.s
        more_data, less_noise, at_start = share.diff(), -point.s.log().diff(), float(share[0])
        late = float(torch.maximum(more_data, less_noise)) > LATE
    if at_start > LATE:
        warnings.warn(
            f"the likelihood takes what {path!r} begins with for noise alone, but data are in it, {at_start:.2g} of its standard deviation:"
            " train a path with more noise, or give the density there as prior",
            stacklevel=3,
        )
    if late:
        warnings.warn(
            f"the likelihood takes the state at t0 = {begin:.6g} for the noise that {path!r} begins with, but has another density there: "
            "give it as prior, or a t0 nearer to 0",
            stacklevel=3,
        )


def log_prior(prior: Prior | None, x0: Tensor, path: Path) -> Tensor:
    """log p0(x0), float64 [B]."""
    if prior is not None:
        density = prior(x0)
        check_density("prior", density, x0.shape[0])
        return density.to(torch.float64)
    scale, size = prior_scale(path), math.prod(x0.shape[1:])
    squares = x0.square().flatten(1).sum(1, dtype=torch.float64) if x0.dim() > 1 else x0.square().to(torch.float64)
    log_scale = scale.log() if isinstance(scale, Tensor) else math.log(scale)
    return -0.5 * squares / scale**2 - size * (log_scale + 0.5 * math.log(2.0 * math.pi))
