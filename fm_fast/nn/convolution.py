"""Convolutions of the U-Net: PyTorch's, but never the 16-bit ones that a CPU without 16-bit arithmetic emulates."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HALF_TYPES = (torch.bfloat16, torch.float16)


def _emulated_on_cpu() -> frozenset[torch.dtype]:
    """The 16-bit types in which oneDNN has no convolution here: PyTorch's substitute is tens of times slower than float32."""
    if not torch.backends.mkldnn.is_available():
        return frozenset(HALF_TYPES)
    supported = (torch.ops.mkldnn._is_mkldnn_bf16_supported(), torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return frozenset(dtype for dtype, is_supported in zip(HALF_TYPES, supported, strict=True) if not is_supported)


EMULATED_ON_CPU = _emulated_on_cpu()


class Convolution(nn.Conv2d):
    """nn.Conv2d, with float32 arithmetic between 16-bit tensors on a CPU that has no other, also under autocast."""

    def forward(self, input: Tensor) -> Tensor:
        x, dtype = input, _computed(input)
        if x.device.type != "cpu" or dtype not in EMULATED_ON_CPU:
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return F.conv2d(x.float(), self.weight.float(), bias, self.stride, self.padding).to(dtype)


def _computed(x: Tensor) -> torch.dtype:
    """The dtype in which PyTorch would convolve x, which is also that of the result."""
    if x.device.type == "cpu" and torch.is_autocast_enabled("cpu") and x.dtype != torch.float64:
        return torch.get_autocast_dtype("cpu")
    return x.dtype


def conv1x1(inputs: int, outputs: int) -> Convolution:
    """The same linear map at every pixel."""
    return Convolution(inputs, outputs, kernel_size=1)


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> Convolution:
    """Keeps the size of [B, C, H, W]; divides it with stride > 1."""
    return Convolution(inputs, outputs, kernel_size=3, stride=stride, padding=1)


def zeroed(layer: Convolution) -> Convolution:
    """The same layer with its weight and bias set to zero: a block that ends in one starts as the identity."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
