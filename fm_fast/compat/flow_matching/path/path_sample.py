"""``PathSample``: what a path's ``sample`` returns."""

from dataclasses import dataclass

from torch import Tensor

__all__ = ["PathSample"]


@dataclass
class PathSample:
    """A point x_t on the way from x_0 to x_1 at times t [B], and the velocity dx_t there."""

    x_1: Tensor
    x_0: Tensor
    t: Tensor
    x_t: Tensor
    dx_t: Tensor
