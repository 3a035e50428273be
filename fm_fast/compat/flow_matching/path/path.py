"""``ProbPath``: what paths have in common, for ``isinstance`` and for paths of one's own."""

from abc import ABC, abstractmethod

from torch import Tensor

from fm_fast.compat.flow_matching.path.path_sample import PathSample

__all__ = ["ProbPath"]


class ProbPath(ABC):
    """A way from x_0 to x_1 that can be sampled."""

    @abstractmethod
    def sample(self, x_0: Tensor, x_1: Tensor, t: Tensor) -> PathSample:
        """The point between x_0 and x_1 [B, ...] at t [B], and its velocity."""

    def assert_sample_shape(self, x_0: Tensor, x_1: Tensor, t: Tensor) -> None:
        """ValueError unless t is [B], for x_0 and x_1 [B, ...]."""
        if t.dim() != 1 or not len(t) == len(x_0) == len(x_1):
            raise ValueError(f"t must have shape [{len(x_1)}], as x_0 and x_1 have samples, got {tuple(t.shape)}, and {len(x_0)} of x_0")
