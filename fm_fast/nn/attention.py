"""Self-attention over the pixels of an image."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fm_fast import _modes, _ops
from fm_fast.nn.convolution import conv1x1, zeroed
from fm_fast.nn.norm import GroupNormSiLU

# Where the processor multiplies bfloat16 matrices itself, it trains on whole tables of weights 1.5 to 13 times faster than by PyTorch's
# fused kernel, as long as the tables are small: measured up to 256 pixels.
_MULTIPLIES_BFLOAT16 = torch.cpu._is_avx512_bf16_supported()
_MOST_PIXELS = 256


class Attention(nn.Module):
    """Self-attention over the pixels, added to the input: [B, C, H, W] -> [B, C, H, W].

    The channels of the joint projection are ordered as (query, key, value), then head, then feature. In channels_last the projections
    and what lies between them share their memory, without a copy.

    With `fused` the products run in PyTorch's fused kernels while the network is trained or runs without gradients. These have no
    second derivative, no forward mode and no batched backward, so everything else (a divergence, torch.func) takes the plain formula.
    """

    def __init__(self, channels: int, heads: int, groups: int, fused: bool = True) -> None:
        super().__init__()
        self.heads, self.fused = heads, fused
        self.norm = GroupNormSiLU(groups, channels, activation=False, fused=fused)
        self.query_key_value = conv1x1(channels, 3 * channels)
        self.projection = zeroed(conv1x1(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        joint = self.query_key_value(self.norm(x))
        # [B, 3 C, H, W] -> [B, pixels, 3, heads, features] -> three of [B, heads, pixels, features]
        parts = joint.flatten(2).transpose(1, 2).unflatten(2, (3, self.heads, -1))
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = self._mixed(query, key, value).transpose(1, 2).flatten(2)
        image = mixed.transpose(1, 2).unflatten(2, x.shape[2:])
        return x + self.projection(image.contiguous(memory_format=_ops.memory_format(x)))

    def _mixed(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self._may_fuse():
            return attention_of_matrices(query, key, value) if suits_matrices(query) else F.scaled_dot_product_attention(query, key, value)
        return plain_attention(query, key, value)

    def _may_fuse(self) -> bool:
        if not self.fused or _modes.transforms_active():
            return False
        return not torch.is_grad_enabled() or (self.training and self.query_key_value.weight.requires_grad)


def suits_matrices(query: Tensor) -> bool:
    """Whether :func:`attention_of_matrices` is the faster one: for gradients, which the fused kernel is slow at."""
    fast = _MULTIPLIES_BFLOAT16 and query.device.type == "cpu" and query.dtype == torch.bfloat16
    return fast and torch.is_grad_enabled() and query.shape[-2] <= _MOST_PIXELS


def attention_of_matrices(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """:func:`plain_attention` by batched products of matrices, the scale among them; scores are rounded to the inputs' dtype."""
    query_rows, key_rows, value_rows = (x.flatten(0, 1) for x in (query, key, value))
    scale = 1.0 / math.sqrt(query.shape[-1])
    scores = torch.baddbmm(query.new_empty(()), query_rows, key_rows.transpose(1, 2), beta=0.0, alpha=scale)
    return torch.bmm(torch.softmax(scores, dim=-1), value_rows).unflatten(0, query.shape[:2])


def plain_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(features)) v for [B, heads, pixels, features], differentiable in every mode and order."""
    weights = torch.softmax(query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1]), dim=-1)
    return weights @ value
