"""Op ``conv_weight_grad``: where its kernel may run, and its call."""

import torch
from torch import Tensor

from fm_fast import _backends, reference
from fm_fast._ops import schemas
from fm_fast._ops.guard import absent, needs_reference

_conv_weight_grad = schemas.op("conv_weight_grad")

OUTPUTS = 16  # the kernel's: a number of channels of y must be a multiple of it
INPUTS = 16  # with fewer PyTorch's is as fast
SIZES = (1, 3)
PLAIN = (Tensor, torch.nn.Parameter)  # not tensors in shards, which raw ops would take for whole
# Instruction sets with which the kernel was measured to be faster than oneDNN's, which PyTorch calls; not measured with avx512.
FASTER_ON = ("avx2",)
_ISA = _backends.cpu_isa()


def conv_weight_grad_backend(x: Tensor, weight: Tensor) -> str:
    """The backend for a convolution of size 2 r + 1 that keeps height and width.

    The reference where PyTorch's kernel is as fast, or ours does not know the shape, layout, dtype or kind of tensor.
    """
    if _ISA not in FASTER_ON or x.device.type != "cpu" or not x.dtype == weight.dtype == torch.float32:
        return "reference"
    if type(x) is not Tensor or type(weight) not in PLAIN:
        return "reference"
    outputs, inputs, size = weight.shape[:3]
    known = outputs % OUTPUTS == 0 and inputs >= INPUTS and size in SIZES and x.dim() == 4
    if not known or not x.is_contiguous(memory_format=torch.channels_last):
        return "reference"
    return _backends.resolve("conv_weight_grad", x.device)


def conv_weight_grad(grad_y: Tensor, x: Tensor, weight: Tensor, with_bias: bool, backend: str) -> tuple[Tensor, Tensor | None]:
    """Gradients of the weight [O, C, size, size], in its layout, and of the bias [O] or None.

    See :func:`fm_fast.reference.conv_weight_grad`; ``backend`` is what :func:`conv_weight_grad_backend` says.
    """
    if needs_reference(backend, grad_y, x):
        grad_weight, grad_bias = reference.conv_weight_grad(grad_y, x, weight)
        return grad_weight, grad_bias if with_bias else None
    grad_weight, grad_bias = torch.empty_like(weight), weight.new_empty(weight.shape[0]) if with_bias else absent(weight)
    _conv_weight_grad[backend](grad_weight, grad_bias, grad_y.contiguous(memory_format=torch.channels_last), x)
    return grad_weight, grad_bias if with_bias else None
