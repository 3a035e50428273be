"""Whether two data sets are the same, wherever they lie: what a checkpoint remembers of the data that its run was trained on."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fm_fast.train.config import TrainConfig
from fm_fast.train.data import SHIPPED, Dataset

LOOKED_AT = 16  # images whose pixels are compared: a data set may be larger than memory
PREPARED_BY = ("resize", "grey", "pool", "pad", "test_share")


def identity_of(dataset: Dataset) -> dict[str, Any]:
    """Plain values: numbers of images, classes and grey levels, their shape, and digests of all labels and of a few images' pixels."""
    rows = torch.linspace(0, len(dataset) - 1, min(len(dataset), LOOKED_AT), dtype=torch.float64).long()
    return {
        "images": len(dataset), "shape": list(dataset.images.shape[1:]), "classes": dataset.classes, "levels": dataset.levels,
        "labels": _digest(dataset.labels), "pixels": _digest(dataset.images[rows.to(dataset.images.device)]),
    }  # fmt: skip


def _digest(values: Tensor) -> str:
    return hashlib.sha256(values.cpu().contiguous().numpy().tobytes()).hexdigest()


def same_source(one: str, other: str) -> bool:
    """Whether two settings `data` name one place."""
    return one == other or (not {one, other} & SHIPPED and Path(one).expanduser().resolve() == Path(other).expanduser().resolve())


def data_conflicts(stored: TrainConfig, known: dict[str, Any] | None, asked: TrainConfig, found: dict[str, Any] | None) -> list[str]:
    """In what the data of a resumed run may not differ from those it was trained on, but do.

    known, found: identities. Their places count where one is missing, as in the first checkpoints that were written, or where the images
    are prepared in another way.
    """
    prepared_alike = all(getattr(stored, name) == getattr(asked, name) for name in PREPARED_BY)
    if known is None or found is None or not prepared_alike:
        return [] if same_source(stored.data, asked.data) else [f"data: {stored.data} -> {asked.data}"]
    other = [name for name in found if known.get(name) != found[name]]
    parts = [f"other {name}" if name in ("labels", "pixels") else f"{name}: {known.get(name)} -> {found[name]}" for name in other]
    return [f"data: {stored.data} -> {asked.data} ({', '.join(parts)})"] if parts else []
