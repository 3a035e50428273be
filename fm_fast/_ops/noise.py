"""Op ``noise``: numbers of the noise contract that ``fm_fast/random.py`` specifies."""

import torch
from torch import Tensor

from fm_fast import reference
from fm_fast._ops import schemas
from fm_fast._ops.guard import needs_reference
from fm_fast._philox import Kind

_noise = schemas.op("noise")


def noise(key: Tensor, shape: tuple[int, ...], kind: Kind, stream: int, index: int, dtype: torch.dtype, backend: str) -> Tensor:
    """Numbers of the noise contract, [B, ...] of ``dtype``, contiguous."""
    if needs_reference(backend):
        return reference.noise(key, shape, kind, stream, index).to(dtype)
    out = torch.empty(shape, dtype=dtype, device=key.device)
    _noise[backend](out, key, int(kind), int(stream), index)
    return out


def drawer(backend: str) -> reference.Draw:
    """A function (key, shape, kind, stream, index=0) that draws float32 numbers or words with the backend of op ``noise``."""

    def draw(key: Tensor, shape: tuple[int, ...], kind: Kind, stream: int, index: int = 0) -> Tensor:
        return noise(key, shape, kind, stream, index, torch.int64 if kind is Kind.word else torch.float32, backend)

    return draw
