"""The shape of a U-Net as a frozen value, checked when it is made."""

from dataclasses import dataclass, field
from typing import Any

from fm_fast._fields import check_types, require

RESAMPLING = ("convolution", "pool", "block")


def _described(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class UNetConfig:
    """Shape of a U-Net. `UNetConfig.digits()` is the smallest; presets.py has those of the paper and of other libraries.

    Raises ValueError where the numbers do not fit together, e.g. a width that `groups` does not divide, TypeError for other than numbers.
    """

    image_size: int = _described(32, "height and width of the images that attention_sizes refers to")
    image_channels: int = _described(3, "colour channels of the images")
    classes: int = _described(0, "number of classes; 0 for an unconditional network")
    channels: int = _described(64, "width of the first level")
    multipliers: tuple[int, ...] = _described((1, 2, 2), "width of each level, as a multiple of channels")
    blocks: int = _described(2, "residual blocks a level")
    attention_sizes: tuple[int, ...] = _described((16,), "feature-map heights at which the blocks have attention")
    head_channels: int = _described(64, "channels an attention head; 0 where heads is given")
    groups: int = _described(32, "groups of every GroupNorm")
    dropout: float = _described(0.0, "probability with which an activation of a residual block is zeroed in training")
    heads: int = _described(0, "attention heads of every width; 0 where head_channels is given")
    scale_shift: bool = _described(True, "scale and shift a block's second norm by the embedding; otherwise add the embedding before it")
    resampling: str = _described("convolution", f"how levels change their size: {', '.join(RESAMPLING)} (a residual block)")
    time_scale: float = _described(1000.0, "factor of t, in [0, 1], before the sinusoids")
    low_resolution_channels: int = _described(0, "channels of the image to be super-resolved; 0 for none")

    def __post_init__(self) -> None:
        _check(self)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(self.channels * multiplier for multiplier in self.multipliers)

    @property
    def downsampling(self) -> int:
        """The factor that must divide the height and width of an image."""
        return 2 ** (len(self.multipliers) - 1)

    def heads_of(self, width: int) -> int:
        """Attention heads of a level with this many channels."""
        return self.heads or width // self.head_channels

    def has_attention(self, level: int) -> bool:
        """Whether the blocks of this level end in attention."""
        return self.image_size // 2**level in self.attention_sizes

    @classmethod
    def digits(cls) -> "UNetConfig":
        """For the 8x8 digits: seconds to train on a CPU; 0.7 M parameters."""
        return cls(8, 1, 10, channels=32, multipliers=(1, 2), blocks=1, attention_sizes=(4,), head_channels=32, groups=8)

    @classmethod
    def small(cls) -> "UNetConfig":
        """For 32x32 colour images in 10 classes, e.g. CIFAR-10, on one GPU; 7 M parameters."""
        return cls(classes=10)


def _check(config: UNetConfig) -> None:
    check_types(config)
    for name in ("image_size", "image_channels", "channels", "blocks", "groups"):
        require(name, getattr(config, name) >= 1, "at least 1", getattr(config, name))
    for name in ("classes", "heads", "head_channels", "low_resolution_channels"):
        require(name, getattr(config, name) >= 0, "0 or more", getattr(config, name))
    require("dropout", 0.0 <= config.dropout < 1.0, "a probability in [0, 1)", config.dropout)
    require("multipliers", bool(config.multipliers) and min(config.multipliers) >= 1, "one positive number a level", config.multipliers)
    require("channels", config.channels % 2 == 0, "an even number (sines and cosines of the time)", config.channels)
    require("resampling", config.resampling in RESAMPLING, f"one of {', '.join(RESAMPLING)}", config.resampling)
    require("time_scale", config.time_scale > 0.0, "a positive number", config.time_scale)
    if (config.heads == 0) == (config.head_channels == 0):
        raise ValueError(f"heads, head_channels: expected one of them and 0 for the other, got {config.heads} and {config.head_channels}")
    _check_widths(config)


def _check_widths(config: UNetConfig) -> None:
    for width in config.widths:
        require("groups", width % config.groups == 0, f"a divisor of every level's width {config.widths}", config.groups)
    name = "heads" if config.heads else "head_channels"
    attended = {width for level, width in enumerate(config.widths) if config.has_attention(level)} | {config.widths[-1]}
    for width in sorted(attended):
        require(name, width % getattr(config, name) == 0, f"a divisor of the attended width {width}", getattr(config, name))
