"""Numbers of the host on a device, brought there without waiting for the work that is queued on it."""

import torch
from torch import Tensor


def is_captured(device: torch.device) -> bool:
    """Whether a CUDA graph is being recorded: what is copied from the host now would be copied again at every replay."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on ``device``. From memory that is not pinned the copy would wait for the device."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)
