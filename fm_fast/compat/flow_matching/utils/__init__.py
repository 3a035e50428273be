"""``ModelWrapper``, and small helpers for tensors."""

from fm_fast.compat.flow_matching.utils.model_wrapper import ModelWrapper
from fm_fast.compat.flow_matching.utils.utils import expand_tensor_like, gradient, unsqueeze_to_match

__all__ = ["ModelWrapper", "expand_tensor_like", "gradient", "unsqueeze_to_match"]
