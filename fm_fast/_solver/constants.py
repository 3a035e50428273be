"""The numbers of a plan, made by NumPy, as tensors on the device of the state."""

import functools

import numpy as np
import torch
from torch import Tensor

from fm_fast import _device, _ops

_read_by_graphs: list[Tensor] = []  # at every replay, so they are never freed


def constant(values: np.ndarray, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``values`` as a tensor that must not be written to. A GPU keeps it from one solve to the next, so that it is copied once.

    Raises RuntimeError while a CUDA graph is captured, unless an earlier solve has brought the same values there.
    """
    if device.type != "cuda" or not _ops.plainly_eager():
        return torch.from_numpy(values).to(device=device, dtype=dtype)
    made = _kept(values.tobytes(), values.dtype.str, values.shape, dtype, device)
    if _device.is_captured(device):
        _read_by_graphs.append(made)
    return made


@functools.lru_cache(maxsize=256)
def _kept(data: bytes, kind: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if _device.is_captured(device):
        raise RuntimeError(
            "a solve can be captured in a CUDA graph only after one with the same settings, which brings its times and coefficients to "
            "the device: call it once before the capture"
        )
    with torch.inference_mode(False):  # which would else mark the tensors for every later solve
        values = torch.from_numpy(np.frombuffer(bytearray(data), kind).reshape(shape))
        return _device.to_device(values.to(dtype), device)
