"""Numbers made by NumPy, those of a solve's plan above all, as tensors that a device keeps."""

import functools

import numpy as np
import torch
from torch import Tensor

from fm_fast import _modes

UNITS = np.eye(3, dtype=np.int64)
_read_by_graphs: list[Tensor] = []  # at every replay, so they are never freed


class NotKept(RuntimeError):
    """A constant that a CUDA graph would need has not been brought to its device."""


def constant(values: np.ndarray, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``values`` as a tensor that must not be written to.

    A GPU keeps it from one solve to the next: the first waits for the copy, which is then there for every stream, and no later one does.
    Raises NotKept while a CUDA graph is captured, unless an earlier solve has brought the same values there.
    """
    if not _is_kept_on(device):
        return torch.from_numpy(values).to(device=device, dtype=dtype)
    made = _kept(values.tobytes(), values.dtype.str, values.shape, dtype, device)
    if _modes.is_captured(device):
        _read_by_graphs.append(made)
    else:
        _hold(made, device)
    return made


def own_constant(values: np.ndarray, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The same in memory that no other solve reads."""
    if not _is_kept_on(device):
        return torch.from_numpy(values).to(device=device, dtype=dtype, copy=True)
    return constant(values, dtype, device).clone()


def unit_words(device: torch.device) -> Tensor | None:
    """int64 [3, 3], the rows (1, 0, 0), (0, 1, 0), (0, 0, 1), of which a kernel makes words that are numbers on the host.

    None where nothing is kept, and in a capture that comes before they have been asked for.
    """
    if not _is_kept_on(device):
        return None
    try:
        return constant(UNITS, torch.int64, device)
    except NotKept:
        return None


def _is_kept_on(device: torch.device) -> bool:
    return device.type == "cuda" and _modes.plainly_eager()


@functools.lru_cache(maxsize=256)
def _kept(data: bytes, kind: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if _modes.is_captured(device):
        raise NotKept(
            "a solve can be captured in a CUDA graph only after one with the same settings, which brings its times and coefficients to "
            "the device: call it once before the capture"
        )
    with torch.inference_mode(False):  # which would else mark the tensors for every later solve
        values = torch.from_numpy(np.frombuffer(bytearray(data), kind).reshape(shape))
        return _copied(values.to(dtype), device)


def _copied(values: Tensor, device: torch.device) -> Tensor:
    return values.to(device)


def _hold(values: Tensor, device: torch.device) -> None:
    """Until this stream has read them, even if they are forgotten before: another stream may have made them."""
    values.record_stream(torch.cuda.current_stream(device))
