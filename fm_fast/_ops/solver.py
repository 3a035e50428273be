"""Ops ``linear_step``, ``probe`` and ``divergence_step``: what solvers and likelihoods call."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fm_fast import reference
from fm_fast._ops import schemas
from fm_fast._ops.guard import needs_reference
from fm_fast._ops.layout import memory_format
from fm_fast._ops.noise import noise
from fm_fast._philox import Kind, Stream

PROBE_KINDS = {Kind.sign: 0, Kind.normal: 1}
_linear_step = schemas.op("linear_step")
_probe = schemas.op("probe")
_divergence_step = schemas.op("divergence_step")


def linear_step(backend: str) -> Callable[..., None]:
    """Op ``linear_step`` itself, for loops without gradients: (out, copy, x, outputs, table, row, guidance) -> None.

    Writes table[row, 0] x + sum_j table[row, 1 + j] m(outputs[j]) into out, which may be x, and once or twice into copy where it is not
    empty; see :func:`fm_fast.reference.linear_step`.
    """
    return _plain_linear_step if backend == "reference" else _linear_step[backend]


def _plain_linear_step(out: Tensor, copy: Tensor, x: Tensor, outputs: Sequence[Tensor], table: Tensor, row: int, guidance: float) -> None:
    wide = reference.accumulation_dtype(x, out)
    # Scalars on the device, so that nothing waits for it.
    first, *others = table[row].to(wide).unbind()
    result = x.to(wide) * first
    for output, coefficient in zip(outputs, others, strict=True):
        result = result + coefficient * reference.mixed(output.to(wide), x, guidance)
    out.copy_(result)
    for half in copy.split(x.shape[0]) if copy.numel() else ():
        half.copy_(result)


@dataclass(frozen=True, eq=False)
class ProbeSet:
    """Which probes one evaluation of a divergence uses; :func:`fm_fast.reference.probes` says how the numbers make signs.

    normal: normal vectors instead of signs. codes int64 [D] and rows int64 [total] may be empty. Probe q draws with index + q // share.
    """

    key: Tensor
    codes: Tensor
    rows: Tensor
    index: int
    total: int
    share: int
    normal: bool

    @property
    def groups(self) -> int:
        """Groups of consecutive probes that are independent of each other."""
        return self.total // self.share


def probe(like: Tensor, probes: ProbeSet, first: int, count: int, backend: str) -> Tensor:
    """Probes first .. first + count - 1 in the dtype and memory format of ``like`` [B, ...]: [count, B, ...]."""
    shape = tuple(like.shape)
    if probes.normal:
        indices = [probes.index + q // probes.share for q in range(first, first + count)]
        drawn = [noise(probes.key, shape, Kind.normal, Stream.probe, index, like.dtype, backend) for index in indices]
        return torch.stack(drawn)
    if needs_reference(backend):
        signs = reference.probes(probes.key, shape, probes.codes, probes.rows, probes.index, first, probes.share, count)
        return signs.to(like.dtype)
    out = torch.empty((count * shape[0], *shape[1:]), dtype=like.dtype, device=like.device, memory_format=memory_format(like))
    out = out.unflatten(0, (count, shape[0])) if shape[0] else out.reshape(count, *shape)
    _probe[backend](out, probes.key, probes.codes, probes.rows, probes.index, first, probes.share)
    return out


def divergence_step(
    sums: Tensor, dots: Tensor, products: Tensor, probes: ProbeSet, first: int, bias: float, factor: float, backend: str
) -> None:
    """sum_i z_i (J^T z)_i into dots [K, B] for probes first, first + 1, ... whose ``products`` J^T z are [k, B, ...].

    With the last probe, adds bias + factor mean to sums[0] and factor^2 times the variance of that mean to sums[1]; sums is [2, B].
    The probes are drawn again, not read.
    """
    if not needs_reference(backend):
        kind = Kind.normal if probes.normal else Kind.sign
        tail = (PROBE_KINDS[kind], probes.index, first, probes.share, probes.groups, bias, factor)
        _divergence_step[backend](sums, dots, products, probes.key, probes.codes, probes.rows, *tail)
        return
    count = products.shape[0]
    z = probe(products[0], probes, first, count, "reference")
    dots[first : first + count] = reference.probe_products(z, products)
    if first + count == probes.total:
        mean, variance = reference.group_statistics(dots, probes.groups)
        sums += torch.stack([bias + factor * mean, factor * factor * variance])
