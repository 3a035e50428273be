"""The residual blocks of the U-Net and what changes the size of an image.

Every layer is called `layer(x, embedding, key)`, whether it reads the embedding and the key of the dropout noise or not.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fm_fast.nn.attention import Attention
from fm_fast.nn.convolution import conv1x1, conv3x3, zeroed
from fm_fast.nn.norm import GroupNormSiLU


@dataclass(frozen=True)
class BlockSettings:
    """What the residual blocks of a network share. width: features of the embedding; the rest is explained in UNetConfig and UNet."""

    width: int
    groups: int
    dropout: float = 0.0
    scale_shift: bool = True
    fused: bool = True


class ResidualBlock(nn.Module):
    """Pre-activation residual block, the embedding either scaling and shifting the second norm or added before it.

    h = conv(resize(silu(norm(x))));  e = linear(embedding);  output = skip(resize(x)) + conv(dropout(silu(m))), where
    m = norm(h) (1 + scale) + shift with (scale, shift) = e, or m = norm(h + e).
    x: [B, inputs, H, W], of which `second` may hold the last channels; embedding: [B, width], already activated;
    key: of the dropout noise, or None for no dropout; output: [B, outputs, H, W], or twice or half as high and wide.
    """

    def __init__(self, inputs: int, outputs: int, settings: BlockSettings, resize: nn.Module | None = None) -> None:
        super().__init__()
        self.scale_shift = settings.scale_shift
        self.resize = nn.Identity() if resize is None else resize
        self.first_norm = GroupNormSiLU(settings.groups, inputs, fused=settings.fused)
        self.first_conv = conv3x3(inputs, outputs)
        self.modulation = nn.Linear(settings.width, 2 * outputs if settings.scale_shift else outputs)
        self.second_norm = GroupNormSiLU(settings.groups, outputs, dropout=settings.dropout, fused=settings.fused)
        self.second_conv = zeroed(conv3x3(outputs, outputs))
        self.skip = nn.Identity() if inputs == outputs else conv1x1(inputs, outputs)

    def forward(self, x: Tensor, embedding: Tensor, key: Tensor | None = None, second: Tensor | None = None) -> Tensor:
        h = self.first_conv(self.resize(self.first_norm(x, second=second)))
        h = self._modulated(h, self.modulation(embedding), key)
        return self._skipped(x, second) + self.second_conv(h)

    def _modulated(self, h: Tensor, modulation: Tensor, key: Tensor | None) -> Tensor:
        if not self.scale_shift:
            return self.second_norm(h, embedding=modulation, key=key)
        scale, shift = modulation.chunk(2, dim=1)
        return self.second_norm(h, scale=scale, shift=shift, key=key)

    def _skipped(self, x: Tensor, second: Tensor | None) -> Tensor:
        joined = x if second is None else torch.cat([x, second], dim=1)
        return self.skip(self.resize(joined))


class Block(nn.Module):
    """A residual block, with attention behind it where asked for."""

    def __init__(self, inputs: int, outputs: int, settings: BlockSettings, heads: int = 0) -> None:
        super().__init__()
        self.residual = ResidualBlock(inputs, outputs, settings)
        self.attention = Attention(outputs, heads, settings.groups, settings.fused) if heads else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor, key: Tensor | None = None, second: Tensor | None = None) -> Tensor:
        return self.attention(self.residual(x, embedding, key, second))


class Half(nn.Module):
    """Half the height and width: means of 2x2 pixels."""

    def forward(self, x: Tensor, embedding: Tensor | None = None, key: Tensor | None = None) -> Tensor:
        return F.avg_pool2d(x, kernel_size=2)


class Double(nn.Module):
    """Twice the height and width: the nearest neighbour."""

    def forward(self, x: Tensor, embedding: Tensor | None = None, key: Tensor | None = None) -> Tensor:
        return F.interpolate(x, scale_factor=2.0, mode="nearest")


class Downsample(nn.Module):
    """Half the height and width by a strided convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv3x3(channels, channels, stride=2)

    def forward(self, x: Tensor, embedding: Tensor, key: Tensor | None = None) -> Tensor:
        return self.conv(x)


class Upsample(Double):
    """Twice the height and width: nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv3x3(channels, channels)

    def forward(self, x: Tensor, embedding: Tensor | None = None, key: Tensor | None = None) -> Tensor:
        return self.conv(super().forward(x))


def downsample(resampling: str, channels: int, settings: BlockSettings) -> nn.Module:
    """The layer between a level and the next coarser one."""
    if resampling == "block":
        return ResidualBlock(channels, channels, settings, Half())
    return Downsample(channels) if resampling == "convolution" else Half()


def upsample(resampling: str, channels: int, settings: BlockSettings) -> nn.Module:
    """The layer between a level and the next finer one."""
    if resampling == "block":
        return ResidualBlock(channels, channels, settings, Double())
    return Upsample(channels) if resampling == "convolution" else Double()
