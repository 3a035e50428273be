"""Helpers for tensors that loops written for flow_matching use."""

import torch
from torch import Tensor

from fm_fast import _checks

__all__ = ["expand_tensor_like", "gradient", "unsqueeze_to_match"]


def unsqueeze_to_match(source: Tensor, target: Tensor, how: str = "suffix") -> Tensor:
    """``source`` with as many dimensions as ``target``: those that it lacks are of size 1, at its end ("suffix") or start ("prefix")."""
    _checks.one_of("how", how, ("prefix", "suffix"))
    ones = [1] * (target.dim() - source.dim())
    return source.reshape(*ones, *source.shape) if how == "prefix" else source.reshape(*source.shape, *ones)


def expand_tensor_like(input_tensor: Tensor, expand_to: Tensor) -> Tensor:
    """``input_tensor`` [B] spread over the shape of ``expand_to`` [B, ...]; ValueError for another shape."""
    if input_tensor.dim() != 1 or len(input_tensor) != len(expand_to):
        raise ValueError(f"input_tensor must have shape [{len(expand_to)}], got {tuple(input_tensor.shape)}")
    return unsqueeze_to_match(input_tensor.clone(), expand_to).expand_as(expand_to)


def gradient(output: Tensor, x: Tensor, grad_outputs: Tensor | None = None, create_graph: bool = False) -> Tensor:
    """Of the sum of ``output`` times ``grad_outputs``, or times 1, by x; of x's shape."""
    (found,) = torch.autograd.grad(output, x, torch.ones_like(output) if grad_outputs is None else grad_outputs, create_graph=create_graph)
    return found
