"""The layers of the U-Net. Every layer is called `layer(x, embedding)`, whether it reads the embedding or not."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def zeroed(layer: nn.Conv2d) -> nn.Conv2d:
    """The same layer with its weight and bias set to zero: a block that ends in one starts as the identity."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """Keeps the size of [B, C, H, W]; divides it with stride > 1."""
    return nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1)


def conv1x1(inputs: int, outputs: int) -> nn.Conv2d:
    """The same linear map at every pixel."""
    return nn.Conv2d(inputs, outputs, kernel_size=1)


class ResidualBlock(nn.Module):
    """Pre-activation residual block whose second norm is scaled and shifted by the embedding.

    h = conv(silu(norm(x)));  h = conv(silu(norm(h) (1 + scale) + shift));  output = skip(x) + h.
    x: [B, inputs, H, W]; embedding: [B, width], already activated; output: [B, outputs, H, W].
    """

    def __init__(self, inputs: int, outputs: int, width: int, groups: int) -> None:
        super().__init__()
        self.first_norm = nn.GroupNorm(groups, inputs)
        self.first_conv = conv3x3(inputs, outputs)
        self.scale_shift = nn.Linear(width, 2 * outputs)
        self.second_norm = nn.GroupNorm(groups, outputs)
        self.second_conv = zeroed(conv3x3(outputs, outputs))
        self.skip = nn.Identity() if inputs == outputs else conv1x1(inputs, outputs)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.first_conv(F.silu(self.first_norm(x)))
        scale, shift = self.scale_shift(embedding)[:, :, None, None].chunk(2, dim=1)
        h = torch.addcmul(shift, self.second_norm(h).to(scale.dtype), 1 + scale)
        return self.skip(x) + self.second_conv(F.silu(h))


class Attention(nn.Module):
    """Self-attention over the pixels, added to the input: [B, C, H, W] -> [B, C, H, W]."""

    def __init__(self, channels: int, head_channels: int, groups: int) -> None:
        super().__init__()
        self.heads = channels // head_channels
        self.norm = nn.GroupNorm(groups, channels)
        self.query_key_value = conv1x1(channels, 3 * channels)
        self.projection = zeroed(conv1x1(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        joint = self.query_key_value(self.norm(x))
        per_head = joint.reshape(batch, 3, self.heads, channels // self.heads, height * width).transpose(3, 4)
        mixed = F.scaled_dot_product_attention(*per_head.unbind(1))
        return x + self.projection(mixed.transpose(2, 3).reshape(batch, channels, height, width))


class Block(nn.Module):
    """A residual block, with attention behind it where asked for."""

    def __init__(self, inputs: int, outputs: int, width: int, groups: int, head_channels: int | None) -> None:
        super().__init__()
        self.residual = ResidualBlock(inputs, outputs, width, groups)
        self.attention = nn.Identity() if head_channels is None else Attention(outputs, head_channels, groups)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.attention(self.residual(x, embedding))


class Downsample(nn.Module):
    """Half the height and width by a strided convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv3x3(channels, channels, stride=2)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    """Twice the height and width: nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv3x3(channels, channels)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
