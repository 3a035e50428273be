"""``Solver``: what solvers have in common, for ``isinstance`` and for solvers of one's own."""

from abc import ABC, abstractmethod
from typing import Any

from torch import nn

__all__ = ["Solver"]


class Solver(ABC, nn.Module):
    """A module with a ``sample``."""

    @abstractmethod
    def sample(self, *arguments: Any, **more: Any) -> Any:
        """Samples [B, ...], from the states that they start at."""
