"""``options`` of torchdiffeq's methods: those that are followed, those that change no result, and those that are refused.

As in torchdiffeq, the options of fixed-step methods have no effect on adaptive ones, and theirs none on fixed-step ones, and a warning says
so. An option at its default is no option.
"""

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fm_fast import _checks
from fm_fast.compat._methods import MAX_STEPS

DEFAULTS: dict[str, Any] = {
    "step_size": None, "grid_constructor": None, "interp": "linear", "perturb": False,
    "max_num_steps": MAX_STEPS, "first_step": None, "min_step": 0, "safety": 0.9, "ifactor": 10.0, "dfactor": 0.2, "dtype": torch.float64,
    "max_step": math.inf, "step_t": None, "jump_t": None, "norm": None,
}  # fmt: skip
FOLLOWED_BY_FIXED, FOLLOWED_BY_ADAPTIVE = ("step_size", "grid_constructor"), ("max_num_steps",)
# Without these, results would be others: evaluations beside the ends of steps; steps that find what longer ones pass; what an error is.
REFUSED_BY_FIXED, REFUSED_BY_ADAPTIVE = ("perturb",), ("max_step", "step_t", "jump_t", "norm")


@dataclass(frozen=True)
class Options:
    """What is followed, at its default for the other kind of methods."""

    step_size: Any = None
    grid_constructor: Callable[..., Tensor] | None = None
    max_num_steps: int = MAX_STEPS


def number(value: Any) -> Any:
    """Of a tensor that holds one number, as programs pass them, the number."""
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def same(value: Any, other: Any) -> bool:
    """Whether two settings are equal; of tensors, functions and other objects, whether they are one."""
    value, other = number(value), number(other)
    if isinstance(value, Mapping) and isinstance(other, Mapping):
        return value.keys() == other.keys() and all(same(value[name], other[name]) for name in value)
    return value is other or (isinstance(value, int | float | str) and isinstance(other, int | float | str) and value == other)


def read_options(options: Mapping[str, Any] | None, method: str, adaptive: bool, stacklevel: int) -> Options:
    """The options that the method follows. ValueError for others that would change results, or that no method has."""
    given = {name: number(value) for name, value in dict(options or {}).items()}
    _check_known(given)
    asked = {name: value for name, value in given.items() if not same(value, DEFAULTS[name])}
    _check_covered(asked, method, REFUSED_BY_ADAPTIVE if adaptive else REFUSED_BY_FIXED)
    followed = FOLLOWED_BY_ADAPTIVE if adaptive else FOLLOWED_BY_FIXED
    # Of fixed steps no norm is taken, and torchdiffeq says nothing either.
    if ignored := [name for name in asked if name not in (*followed, "norm")]:
        steps = "follow rtol and atol alone" if adaptive else "are given by t, step_size or grid_constructor, and split at every time of t"
        warnings.warn(f"options without effect on the method {method!r}, whose steps {steps}: {', '.join(ignored)}", stacklevel=stacklevel)
    found = Options(**{name: value for name, value in asked.items() if name in followed})
    _check_followed(found)
    return found


def _check_known(given: Mapping[str, Any]) -> None:
    if unknown := [name for name in given if name not in DEFAULTS]:
        raise ValueError(f"options must be among {', '.join(DEFAULTS)}, got {', '.join(map(repr, unknown))}")
    _checks.one_of("options['interp']", given.get("interp", "linear"), ("linear", "cubic"))


def _check_covered(asked: Mapping[str, Any], method: str, refused: tuple[str, ...]) -> None:
    if found := [name for name in asked if name in refused]:
        raise ValueError(
            f"options must not hold {', '.join(map(repr, found))} for the method {method!r}: it would change results, and is not covered"
        )


def _check_followed(options: Options) -> None:
    _checks.count("options['max_num_steps']", options.max_num_steps)
    if options.grid_constructor is None:
        return
    if options.step_size is not None:
        raise ValueError("options must hold 'step_size' or 'grid_constructor', not both")
    if not callable(options.grid_constructor):
        raise TypeError(f"options['grid_constructor'] must be callable as (func, y0, t), got {type(options.grid_constructor).__name__}")
