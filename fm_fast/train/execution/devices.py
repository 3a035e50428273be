"""The device of a run: which one, what it could do at best, and how much of its memory was used."""

import contextlib
import functools
import re
import sys
from collections.abc import Iterator

import torch

from fm_fast.nn.config import UNetConfig
from fm_fast.nn.unet import UNet

try:
    import resource
except ImportError:  # Windows
    resource = None

# Dense matrix products a second by the makers' data sheets: TFLOP/s in bfloat16, and in float32 by way of TF32. Longer names first.
PEAKS = {
    "H200": (989.0, 494.0),
    "H100 PCIe": (756.0, 378.0),
    "H100": (989.0, 494.0),
    "A100": (312.0, 156.0),
    "L40S": (362.0, 183.0),
    "RTX 4090": (165.0, 82.6),
}


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA where there is one, else the CPU. Raises ValueError for another, or one that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if re.fullmatch(r"cpu|cuda(:\d+)?", name) is None:
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name.startswith("cuda") and count == 0:
        raise ValueError(f"device: {name!r} was asked for, but torch finds no CUDA device")
    number = int(name.partition(":")[2] or 0)
    if number >= max(count, 1):
        raise ValueError(f"device: expected cuda:N with N at most {count - 1}, got {name!r}")
    return torch.device(name)


@contextlib.contextmanager
def autotuning(wanted: bool) -> Iterator[None]:
    """Whether cuDNN times its convolutions at first use, instead of guessing which is fastest."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = wanted
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def peak_tflops(device: torch.device, precision: str) -> float | None:
    """The device's best speed for that dtype of the weights, or None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peaks[precision == "float32"] for part, peaks in PEAKS.items() if part in name), None)


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that torch held on a GPU, or that the process had in memory, since it began; 0 where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@functools.cache
def flops_per_image(shape: UNetConfig) -> int:
    """Floating-point operations of the network's matrix products and convolutions, forward and backward, for one training image.

    Two a multiply-add; counted by torch on the meta device, so that nothing is computed or stored.
    """
    from torch.utils.flop_counter import FlopCounterMode  # it imports Triton, where that is installed

    side = shape.image_size
    with torch.device("meta"):
        model = UNet(shape).eval()
        x, t = torch.empty(1, shape.image_channels, side, side), torch.empty(1)
        condition = {"y": torch.zeros(1, dtype=torch.int64)} if shape.classes else {}
        if shape.low_resolution_channels:
            condition["low_resolution"] = torch.empty(1, shape.low_resolution_channels, side, side)
    with FlopCounterMode(display=False) as counter:
        model(x, t, **condition).sum().backward()
    return counter.get_total_flops()
