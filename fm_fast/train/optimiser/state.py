"""Stored states of AdamWEMA, and those of torch.optim.AdamW."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fm_fast._ops.adamw_ema import APPLIED

# Settings of torch.optim.AdamW that say how it computes, or what this optimiser does not do.
FOREIGN = {"amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay"}


def in_order(state_dict: dict[str, Any]) -> dict[int, dict[str, Tensor]]:
    """The states by the places of their parameters in the groups: by what ids the groups name them is free, as in torch's optimisers.

    ``torch.distributed.checkpoint`` uses names. ValueError for a state of none of them.
    """
    ids = [name for group in state_dict["param_groups"] for name in group["params"]]
    unknown = set(state_dict["state"]) - set(ids)
    if unknown:
        raise ValueError(f"state_dict: expected states of the parameters of its groups, got others: {', '.join(sorted(map(str, unknown)))}")
    return {place: state_dict["state"][name] for place, name in enumerate(ids) if name in state_dict["state"]}


def is_adamw(state_dict: dict[str, Any]) -> bool:
    """Whether this is the state of torch.optim.AdamW, which has counts of its own kind and knows no averages."""
    return "amsgrad" in state_dict["param_groups"][0]


def from_adamw(found: dict[int, dict[str, Tensor]], states: Sequence[dict[str, Tensor]]) -> dict[int, dict[str, Tensor]]:
    """The states of the parameters here, by torch's; one that has had no gradient there has none."""
    steps = {i: int(stored["step"]) for i, stored in found.items()}
    applied = max(steps.values(), default=0)
    return {i: _from_adamw(found.get(i, {}), steps.get(i, 0), applied, state) for i, state in enumerate(states)}


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
    found, expected = ({name: tuple(value.shape) for name, value in values.items()} for values in (stored, state))
    if found != expected:
        wrong = [name for name in {**expected, **found} if found.get(name) != expected.get(name)]
        shown = [", ".join(f"{name} {shapes[name]}" for name in wrong if name in shapes) for shapes in (expected, found)]
        raise ValueError(f"state_dict: expected {shown[0] or 'no more'} of parameter {index}, got {shown[1] or 'none'}")
    for name, value in stored.items():
        state[name].copy_(value)
