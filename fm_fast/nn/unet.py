"""The reference U-Net, of the type of Dhariwal & Nichol (2021, "Diffusion models beat GANs", ADM), used by Lipman et al. (2023).

Written from the papers. A stem, an encoder of residual blocks between which the image is halved, a middle block with attention, and a
decoder that takes the encoder's outputs in reverse order as additional channels.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fm_fast import _checks, _modes
from fm_fast.nn.attention import Attention
from fm_fast.nn.config import UNetConfig
from fm_fast.nn.convolution import Convolution, conv3x3, zeroed
from fm_fast.nn.embedding import ClassEmbedding, TimeEmbedding, dtype_of
from fm_fast.nn.layers import Block, BlockSettings, ResidualBlock, downsample, upsample
from fm_fast.nn.norm import GroupNormSiLU

NO_KEY = (-1, 0, 0)


class UNet(nn.Module):
    """Called `model(x, t, y=labels)`; predicts whatever the objective asks for, in the shape of x.

    x: [B, image_channels, H, W], H and W divisible by `config.downsampling`, any floating dtype (cast to the weights').
    t: float [B], time in [0, 1]. y: int64 [B], a class or -1 for the null class; None means -1 for every sample.
    low_resolution: [B, low_resolution_channels, h, w], the image to be super-resolved (Lipman et al., section 6.3), which is enlarged to
    H x W by bicubic interpolation and joined to the channels of x, as in Saharia et al. (2021, "SR3").
    Returns [B, image_channels, H, W]. The last convolution starts at zero, hence so does the output.

    Dropout follows the noise contract: its masks are a function of `dropout_key`, int64 (seed, step, id of the first sample), which a
    training step sets by :meth:`set_dropout_key`, or gives to the call: as a call within torch.utils.checkpoint must get it where the key
    is set again before the backward pass, since it is run a second time then.

    fused=False computes everything by plain PyTorch, equal up to rounding, masks included. Second derivatives in training mode (gradient
    penalties) need it wherever op ``attention`` has no kernel, since PyTorch's has none.

    Raises ValueError for a shape that does not fit, a key that was never set or a class that there is not (where y can be read without
    waiting for a device), TypeError for labels that are not int64.
    """

    def __init__(self, config: UNetConfig, *, fused: bool = True) -> None:
        super().__init__()
        self.config, self.fused = config, fused
        width = 4 * config.channels
        settings = BlockSettings(width, config.groups, config.dropout, config.scale_shift, fused)
        # Not a buffer: DistributedDataParallel would give every process the key of the first.
        place = torch.empty(0).device  # where weights are made; a key has values also where these have none yet
        self.dropout_key = torch.tensor(NO_KEY, dtype=torch.int64, device="cpu" if place.type == "meta" else place)
        self._has_key = False  # looking at its values would make the host wait for a GPU, and ends a compiled graph
        self.time = TimeEmbedding(config.channels, width, config.time_scale)
        self.label = ClassEmbedding(config.classes, width) if config.classes else None
        self.stem = conv3x3(config.image_channels + config.low_resolution_channels, config.widths[0])
        self.encoder, skips = _encoder(config, settings)
        self.middle = _Middle(config, settings)
        self.decoder = _decoder(config, settings, skips)
        self.norm = GroupNormSiLU(config.groups, config.widths[0], fused=fused)
        self.head = zeroed(conv3x3(config.widths[0], config.image_channels))
        self._number_dropouts()
        for layer in self.modules():
            if isinstance(layer, Convolution):
                layer.fused = fused

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor | None = None, low_resolution: Tensor | None = None, dropout_key: Tensor | None = None
    ) -> Tensor:
        _check_inputs(self.config, x, t, y, low_resolution)
        embedding, key = self._embed(t, y), self._key(x, dropout_key)
        h = self.stem(self._joined(x, low_resolution))
        skips = [h]
        for layer in self.encoder:
            h = layer(h, embedding, key)
            skips.append(h)
        h = self.middle(h, embedding, key)
        for layer in self.decoder:
            h = layer(h, embedding, key, skips.pop()) if isinstance(layer, Block) else layer(h, embedding, key)
        return self.head(self.norm(h))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "UNet":
        """What `to`, `to_empty` and `type` do: the key follows to the device, with its values, but not to one that has none."""
        super()._apply(fn, recurse)
        device = fn(self.dropout_key).device
        if device.type != "meta":
            self.dropout_key = self.dropout_key.to(device)
        return self

    @torch.no_grad()
    def set_dropout_key(self, seed: int | Tensor, step: int | Tensor, first_id: int | Tensor = 0) -> None:
        """Choose the masks of the next call in training mode, in place, without a wait for the device: a captured graph may do it.

        seed in [0, 2^63), step and first_id (of the batch's samples, which are numbered from it on) in [0, 2^32), or int64 tensors.
        """
        _checks.whole("seed", seed, _checks.MAX_SEED)
        _checks.whole("step", step, _checks.WORD)
        _checks.whole("first_id", first_id, _checks.WORD)
        device = next(self.parameters()).device  # of weights that were assigned to a network on the meta device
        if device not in (self.dropout_key.device, torch.device("meta")):
            self.dropout_key = self.dropout_key.to(device)
        for place, value in zip(self.dropout_key, (seed, step, first_id), strict=True):
            place.copy_(value.reshape(())) if isinstance(value, Tensor) else place.fill_(value)
        self._has_key = True

    def _number_dropouts(self) -> None:
        """Each dropout gets its own part of the noise stream, in the order in which the blocks run."""
        blocks = [module for module in self.modules() if isinstance(module, ResidualBlock)]
        for index, block in enumerate(blocks):
            block.second_norm.index = index

    def _key(self, x: Tensor, given: Tensor | None) -> Tensor | None:
        """The key of this call, which the backward pass needs as it is now."""
        if not self.training or self.config.dropout == 0.0:
            return None
        if given is None and not self._has_key and _modes.has_values(x):
            raise ValueError(
                "dropout_key: expected set_dropout_key(seed, step, first_id) before each training step, but it was never called"
            )
        return self.dropout_key.to(x.device, copy=True) if given is None else _checked_key(given, x)

    def _embed(self, t: Tensor, y: Tensor | None) -> Tensor:
        embedding = self.time(t)
        if self.label is not None:
            null = torch.full(t.shape, -1, dtype=torch.int64, device=t.device)
            embedding = embedding + self.label(null if y is None else y)
        return F.silu(embedding)

    def _joined(self, x: Tensor, low_resolution: Tensor | None) -> Tensor:
        image = x.to(dtype_of(self.stem, x.dtype))
        if low_resolution is not None:
            enlarged = F.interpolate(low_resolution.to(image.dtype), size=x.shape[2:], mode="bicubic")
            image = torch.cat([image, enlarged], dim=1)
        # The fused layers train a seventh faster in this layout (CPU, float32); the plain ones keep what they are given. Compiled for the
        # CPU both are as fast, and the compiler fails at copies into it where it knows no sizes (torch 2.13).
        keeps = not self.fused or _modes.transforms_active() or (_modes.is_compiling() and image.is_cpu)
        return image if keeps else image.to(memory_format=torch.channels_last)


def _checked_key(key: object, x: Tensor) -> Tensor:
    _checks.tensor("dropout_key", key)
    assert isinstance(key, Tensor)
    if key.dtype != torch.int64 or key.shape != (3,):
        raise ValueError(f"dropout_key must be int64 of shape [3], (seed, step, first id), got {key.dtype} of shape {tuple(key.shape)}")
    _checks.same_device("dropout_key", key, x, "x")
    return key.contiguous()


class _Middle(nn.Module):
    """Residual block, attention, residual block at the coarsest level."""

    def __init__(self, config: UNetConfig, settings: BlockSettings) -> None:
        super().__init__()
        channels = config.widths[-1]
        self.first = ResidualBlock(channels, channels, settings)
        self.attention = Attention(channels, config.heads_of(channels), config.groups, settings.fused)
        self.second = ResidualBlock(channels, channels, settings)

    def forward(self, x: Tensor, embedding: Tensor, key: Tensor | None = None) -> Tensor:
        return self.second(self.attention(self.first(x, embedding, key)), embedding, key)


def _encoder(config: UNetConfig, settings: BlockSettings) -> tuple[nn.ModuleList, list[int]]:
    """The encoder's layers, and the channels of the stem's and of each layer's output."""
    layers, skips = nn.ModuleList(), [config.widths[0]]
    for level, outputs in enumerate(config.widths):
        if level > 0:
            layers.append(downsample(config.resampling, skips[-1], settings))
            skips.append(skips[-1])
        for _ in range(config.blocks):
            layers.append(_block(config, level, skips[-1], settings))
            skips.append(outputs)
    return layers, skips


def _decoder(config: UNetConfig, settings: BlockSettings, skips: list[int]) -> nn.ModuleList:
    """One block more a level than the encoder has, so that each of the encoder's outputs is used once."""
    layers, inputs, skips = nn.ModuleList(), skips[-1], list(skips)
    for level, outputs in reversed(list(enumerate(config.widths))):
        for _ in range(config.blocks + 1):
            layers.append(_block(config, level, inputs + skips.pop(), settings))
            inputs = outputs
        if level > 0:
            layers.append(upsample(config.resampling, outputs, settings))
    return layers


def _block(config: UNetConfig, level: int, inputs: int, settings: BlockSettings) -> Block:
    outputs = config.widths[level]
    return Block(inputs, outputs, settings, config.heads_of(outputs) if config.has_attention(level) else 0)


def _check_inputs(config: UNetConfig, x: Tensor, t: Tensor, y: Tensor | None, low_resolution: Tensor | None) -> None:
    _check_floating("x", x, "a floating tensor")
    if x.ndim != 4 or x.shape[1] != config.image_channels:
        raise ValueError(f"x: expected shape [B, {config.image_channels}, H, W], got {list(x.shape)}")
    factor = config.downsampling
    if x.shape[2] % factor or x.shape[3] % factor:
        raise ValueError(f"x: expected a height and width divisible by {factor} (2^(levels-1)), got {x.shape[2]}x{x.shape[3]}")
    _check_floating("t", t, f"a floating tensor of shape [{x.shape[0]}]")
    if t.shape != x.shape[:1]:
        raise ValueError(f"t: expected shape [{x.shape[0]}], got {list(t.shape)}")
    if y is not None:
        _check_labels(config, x, y)
    _check_low_resolution(config, x, low_resolution)


def _check_floating(name: str, value: object, expected: str) -> None:
    """Whole numbers are grey levels or steps, in another scale than the network's inputs."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"{name}: expected {expected}, got {value.dtype if isinstance(value, Tensor) else type(value).__name__}")


def _check_labels(config: UNetConfig, x: Tensor, y: Tensor) -> None:
    if config.classes == 0:
        raise ValueError("y: expected None because the network has no classes, got a tensor")
    if not isinstance(y, Tensor):
        raise TypeError(f"y: expected int64 labels [{x.shape[0]}], got {type(y).__name__}")
    if y.dtype != torch.int64:
        raise TypeError(f"y: expected int64 labels, got {y.dtype}")
    if y.shape != x.shape[:1]:
        raise ValueError(f"y: expected shape [{x.shape[0]}], got {list(y.shape)}")
    if _modes.values_readable(y) and len(y):
        _check_range(config, *map(int, y.aminmax()))


def _check_range(config: UNetConfig, low: int, high: int) -> None:
    if low < -1 or high >= config.classes:
        got = low if low < -1 else high
        raise ValueError(f"y: expected classes in 0..{config.classes - 1}, or -1 for none, got {got}")


def _check_low_resolution(config: UNetConfig, x: Tensor, low_resolution: Tensor | None) -> None:
    channels = config.low_resolution_channels
    if low_resolution is None:
        if channels:
            raise ValueError(f"low_resolution: expected shape [{x.shape[0]}, {channels}, h, w], got None")
        return
    if channels == 0:
        raise ValueError("low_resolution: expected None because the network has no low_resolution_channels, got a tensor")
    _check_floating("low_resolution", low_resolution, "a floating tensor, in the scale of the data")
    if low_resolution.ndim != 4 or low_resolution.shape[:2] != (x.shape[0], channels):
        raise ValueError(f"low_resolution: expected shape [{x.shape[0]}, {channels}, h, w], got {list(low_resolution.shape)}")
