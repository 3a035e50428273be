"""What a device is doing."""

import torch


def is_captured(device: torch.device) -> bool:
    """Whether a CUDA graph is being recorded: what is copied from the host now would be copied again at every replay."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
