"""probe: the Rademacher probes that a divergence multiplies by J^T, [K, B, ...] of +1 and -1."""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import probe_sets
from benchmarks.op import Op, Provider, Setting, bytes_of_shape
from benchmarks.points import Counter, with_ours
from benchmarks.probe_sets import MODES, SIZES
from fm_fast import _ops

Step = Callable[[], Tensor]


def inputs(setting: Setting) -> Tensor:
    """Memory for the probes."""
    return torch.empty((probe_sets.count(setting), *setting.shape), dtype=setting.dtype, device=setting.device)


def _ours(backend: str) -> Callable[[Tensor, Setting], Step]:
    def build(given: Tensor, setting: Setting) -> Step:
        counter = Counter(setting.device)
        return lambda: _ops.probe(given[0], probe_sets.of_step(setting, counter.next()), 0, len(given), backend)

    return build


def _formula(like: Tensor) -> Tensor:
    return torch.randint_like(like, 2) * 2.0 - 1.0


def _naive(given: Tensor, setting: Setting) -> Step:
    return lambda: _formula(given)


def _best(given: Tensor, setting: Setting) -> Step:
    """Into memory that is there."""
    return lambda: given.bernoulli_(0.5).mul_(2.0).sub_(1.0)


def _compiled(given: Tensor, setting: Setting) -> Step:
    function = torch.compile(_formula, dynamic=False)
    return lambda: function(given)


def _memory_floor(given: Tensor, setting: Setting) -> Callable[[], object]:
    """One pass, written."""
    return lambda: given.fill_(1.0)


def providers(setting: Setting) -> list[Provider]:
    others = {"naive eager": _naive, "best eager": _best, "torch.compile": _compiled}
    return with_ours(setting, "probe", _ours, others, _memory_floor)


def check(given: Tensor, setting: Setting, step: Step) -> None:
    """Signs, as many of either; different ones for every probe and at every step."""
    z = step().clone().double()
    assert z.shape == given.shape and bool((z.abs() == 1.0).all()), "probes are not all +1 or -1"
    assert abs(float(z.mean())) < 5.0 / z.numel() ** 0.5, "one sign is more frequent than the other"
    products = z.flatten(1) @ z.flatten(1).T / z[0].numel()
    products.fill_diagonal_(0.0)
    assert float(products.abs().max()) < 6.0 / z[0].numel() ** 0.5, "probes depend on each other"
    assert not torch.equal(step().double(), z), "probes repeat"


def bytes_moved(setting: Setting) -> int:
    return probe_sets.count(setting) * bytes_of_shape(setting)


OP = Op("probe", SIZES, MODES, inputs, providers, check, bytes_moved, tensor_bytes=bytes_of_shape)
