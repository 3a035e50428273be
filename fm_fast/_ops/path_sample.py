"""Op ``path_sample``: the point on the path, its time and the loss's coefficients for every sample."""

import torch
from torch import Tensor

from fm_fast._codes import TimeCode
from fm_fast._ops import schemas
from fm_fast._ops.guard import absent, run
from fm_fast._ops.layout import native_layout
from fm_fast._spec import GIVEN, PathSpec

_path_sample = schemas.op("path_sample")


def path_sample(
    x1: Tensor,
    x0: Tensor | None,
    t: Tensor | None,
    coefficients: Tensor | None,
    key: Tensor,
    spec: PathSpec,
    dtype: torch.dtype,
    wide: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(x_t of ``dtype``, t [B] and coefficients [B, 6] of dtype ``wide``) in one pass over x1.

    With ``coefficients`` given, t is too and both are used as they are.
    """
    x1 = native_layout(x1)
    x_t = torch.empty_like(x1, dtype=dtype)
    sampler = spec.t_sampler.code if t is None else TimeCode.given.value
    times = x1.new_empty(x1.shape[0], dtype=wide) if t is None else t
    rows = x1.new_empty(x1.shape[0], 6, dtype=wide) if coefficients is None else coefficients
    path = spec.kernel_path if coefficients is None else GIVEN
    times_drawn = (sampler, spec.t_sampler.mean, spec.t_sampler.std, *spec.t_range)
    x0 = absent(rows) if x0 is None else native_layout(x0)
    run(_path_sample[backend], x_t, times, rows, x1, x0, key, *path, spec.kernel_objective, *times_drawn, *spec.data_map)
    return x_t, times, rows
