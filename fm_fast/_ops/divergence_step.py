"""Op ``divergence_step``: probes drawn again and multiplied with their vector-Jacobian products, the mean added to the solve's sums."""

import torch
from torch import Tensor

from fm_fast import reference
from fm_fast._ops import schemas
from fm_fast._ops.guard import needs_reference
from fm_fast._ops.probe import ProbeSet, probe

SIGNS, NORMALS = 0, 1  # as the kernels know them
_divergence_step = schemas.op("divergence_step")


def divergence_step(
    sums: Tensor, dots: Tensor, products: Tensor, probes: ProbeSet, first: int, bias: float, factor: float, backend: str
) -> None:
    """sum_i z_i (J^T z)_i into dots [K, B] for probes first, first + 1, ... whose ``products`` J^T z are [k, B, ...].

    With the last probe, adds bias + factor mean to sums[0] and factor^2 times the variance of that mean to sums[1]; sums is [2, B].
    The probes are drawn again, not read.
    """
    if not needs_reference(backend):
        tail = (NORMALS if probes.normal else SIGNS, probes.index, first, probes.share, probes.groups, bias, factor)
        _divergence_step[backend](sums, dots, products, probes.key, probes.codes, probes.rows, *tail)
        return
    count = products.shape[0]
    z = probe(products[0], probes, first, count, "reference")
    dots[first : first + count] = reference.probe_products(z, products)
    if first + count == probes.total:
        mean, variance = reference.group_statistics(dots, probes.groups)
        sums += torch.stack([bias + factor * mean, factor * factor * variance])
