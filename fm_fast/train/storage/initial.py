"""Weights of another run to begin with, as for fine-tuning on other data."""

from dataclasses import fields

import torch
from torch import Tensor

from fm_fast.nn.config import UNetConfig
from fm_fast.train.config import TrainConfig
from fm_fast.train.step import build_model
from fm_fast.train.storage.weights import load_model

Weights = dict[str, Tensor]
FREE = ("image_size", "classes", "dropout")  # in which the networks may differ, as long as the same weights follow


def initial_weights(config: TrainConfig) -> tuple[Weights, str]:
    """(those of the run `config.init_from` that fit, a line about it). The class embedding begins anew where the classes are others.

    Raises ValueError for a run with another objective or network, and as :func:`load_model` does.
    """
    source, stored = load_model(config.init_from)
    if stored.objective != config.objective:
        raise ValueError(f"objective: expected {stored.objective}, as of init_from {config.init_from}, got {config.objective}")
    _require_alike("preconditioned", stored, config, *(run.recipe.preconditioned for run in (stored, config)))
    _require_alike("sigma_min", stored, config, *(run.recipe.path for run in (stored, config)))
    with torch.device("meta"):
        wanted = {name: value.shape for name, value in build_model(config).state_dict().items()}
    found = source.state_dict()
    shapes = {name: value.shape for name, value in found.items()}
    differing = {name for name in wanted.keys() | shapes.keys() if wanted.get(name) != shapes.get(name)}
    differences = _differences(stored.model, config.model)
    if differences or not all(_is_of_classes(name) for name in differing):
        sizes = stored.model.image_size, config.model.image_size
        reason = differences or (f"images of {sizes[0]} pixels, not {sizes[1]}" if sizes[0] != sizes[1] else "other weights")
        raise ValueError(f"init_from: expected a run with the same network, {config.init_from} has {reason}")
    text = f"begins with the average of {config.init_from}"
    if any(name in wanted for name in differing):
        text += f", but for the embedding of the classes: {stored.model.classes} there, {config.model.classes} here"
    return {name: value for name, value in found.items() if name not in differing}, text


def _require_alike(name: str, stored: TrainConfig, config: TrainConfig, there: object, here: object) -> None:
    """What a setting makes of a recipe; the same weights would mean something else with another."""
    if there != here:
        expected, found = getattr(stored, name), getattr(config, name)
        raise ValueError(f"{name}: expected {expected}, as of init_from {config.init_from}, got {found}")


def _is_of_classes(name: str) -> bool:
    return ".label." in f".{name}"


def _differences(found: UNetConfig, wanted: UNetConfig) -> str:
    names = [entry.name for entry in fields(UNetConfig) if entry.name not in FREE]
    pairs = [(name, getattr(found, name), getattr(wanted, name)) for name in names]
    return ", ".join(f"model.{name} {old}, not {new}" for name, old, new in pairs if old != new)
