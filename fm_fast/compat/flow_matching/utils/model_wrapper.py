"""``ModelWrapper``: a network whose call differs from model(x=x, t=t, **extras)."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

__all__ = ["ModelWrapper"]


class ModelWrapper(nn.Module):
    """Holds ``model``; a subclass says in ``forward`` how it is called."""

    def __init__(self, model: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, t: Tensor, **extras: Any) -> Tensor:
        return self.model(x=x, t=t, **extras)
