"""The reference U-Net, of the type of Dhariwal & Nichol (2021, "Diffusion models beat GANs", ADM), used by Lipman et al. (2023).

Written from the papers. A stem, an encoder of residual blocks with strided convolutions between its levels, a middle
block with attention, and a decoder that takes the encoder's outputs in reverse order as additional channels.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fm_fast.nn.embedding import ClassEmbedding, TimeEmbedding
from fm_fast.nn.layers import Attention, Block, Downsample, ResidualBlock, Upsample, conv3x3, zeroed


def _described(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class UNetConfig:
    """Shape of a U-Net. Presets: `UNetConfig.digits()` (8x8, 0.7 M parameters), `UNetConfig.small()` (32x32 colour, 7 M parameters).

    Raises ValueError where the numbers do not fit together, e.g. a width that `groups` does not divide.
    """

    image_size: int = _described(32, "height and width of the images that attention_sizes refers to")
    image_channels: int = _described(3, "colour channels of the images")
    classes: int = _described(0, "number of classes; 0 for an unconditional network")
    channels: int = _described(64, "width of the first level")
    multipliers: tuple[int, ...] = _described((1, 2, 2), "width of each level, as a multiple of channels")
    blocks: int = _described(2, "residual blocks a level")
    attention_sizes: tuple[int, ...] = _described((16,), "feature-map heights at which the blocks have attention")
    head_channels: int = _described(64, "channels an attention head")
    groups: int = _described(32, "groups of every GroupNorm")
    dropout: float = _described(0.0, "only 0.0 for now: a mask from torch's generator could not be resumed exactly")

    def __post_init__(self) -> None:
        _check_config(self)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(self.channels * multiplier for multiplier in self.multipliers)

    @property
    def downsampling(self) -> int:
        """The factor that must divide the height and width of an image."""
        return 2 ** (len(self.multipliers) - 1)

    @classmethod
    def digits(cls) -> "UNetConfig":
        """For the 8x8 digits: seconds to train on a CPU."""
        return cls(8, 1, 10, channels=32, multipliers=(1, 2), blocks=1, attention_sizes=(4,), head_channels=32, groups=8)

    @classmethod
    def small(cls) -> "UNetConfig":
        """For 32x32 colour images in 10 classes, e.g. CIFAR-10, on one GPU."""
        return cls(classes=10)


def _check_config(config: UNetConfig) -> None:
    for name in ("image_size", "image_channels", "channels", "blocks", "head_channels", "groups"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}: expected at least 1, got {getattr(config, name)}")
    if config.classes < 0:
        raise ValueError(f"classes: expected 0 or more, got {config.classes}")
    if config.dropout != 0.0:
        raise ValueError(f"dropout: only 0.0 is supported, got {config.dropout}")
    if not config.multipliers or min(config.multipliers) < 1:
        raise ValueError(f"multipliers: expected one positive number a level, got {config.multipliers}")
    if config.channels % 2:
        raise ValueError(f"channels: expected an even number (sines and cosines of the time), got {config.channels}")
    _check_widths(config)


def _check_widths(config: UNetConfig) -> None:
    for width in config.widths:
        if width % config.groups:
            raise ValueError(f"groups: expected a divisor of every level's width {config.widths}, got {config.groups}")
    attended = {width for level, width in enumerate(config.widths) if _has_attention(config, level)} | {config.widths[-1]}
    for width in attended:
        if width % config.head_channels:
            raise ValueError(f"head_channels: expected a divisor of the attended width {width}, got {config.head_channels}")


def _has_attention(config: UNetConfig, level: int) -> bool:
    return config.image_size // 2**level in config.attention_sizes


class UNet(nn.Module):
    """Called `model(x, t, y=labels)`; predicts whatever the objective asks for, in the shape of x.

    x: [B, image_channels, H, W], H and W divisible by `config.downsampling`, any floating dtype (cast to the weights').
    t: float [B], time in [0, 1]. y: int64 [B], a class or -1 for the null class; None means -1 for every sample.
    Returns [B, image_channels, H, W]. The last convolution starts at zero, hence so does the output.
    Raises ValueError for a shape that does not fit, TypeError for labels that are not int64.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        width = 4 * config.channels
        self.time = TimeEmbedding(config.channels, width)
        self.label = ClassEmbedding(config.classes, width) if config.classes else None
        self.stem = conv3x3(config.image_channels, config.channels)
        self.encoder, skips = _encoder(config, width)
        self.middle = _Middle(config, width)
        self.decoder = _decoder(config, width, skips)
        self.norm = nn.GroupNorm(config.groups, config.channels)
        self.head = zeroed(conv3x3(config.channels, config.image_channels))

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        _check_inputs(self.config, x, t, y)
        embedding = self._embed(t, y)
        h = self.stem(x.to(self.stem.weight.dtype))
        skips = [h]
        for layer in self.encoder:
            h = layer(h, embedding)
            skips.append(h)
        h = self.middle(h, embedding)
        for layer in self.decoder:
            joined = h if isinstance(layer, Upsample) else torch.cat([h, skips.pop()], dim=1)
            h = layer(joined, embedding)
        return self.head(F.silu(self.norm(h)))

    def _embed(self, t: Tensor, y: Tensor | None) -> Tensor:
        embedding = self.time(t)
        if self.label is not None:
            null = torch.full(t.shape, -1, dtype=torch.int64, device=t.device)
            embedding = embedding + self.label(null if y is None else y)
        return F.silu(embedding)


class _Middle(nn.Module):
    """Residual block, attention, residual block at the coarsest level."""

    def __init__(self, config: UNetConfig, width: int) -> None:
        super().__init__()
        channels = config.widths[-1]
        self.first = ResidualBlock(channels, channels, width, config.groups)
        self.attention = Attention(channels, config.head_channels, config.groups)
        self.second = ResidualBlock(channels, channels, width, config.groups)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.second(self.attention(self.first(x, embedding)), embedding)


def _encoder(config: UNetConfig, width: int) -> tuple[nn.ModuleList, list[int]]:
    """The encoder's layers, and the channels of the stem's and of each layer's output."""
    layers, skips = nn.ModuleList(), [config.channels]
    for level, outputs in enumerate(config.widths):
        if level > 0:
            layers.append(Downsample(skips[-1]))
            skips.append(skips[-1])
        for _ in range(config.blocks):
            layers.append(_block(config, level, skips[-1], outputs, width))
            skips.append(outputs)
    return layers, skips


def _decoder(config: UNetConfig, width: int, skips: list[int]) -> nn.ModuleList:
    """One block more a level than the encoder has, so that each of the encoder's outputs is used once."""
    layers, inputs, skips = nn.ModuleList(), skips[-1], list(skips)
    for level, outputs in reversed(list(enumerate(config.widths))):
        for _ in range(config.blocks + 1):
            layers.append(_block(config, level, inputs + skips.pop(), outputs, width))
            inputs = outputs
        if level > 0:
            layers.append(Upsample(outputs))
    return layers


def _block(config: UNetConfig, level: int, inputs: int, outputs: int, width: int) -> Block:
    head_channels = config.head_channels if _has_attention(config, level) else None
    return Block(inputs, outputs, width, config.groups, head_channels)


def _check_inputs(config: UNetConfig, x: Tensor, t: Tensor, y: Tensor | None) -> None:
    if x.ndim != 4 or x.shape[1] != config.image_channels:
        raise ValueError(f"x: expected shape [B, {config.image_channels}, H, W], got {list(x.shape)}")
    factor = config.downsampling
    if x.shape[2] % factor or x.shape[3] % factor:
        raise ValueError(f"x: expected a height and width divisible by {factor} (2^(levels-1)), got {x.shape[2]}x{x.shape[3]}")
    if t.shape != x.shape[:1]:
        raise ValueError(f"t: expected shape [{x.shape[0]}], got {list(t.shape)}")
    if y is not None:
        _check_labels(config, x, y)


def _check_labels(config: UNetConfig, x: Tensor, y: Tensor) -> None:
    if config.classes == 0:
        raise ValueError("y: expected None because the network has no classes, got a tensor")
    if y.dtype != torch.int64:
        raise TypeError(f"y: expected int64 labels, got {y.dtype}")
    if y.shape != x.shape[:1]:
        raise ValueError(f"y: expected shape [{x.shape[0]}], got {list(y.shape)}")
