"""Errors that users see: each names the argument, what was expected and what came."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor

from fm_fast import _modes

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MAX_SEED = 2**63
WORD = 2**32
WHOLE_NUMBERS = (int, np.integer)
NUMBERS = (int, float, np.integer, np.floating)


def is_number(value: object) -> TypeGuard[float]:
    """A real number of Python's or NumPy's; True and False are none."""
    return isinstance(value, NUMBERS) and not isinstance(value, bool)


def is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, WHOLE_NUMBERS) and not isinstance(value, bool)


def tensor(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.is_nested:
        raise TypeError(f"{name} must be a dense tensor, got a nested one; pad it, and give a weight of 0 where there is padding")
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got {x.layout}; use {name}.to_dense()")


def explain_call(error: Exception, x: Tensor, t: Tensor, cond: Mapping[str, Any]) -> None:
    """Add to a model's own error how it was called: one that takes (t, x), as for torchdiffeq, fails anywhere."""
    add_note = getattr(error, "add_note", None)  # of Python 3.11 and later
    if add_note is None or isinstance(error, torch.OutOfMemoryError):
        return
    inputs = ", ".join(f"{name} {_kind(value, x.device)}" for name, value in {"x": x, "t": t, **cond}.items())
    names = "".join(f", {name}" for name in cond)
    add_note(f"fm_fast called model(x, t{names}) with {inputs}; a network that takes (t, x) needs lambda x, t: network(t, x)")


def _kind(value: object, device: torch.device) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    elsewhere = f" on {value.device}" if value.device != device else ""
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}{elsewhere}"


def one_of(name: str, value: object, choices: Sequence[object]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}")


def data(x1: Tensor) -> None:
    tensor("x1", x1)
    if x1.dtype not in FLOATING and x1.dtype != torch.uint8:
        raise TypeError(f"x1 must be float64, float32, bfloat16, float16 or uint8, got {x1.dtype}; scale other integers yourself")
    if x1.dim() == 0:
        raise ValueError("x1 must have a batch dimension [B, ...], got a scalar")


def like(name: str, x: Tensor, x1: Tensor, other: str = "x1") -> None:
    """A floating tensor of x1's shape on x1's device; messages call x1 ``other``."""
    tensor(name, x)
    floating(name, x)
    if x.shape != x1.shape:
        raise ValueError(f"{name} must have the shape of {other}, {tuple(x1.shape)}, got {tuple(x.shape)}")
    same_device(name, x, x1, other)


def floating(name: str, x: Tensor) -> None:
    if x.dtype not in FLOATING:
        raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, got {x.dtype}")


def condition(cond: object, name: str = "cond") -> None:
    if cond is not None and not isinstance(cond, Mapping):
        raise TypeError(f"{name} must be a mapping of keyword arguments of the model, got {type(cond).__name__}")


def same_device(name: str, x: Tensor, x1: Tensor, other: str = "x1") -> None:
    if x.device != x1.device:
        raise ValueError(f"{name} must be on the device of {other}, {x1.device}, got {x.device}")


def time(t: object, x1: Tensor, name: str = "x1") -> None:
    """A number in [0, 1] or a floating tensor [] or [B] on the device of x1, which messages call ``name``."""
    if is_number(t):
        if not 0.0 <= t <= 1.0:
            raise ValueError(f"t must lie in [0, 1], got {t}")
        return
    tensor("t", t)
    assert isinstance(t, Tensor)
    if t.dtype not in FLOATING:
        raise TypeError(f"t must be a floating tensor, got {t.dtype}")
    if t.dim() > 1 or (t.dim() == 1 and t.shape[0] != x1.shape[0]):
        raise ValueError(f"t must be a number, a scalar tensor or have shape [{x1.shape[0]}], got {tuple(t.shape)}")
    same_device("t", t, x1, name)
    if _modes.values_readable(t) and not bool(((t >= 0) & (t <= 1)).all()):
        raise ValueError(f"t must lie in [0, 1], got values from {float(t.min())} to {float(t.max())}")


def weight(value: object, x1: Tensor) -> None:
    """A tensor [B], or one of as many dimensions as x1 that broadcasts to its shape."""
    if callable(value) and not isinstance(value, Tensor):
        raise TypeError(f"weight must be a torch.Tensor, got {type(value).__name__}; weights of t are computed from the t of sample_path")
    tensor("weight", value)
    assert isinstance(value, Tensor)
    if value.is_complex():
        raise TypeError(f"weight must be real, got {value.dtype}")
    same_device("weight", value, x1)
    if value.dim() == 1 and value.shape[0] == x1.shape[0]:
        return
    if value.dim() < 2 or not _broadcasts(tuple(value.shape), tuple(x1.shape)):
        raise ValueError(
            f"weight must have shape [{x1.shape[0]}] or {x1.dim()} dimensions that broadcast to {tuple(x1.shape)}, got {tuple(value.shape)}"
        )


def _broadcasts(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    return len(shape) == len(target) and all(a in (1, b) for a, b in zip(shape, target, strict=True))


def whole(name: str, value: object, limit: int) -> None:
    """A whole number in [0, limit), or an int64 scalar tensor."""
    if type(value) is int and 0 <= value < limit:  # as nearly always
        return
    if isinstance(value, Tensor):
        if value.dtype != torch.int64 or value.numel() != 1:
            raise TypeError(f"{name} must be a whole number or an int64 scalar tensor, got {value.dtype} of shape {tuple(value.shape)}")
        if not _modes.values_readable(value):
            return
        value = int(value)
    if not (is_whole(value) or isinstance(value, torch.SymInt)):
        raise TypeError(f"{name} must be a whole number or an int64 scalar tensor, got {type(value).__name__}")
    if not 0 <= value < limit:
        raise ValueError(f"{name} must lie in [0, {limit}), got {value}")


def sample_ids(ids: object, batch: int, device: torch.device) -> None:
    """None, a whole number (the first id) as such or as an int64 scalar tensor, or an int64 tensor [B]."""
    if ids is None:
        return
    if not isinstance(ids, Tensor):
        if not (is_whole(ids) or isinstance(ids, torch.SymInt)):
            raise TypeError(f"sample_ids must be a whole number or an int64 tensor [] or [{batch}], got {type(ids).__name__}")
        return whole("sample_ids", ids, WORD - batch + 1)
    if ids.dtype != torch.int64 or ids.shape not in ((batch,), ()):
        raise ValueError(f"sample_ids must be a whole number or int64 of shape [{batch}], got {ids.dtype} of shape {tuple(ids.shape)}")
    if ids.device != device:
        raise ValueError(f"sample_ids must be on {device}, got {ids.device}")
    if ids.dim() == 0:
        return whole("sample_ids", ids, WORD - batch + 1)
    if batch and _modes.values_readable(ids) and not (int(ids.min()) >= 0 and int(ids.max()) < WORD):
        raise ValueError(f"sample_ids must lie in [0, {WORD}), got values from {int(ids.min())} to {int(ids.max())}")


def probability(name: str, value: object) -> None:
    if type(value) is float and 0.0 <= value <= 1.0:  # as nearly always
        return
    if not 0.0 <= finite_number(name, value) <= 1.0:
        raise ValueError(f"{name} must lie in [0, 1], got {value}")


def grey_levels(levels: object) -> None:
    if not is_whole(levels) or not 2 <= levels <= 256:
        raise ValueError(f"levels must be a whole number in [2, 256], got {levels!r}")


def data_map(x1: Tensor, flip: float, levels: int, dequantise: bool) -> None:
    """The arguments that say how x1 is read: flip needs rows, levels and dequantise need uint8."""
    if flip > 0.0 and x1.dim() < 3:
        raise ValueError(f"flip mirrors the last dimension of [B, C, ..., W] data, got x1 of shape {tuple(x1.shape)}")
    grey_levels(levels)
    if levels != 256 and x1.dtype != torch.uint8:
        raise ValueError(f"levels is for uint8 x1, which it maps to [-1, 1], got {levels} for {x1.dtype}")
    if x1.dtype == torch.uint8 and levels < 256 and x1.numel() and _modes.values_readable(x1) and int(x1.max()) >= levels:
        raise ValueError(f"x1 must lie in 0..{levels - 1} for levels={levels}, got values up to {int(x1.max())}")
    if not isinstance(dequantise, bool):
        raise TypeError(f"dequantise must be True or False, got {dequantise!r}")
    if dequantise and x1.dtype != torch.uint8:
        raise ValueError(f"dequantise needs uint8 x1, got {x1.dtype}")


def finite_number(name: str, value: object) -> float:
    if not is_number(value):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return value


def state(name: str, x: object) -> None:
    """A floating tensor [B, ...], the state of a solve."""
    tensor(name, x)
    assert isinstance(x, Tensor)
    floating(name, x)
    if x.dim() == 0:
        raise ValueError(f"{name} must have a batch dimension [B, ...], got a scalar")


def count(name: str, value: object) -> None:
    """A whole number of at least 1."""
    if not is_whole(value):
        raise TypeError(f"{name} must be a whole number, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def positive_number(name: str, value: object) -> None:
    if finite_number(name, value) <= 0.0:
        raise ValueError(f"{name} must be positive, got {value}")
