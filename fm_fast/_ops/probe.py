"""Op ``probe``: the vectors with which divergences are estimated."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fm_fast import reference
from fm_fast._ops import schemas
from fm_fast._ops.guard import needs_reference
from fm_fast._ops.layout import memory_format
from fm_fast._ops.noise import noise
from fm_fast._philox import Kind, Stream

_probe = schemas.op("probe")


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
