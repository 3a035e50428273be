"""Op ``assignment``: the pairing of least cost. It runs on the host, wherever the data are."""

import torch
from torch import Tensor

from fm_fast import _backends
from fm_fast._ops import schemas

_assignment = schemas.op("assignment")


def assignment(costs: Tensor, guess: Tensor) -> Tensor:
    """int64 [n]: a column for each row of finite costs [n, n], each once, such that the sum of the costs is the least.

    costs are float32 or float64 in contiguous memory of the host. guess float64 [n]: something near a multiple of the columns' prices. How
    soon a pairing is found depends on it, and which of those that cost the same.
    """
    columns = torch.empty(len(costs), dtype=torch.int64, device="cpu")
    backend = _backends.resolve_on_host("assignment")
    if backend == "reference":
        from scipy.optimize import linear_sum_assignment  # comes with torchdiffeq; slow to import

        return columns.copy_(torch.from_numpy(linear_sum_assignment(costs.numpy())[1]))
    _assignment[backend](columns, costs, guess)
    return columns
