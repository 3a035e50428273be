"""Stored states of AdamWEMA, and those of torch.optim.AdamW."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fm_fast._ops.adamw_ema import APPLIED

# Settings of torch.optim.AdamW that say how it computes, or what this optimiser does not do.
FOREIGN = {"amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay"}


def is_adamw(state_dict: dict[str, Any]) -> bool:
    """Whether this is the state of torch.optim.AdamW, which has counts of its own kind and knows no averages."""
    return "amsgrad" in state_dict["param_groups"][0]


def from_adamw(state_dict: dict[str, Any], states: Sequence[dict[str, Tensor]]) -> dict[int, dict[str, Tensor]]:
    """The states of the parameters here, by torch's; one that has had no gradient there has none."""
    steps = {i: int(stored["step"]) for i, stored in state_dict["state"].items()}
    applied = max(steps.values(), default=0)
    return {i: _from_adamw(state_dict["state"].get(i, {}), steps.get(i, 0), applied, state) for i, state in enumerate(states)}


def _from_adamw(stored: dict[str, Tensor], steps: int, applied: int, state: dict[str, Tensor]) -> dict[str, Tensor]:
    moments = {name: stored.get(name, torch.zeros_like(state[name])) for name in ("exp_avg", "exp_avg_sq")}
    counts = torch.zeros_like(state["counts"])
    counts[APPLIED] = applied
    return {**state, **moments, "counts": counts, "updates": torch.full_like(state["updates"], steps)}


def known_settings(group: dict[str, Any]) -> dict[str, Any]:
    """Those of a stored group that this optimiser has."""
    for name in ("amsgrad", "maximize"):
        if group.get(name):
            raise ValueError(f"state_dict: expected {name}=False, which is all that this optimiser does, got {group[name]!r}")
    if not group.get("decoupled_weight_decay", True) and group["weight_decay"]:
        raise ValueError(f"state_dict: expected AdamW's weight decay, got Adam's, {group['weight_decay']}")
    return {name: value for name, value in group.items() if name not in FOREIGN}


def load(index: int, stored: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    """Write the stored state of a parameter into ``state``; ValueError if it is that of another."""
    if "counts" in stored:  # states of before parameters had counts of their own
        stored = {"updates": stored["counts"][APPLIED], **stored}
    if {name: value.shape for name, value in stored.items()} != {name: value.shape for name, value in state.items()}:
        raise ValueError(
            f"state_dict: expected {', '.join(state)} of parameter {index} in their shapes, got {', '.join(stored) or 'nothing'}"
        )
    for name, value in stored.items():
        state[name].copy_(value)
