"""Checks of frozen dataclasses of settings: every field holds what its annotation says, its numbers are finite, and they fit."""

import functools
import math
from collections.abc import Collection
from typing import Any, get_args, get_origin, get_type_hints

ONE = {int: "a whole number", float: "a number", bool: "True or False", str: "text"}
SEVERAL = {int: "a tuple of whole numbers", float: "a tuple of numbers"}


def check_types(settings: Any, unlimited: Collection[str] = ()) -> None:
    """Raises TypeError, naming the field, for a value of another type, and ValueError for a number that is not finite.

    A whole number may stand for a float; True and False are no numbers. A list, as JSON and YAML have it, becomes the tuple that is meant.
    unlimited: names of fields that may be infinite.
    """
    for name, hint in _hints(type(settings)).items():
        if get_origin(hint) is not tuple:
            _check_one(name, getattr(settings, name), hint, name in unlimited)
            continue
        if type(getattr(settings, name)) is list:
            object.__setattr__(settings, name, tuple(getattr(settings, name)))
        _check_tuple(name, getattr(settings, name), hint)


def require(name: str, holds: bool, expected: str, got: object) -> None:
    """ValueError that names the field unless its value fits."""
    if not holds:
        raise ValueError(f"{name}: expected {expected}, got {got!r}")


@functools.cache
def _hints(settings: type) -> dict[str, Any]:
    return get_type_hints(settings)


def _check_one(name: str, value: object, kind: type, unlimited: bool) -> None:
    if not _is_of(kind, value):
        raise TypeError(f"{name}: expected {ONE.get(kind, f'a {kind.__name__}')}, got {value!r}")
    if kind is float and not (_is_finite(value) or (unlimited and value == math.inf)):
        raise ValueError(f"{name}: expected a finite number, got {value!r}")


def _check_tuple(name: str, value: object, hint: Any) -> None:
    kind = get_args(hint)[0]
    if type(value) is not tuple or not all(_is_of(kind, part) for part in value):
        raise TypeError(f"{name}: expected {SEVERAL[kind]}, got {value!r}")
    if not all(map(_is_finite, value)):
        raise ValueError(f"{name}: expected finite numbers, got {value!r}")


def _is_of(kind: type, value: object) -> bool:
    # Exactly these types: a checkpoint that holds others, such as numpy's numbers or paths, cannot be read without running code.
    return isinstance(value, kind) if kind not in ONE else type(value) is kind or (kind is float and type(value) is int)


def _is_finite(value: Any) -> bool:
    return abs(value) < math.inf
