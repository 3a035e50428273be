"""divergence_step: what is left of a divergence behind the products g_k = J^T z_k of K Rademacher probes.

z_k . g_k for each probe and sample, their mean over the probes, the variance of that mean, and both added to what a solve has summed up
so far. fm_fast draws the probes once more instead of reading them; the others are given them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import probe_sets
from benchmarks.op import Inexact, Op, Provider, Setting, bytes_of_shape
from benchmarks.points import off_by, relative_error, with_ours
from benchmarks.probe_sets import MODES, SIZES
from fm_fast import _ops

STEP, FACTOR = 1, 0.1
TOLERANCE = 1e-5  # of every dtype: products of +1 and -1 are exact, and what they are summed in is float32 or wider
ROUNDING = 2.0**-23  # of a sum in float32


@dataclass(frozen=True)
class Inputs:
    """The probes of step STEP, and their products."""

    z: Tensor
    products: Tensor


# Returns [2, B]: mean and variance, scaled
Step = Callable[[], Tensor]


def inputs(setting: Setting) -> Inputs:
    """Products z + noise, so that the sum over a sample does not cancel."""
    like = torch.empty(setting.shape, dtype=setting.dtype, device=setting.device)
    z = _ops.probe(like, probe_sets.of_step(setting, STEP), 0, probe_sets.count(setting), "reference")
    return Inputs(z, z + torch.randn_like(z))


def _formula(z: Tensor, products: Tensor, sums: Tensor) -> Tensor:
    dots = (z * products).flatten(2).sum(2)
    variance = dots.var(0) / len(dots) if len(dots) > 1 else torch.zeros_like(dots[0])
    return sums + torch.stack([FACTOR * dots.mean(0), FACTOR**2 * variance])


def _best_formula(z: Tensor, products: Tensor, sums: Tensor) -> Tensor:
    """One pass for the products: batched inner products."""
    dots = torch.linalg.vecdot(z.flatten(2), products.flatten(2))
    variance, mean = torch.var_mean(dots, 0, correction=min(1, len(dots) - 1))
    factors = FACTOR**2 / len(dots) if len(dots) > 1 else 0.0
    return torch.stack([sums[0].add(mean, alpha=FACTOR), sums[1].add(variance, alpha=factors)])


def _by(formula: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[Inputs, Setting], Step]:
    def build(given: Inputs, setting: Setting) -> Step:
        sums, z, products = torch.zeros(2, setting.shape[0], device=setting.device), given.z, given.products
        # 16-bit products are summed in 32 bits, as everyone would.
        return lambda: formula(z.float(), products.float(), sums)

    return build


def _compiled(given: Inputs, setting: Setting) -> Step:
    return _by(torch.compile(_formula, dynamic=False))(given, setting)


def _ours(backend: str) -> Callable[[Inputs, Setting], Step]:
    def build(given: Inputs, setting: Setting) -> Step:
        batch, count, probes = setting.shape[0], probe_sets.count(setting), probe_sets.of_step(setting, STEP)
        sums, dots = (torch.zeros(n, batch, dtype=torch.float64, device=setting.device) for n in (2, count))

        def step() -> Tensor:
            _ops.divergence_step(sums.zero_(), dots, given.products, probes, 0, 0.0, FACTOR, backend)
            return sums

        return step

    return build


def _memory_floor(given: Inputs, setting: Setting) -> Callable[[], object]:
    """The products read once."""
    return lambda: given.products.sum()


def providers(setting: Setting) -> list[Provider]:
    others = {"naive eager": _by(_formula), "best eager": _by(_best_formula), "torch.compile": _compiled}
    return with_ours(setting, "divergence_step", _ours, others, _memory_floor)


def check(given: Inputs, setting: Setting, step: Step) -> None:
    """Mean and variance against float64."""
    nothing = torch.zeros(2, setting.shape[0], dtype=torch.float64, device=setting.device)
    wanted, found = _formula(given.z.double(), given.products.double(), nothing), step()
    for name, value, exact in zip(("mean", "variance"), found, wanted, strict=True):
        if not exact.any():
            assert not value.any(), f"the {name} is not 0"
            continue
        error = relative_error(value, exact)
        message = off_by(f"the {name}", error, TOLERANCE)
        if name == "variance" and TOLERANCE < error <= _rounded_away(given):
            raise Inexact(message, error)
        assert error <= TOLERANCE, message


def _rounded_away(given: Inputs) -> float:
    """What is lost of the variance where the sums of large samples are rounded to float32: they are far larger than they differ."""
    dots = (given.z.double() * given.products.double()).flatten(2).sum(2)
    return ROUNDING * float(dots.abs().mean() / dots.std(0).mean())


def bytes_moved(setting: Setting) -> int:
    return probe_sets.count(setting) * bytes_of_shape(setting)


OP = Op("divergence_step", SIZES, MODES, inputs, providers, check, bytes_moved, tensor_bytes=bytes_of_shape)
