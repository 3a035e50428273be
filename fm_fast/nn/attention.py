"""Self-attention over the pixels of an image."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fm_fast import _modes, _ops, reference
from fm_fast.nn.convolution import conv1x1, zeroed
from fm_fast.nn.norm import GroupNormSiLU


class Attention(nn.Module):
    """Self-attention over the pixels, added to the input: [B, C, H, W] -> [B, C, H, W].

    The channels of the joint projection are ordered as (query, key, value), then head, then feature. In channels_last the projections
    and what lies between them share their memory, without a copy.

    With `fused` the products run in op ``attention``. Where that has no kernel, they run in PyTorch's fused kernels while the network is
    trained or runs without gradients: those have no second derivative and no batched backward, so a divergence takes the plain formula.
    """

    def __init__(self, channels: int, heads: int, groups: int, fused: bool = True) -> None:
        super().__init__()
        self.heads, self.fused = heads, fused
        self.norm = GroupNormSiLU(groups, channels, activation=False, fused=fused)
        self.query_key_value = conv1x1(channels, 3 * channels)
        self.projection = zeroed(conv1x1(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        joint = self.query_key_value(self.norm(x))
        # [B, 3 C, H, W] -> [B, pixels, 3, heads, features]
        mixed = self._mixed(joint.flatten(2).transpose(1, 2).unflatten(2, (3, self.heads, -1)))
        image = mixed.flatten(2).transpose(1, 2).unflatten(2, x.shape[2:])
        return x + self.projection(image.contiguous(memory_format=_ops.memory_format(x)))

    def _mixed(self, joint: Tensor) -> Tensor:
        if not self.fused or _modes.transforms_active():
            return reference.attention(joint)
        backend = _ops.attention_backend(joint)
        if backend != "reference":
            return _ops.attention(joint, backend)
        return _by_pytorch(joint) if self._is_differentiated_plainly() else reference.attention(joint)

    def _is_differentiated_plainly(self) -> bool:
        """Not at all, or as training does: once, by one gradient."""
        return not torch.is_grad_enabled() or (self.training and any(p.requires_grad for p in self.query_key_value.parameters()))


def _by_pytorch(joint: Tensor) -> Tensor:
    """The same by PyTorch's fused kernels."""
    query, key, value = (part.transpose(1, 2) for part in joint.unbind(2))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
