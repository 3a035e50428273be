"""Weights of other libraries' ADM U-Nets, read into ours by a map of names.

torchcfm's UNetModel and guided-diffusion's have the same names: ``input_blocks.4.0.in_layers.0.weight`` and so on, where ours say what a
part does. Two things differ beyond names. Their "legacy" joint projection of the attention is ordered by head, then (query, key, value),
ours by (query, key, value), then head, so its rows are permuted. And their table of classes has no null class: ours, in row 0, becomes
zero, which adds nothing to the embedding of the time.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from fm_fast.nn.attention import Attention
from fm_fast.nn.config import UNetConfig
from fm_fast.nn.layers import Block, Downsample, ResidualBlock, Upsample
from fm_fast.nn.unet import UNet

ATTENTION_ORDERS = ("legacy", "new")
# Dictionaries that training scripts store, which hold the wanted one under one of these names.
WRAPPINGS = ("ema_model", "net_model", "model", "state_dict")
DISTRIBUTED_PREFIX = "module."

# (our name, their name) of a module that has a weight and a bias
Pair = tuple[str, str]


def load_torchcfm(state_dict: Mapping[str, Tensor], config: UNetConfig, *, attention_order: str = "legacy", fused: bool = True) -> UNet:
    """Our U-Net with the weights of a torchcfm ``UNetModel`` or ``UNetModelWrapper``; for equal inputs their outputs are equal.

    Args:
        state_dict: of their network, as from its ``state_dict()``, also within DistributedDataParallel.
        config: the shape of that network, e.g. ``PRESETS["cifar10-torchcfm"]``. ``time_scale`` must be 1, as torchcfm feeds t unscaled.
        attention_order: "legacy", or "new" for a network made with ``use_new_attention_order=True``.
        fused: as for :class:`UNet`.

    Raises:
        ValueError: for names that are missing, unexpected or of another shape than ``config`` asks for, naming each.
    """
    if config.time_scale != 1.0:
        raise ValueError(f"config.time_scale: expected 1.0, since torchcfm's U-Net does not scale t, got {config.time_scale}")
    return _load(state_dict, config, attention_order, fused)


def load_guided_diffusion(
    state_dict: Mapping[str, Tensor], config: UNetConfig, *, attention_order: str = "legacy", fused: bool = True
) -> UNet:
    """Our U-Net with the weights of a guided-diffusion ``UNetModel`` or ``SuperResModel``, e.g. to train a flow from.

    The arguments are those of :func:`load_torchcfm`, but for the time, which guided-diffusion counts from 0 (data) to 1000 (noise): with
    ``time_scale=1000`` its timestep is 1000 t. It enlarges a low-resolution image bilinearly, we do so bicubically. A network that also
    learns its variance has twice as many output channels as any of ours.
    """
    return _load(state_dict, config, attention_order, fused)


def _load(state_dict: Mapping[str, Tensor], config: UNetConfig, attention_order: str, fused: bool) -> UNet:
    if attention_order not in ATTENTION_ORDERS:
        raise ValueError(f"attention_order: expected {' or '.join(ATTENTION_ORDERS)}, got {attention_order!r}")
    theirs = _unwrapped(state_dict)
    model = UNet(config, fused=fused)
    names = {f"{their}.{part}": f"{our}.{part}" for our, their in _pairs(model) for part in ("weight", "bias")}
    if config.classes:
        names["label_emb.weight"] = "label.table.weight"
    found = {names[name]: _converted(names[name], value, model, attention_order) for name, value in theirs.items() if name in names}
    _check(theirs, found, names, model.state_dict())
    model.load_state_dict(found)
    return model


def _unwrapped(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    wrappings = [name for name in WRAPPINGS if isinstance(state_dict.get(name), Mapping)]
    if wrappings:
        raise ValueError(f"state_dict: expected one of a network, got a checkpoint; pass its entry {' or '.join(map(repr, wrappings))}")
    return {name.removeprefix(DISTRIBUTED_PREFIX): value for name, value in state_dict.items()}


def _check(theirs: Mapping[str, Tensor], found: Mapping[str, Tensor], names: Mapping[str, str], ours: Mapping[str, Tensor]) -> None:
    """One error for all that does not fit, under the names of the given state dict."""
    problems = [f"missing {name}" for name in names if name not in theirs]
    problems += [f"unexpected {name}" for name in theirs if name not in names]
    for name, our in names.items():
        if our in found and found[our].shape != ours[our].shape:
            problems.append(f"{name} of shape {list(found[our].shape)} where {list(ours[our].shape)} was expected")
    if problems:
        raise ValueError(f"state_dict: does not fit the configuration: {'; '.join(problems)}")


def _converted(name: str, value: Tensor, model: UNet, attention_order: str) -> Tensor:
    """Their tensor as ours of this name has it."""
    if name == "label.table.weight":
        return torch.cat([torch.zeros_like(value[:1]), value])
    module, _, part = name.rpartition(".")
    owner, _, layer = module.rpartition(".")
    if layer == "query_key_value" and attention_order == "legacy":
        attention = model.get_submodule(owner)
        assert isinstance(attention, Attention)
        value = _by_part(value, attention.heads)
    # Theirs are convolutions over a row of pixels.
    return value[..., None] if layer in ("query_key_value", "projection") and part == "weight" and value.ndim == 3 else value


def _by_part(value: Tensor, heads: int) -> Tensor:
    """Rows ordered by head, then (query, key, value), reordered by (query, key, value), then head."""
    if value.shape[0] % (3 * heads):
        return value
    return value.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)


def _pairs(model: UNet) -> Iterator[Pair]:
    yield from (("time.first", "time_embed.0"), ("time.second", "time_embed.2"), ("stem", "input_blocks.0.0"))
    for index, layer in enumerate(model.encoder):
        yield from _layer_pairs(layer, f"encoder.{index}", f"input_blocks.{index + 1}", 0)
    yield from _residual_pairs(model.middle.first, "middle.first", "middle_block.0")
    yield from _attention_pairs("middle.attention", "middle_block.1")
    yield from _residual_pairs(model.middle.second, "middle.second", "middle_block.2")
    yield from _decoder_pairs(model)
    yield from (("norm", "out.0"), ("head", "out.2"))


def _decoder_pairs(model: UNet) -> Iterator[Pair]:
    """They count a layer that doubles the image as part of the block before it."""
    block, place = -1, 0
    for index, layer in enumerate(model.decoder):
        if isinstance(layer, Block):
            block, place = block + 1, 2 if isinstance(layer.attention, Attention) else 1
        yield from _layer_pairs(layer, f"decoder.{index}", f"output_blocks.{block}", 0 if isinstance(layer, Block) else place)


def _layer_pairs(layer: nn.Module, ours: str, theirs: str, place: int) -> Iterator[Pair]:
    """The pairs of one layer, the ``place``-th of the sequence that they call ``theirs``."""
    if isinstance(layer, Block):
        yield from _residual_pairs(layer.residual, f"{ours}.residual", f"{theirs}.0")
        if isinstance(layer.attention, Attention):
            yield from _attention_pairs(f"{ours}.attention", f"{theirs}.1")
    elif isinstance(layer, ResidualBlock):
        yield from _residual_pairs(layer, ours, f"{theirs}.{place}")
    elif isinstance(layer, Downsample):
        yield f"{ours}.conv", f"{theirs}.{place}.op"
    elif isinstance(layer, Upsample):
        yield f"{ours}.conv", f"{theirs}.{place}.conv"


def _residual_pairs(block: ResidualBlock, ours: str, theirs: str) -> Iterator[Pair]:
    yield f"{ours}.first_norm", f"{theirs}.in_layers.0"
    yield f"{ours}.first_conv", f"{theirs}.in_layers.2"
    yield f"{ours}.modulation", f"{theirs}.emb_layers.1"
    yield f"{ours}.second_norm", f"{theirs}.out_layers.0"
    yield f"{ours}.second_conv", f"{theirs}.out_layers.3"
    if isinstance(block.skip, nn.Conv2d):
        yield f"{ours}.skip", f"{theirs}.skip_connection"


def _attention_pairs(ours: str, theirs: str) -> Iterator[Pair]:
    yield f"{ours}.norm", f"{theirs}.norm"
    yield f"{ours}.query_key_value", f"{theirs}.qkv"
    yield f"{ours}.projection", f"{theirs}.proj_out"
