"""Op ``conv_weight_grad``: where its kernel may run, and its call."""

import torch
from torch import Tensor

from fm_fast import _backends, reference
from fm_fast._ops import schemas
from fm_fast._ops.convolutions import fills_tiles, is_convolved_here
from fm_fast._ops.guard import absent, needs_reference

_conv_weight_grad = schemas.op("conv_weight_grad")

OUTPUTS = 16  # the kernel's: a number of channels of y must be a multiple of it
INPUTS = 16  # with fewer PyTorch's is as fast; of size 3 their number must be a multiple


def conv_weight_grad_backend(x: Tensor, weight: Tensor) -> str:
    """The backend for a convolution of size 2 r + 1 that keeps height and width.

    The reference where PyTorch's kernel is as fast, or ours does not know the shape, layout, dtype or kind of tensor.
    """
    outputs, inputs, size = weight.shape[:3]
    known = inputs >= INPUTS and x.dtype == torch.float32 if size == 1 else size == 3 and inputs % INPUTS == 0
    if not known or outputs % OUTPUTS or not is_convolved_here(x, weight) or (size == 3 and not fills_tiles(x, weight)):
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
    # Hooks of saved tensors may give x back in another layout.
    grad_y, x = (part.contiguous(memory_format=torch.channels_last) for part in (grad_y, x))
    _conv_weight_grad[backend](grad_weight, grad_bias, grad_y, x)
    return grad_weight, grad_bias if with_bias else None
