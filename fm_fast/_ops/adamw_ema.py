"""Op ``adamw_ema``: the norm of all gradients, then AdamW, moving averages and the 16-bit copy of all parameters in one pass."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fm_fast import reference
from fm_fast._ops import schemas
from fm_fast._ops.guard import needs_reference, run

APPLIED, SKIPPED, OWN = 0, 1, 2  # entries of AdamwState.counts
_adamw_ema_norm = schemas.op("adamw_ema_norm")
_adamw_ema = schemas.op("adamw_ema")


@dataclass(frozen=True, eq=False)
class AdamwState:
    """What the op keeps of all parameters, one behind the other, each in the order of its own memory.

    m, v: the moments, [N] in the parameters' dtype. averages: [K, N]. counts: int64 (updates applied, steps skipped, and of each
    parameter the updates that it had a gradient for, by which AdamW corrects the bias of its moments).
    layout: int64 [parameters, 2] on the CPU: where each parameter begins, in rising order, and its row of the settings.
    """

    m: Tensor
    v: Tensor
    averages: Tensor
    counts: Tensor
    layout: Tensor

    def place(self, i: int) -> list[int]:
        """Where parameter i begins, and its row of the settings. A list, because reading a number out of a tensor counts as a wait."""
        return self.layout[i].tolist()

    def part(self, flat: Tensor, i: int, like: Tensor) -> Tensor:
        """The entries of m, v or averages that belong to parameter i, a view of its shape and strides (behind [K] for averages)."""
        leading = flat.shape[:-1]
        offset = flat.storage_offset() + self.place(i)[0]
        return flat.as_strided((*leading, *like.shape), (*flat.stride()[:-1], *like.stride()), offset)


def adamw_ema_norm(total: Tensor, gradients: Sequence[Tensor], backend: str) -> None:
    """The sum of squares of all gradients into total, float64 [1]; see :func:`fm_fast.reference.square_sum`."""
    if needs_reference(backend):
        total.copy_(reference.square_sum(gradients))
    else:
        run(_adamw_ema_norm[backend], total, gradients)


def adamw_ema(
    parameters: Sequence[Tensor],
    copies: Sequence[Tensor],
    gradients: Sequence[Tensor],
    state: AdamwState,
    total: Tensor,
    settings: Tensor,
    decays: Tensor,
    backend: str,
) -> None:
    """One step, in place; if ``total`` (of :func:`adamw_ema_norm`) is not finite, it only counts itself as skipped.

    Every gradient has the shape and strides of its parameter, or no elements: then the parameter stays, and its averages move on.
    copies: none, or a bfloat16 or float16 tensor a parameter (without elements where there is no copy). settings: float64 [groups, 6]
    and decays: float64 [K, 4] as in :mod:`fm_fast.reference`.
    """
    if not needs_reference(backend):
        flat = (state.m, state.v, state.averages, state.counts)
        return run(_adamw_ema[backend], parameters, copies, *flat, gradients, state.layout, total, settings, decays)
    with torch.no_grad():
        _plain(parameters, copies, gradients, state, total.reshape(()), settings, decays)


def _plain(
    parameters: Sequence[Tensor],
    copies: Sequence[Tensor],
    gradients: Sequence[Tensor],
    state: AdamwState,
    total: Tensor,
    settings: Tensor,
    decays: Tensor,
) -> None:
    finite, updates = total.isfinite(), state.counts[APPLIED]
    for i, (p, g) in enumerate(zip(parameters, gradients, strict=True)):
        m, v, averages = (state.part(flat, i, p) for flat in (state.m, state.v, state.averages))
        new_p, new_m, new_v = p, m, v
        if g.numel():
            new_p, new_m, new_v = reference.adamw(p, g, m, v, settings[state.place(i)[1]], total, state.counts[OWN + i])
        new_averages = reference.averaged(averages, new_p.to(p.dtype), decays, updates)
        for old, new in ((p, new_p), (m, new_m), (v, new_v), (averages, new_averages)):
            old.copy_(torch.where(finite, new.to(old.dtype), old))
        if copies and copies[i].numel():
            copies[i].copy_(torch.where(finite, p.to(copies[i].dtype), copies[i]))
    present = [bool(g.numel()) for g in gradients]
    state.counts.add_(torch.stack([finite, ~finite, *(finite if has else torch.zeros_like(finite) for has in present)]))
