"""``torch_wrapper``: a model of points and times in one tensor as the field of an ODE."""

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["torch_wrapper"]


class torch_wrapper(nn.Module):  # the name that programs use
    """Called as (t, x), for :func:`fm_fast.compat.torchdiffeq.odeint`; calls ``model`` with [B, d + 1], the time behind the point."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, t: Tensor, x: Tensor, *arguments: Any, **more: Any) -> Tensor:
        """The velocity at x [B, d] and t [], or [B]; what else a solver may pass on is not looked at."""
        return self.model(torch.cat([x, t.to(x.dtype).reshape(-1, 1).expand(len(x), 1)], 1))
