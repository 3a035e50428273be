"""Convolutions of the U-Net: PyTorch's, without what they keep or emulate needlessly."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fm_fast import _modes, _ops


def _emulated_on_cpu() -> frozenset[torch.dtype]:
    """The 16-bit types in which oneDNN has no convolution here: PyTorch's substitute is tens of times slower than float32."""
    available = torch.backends.mkldnn.is_available()
    supported = {
        torch.bfloat16: available and torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        torch.float16: available and torch.ops.mkldnn._is_mkldnn_fp16_supported(),
    }
    return frozenset(dtype for dtype, is_supported in supported.items() if not is_supported)


EMULATED_ON_CPU = _emulated_on_cpu()


class Convolution(nn.Conv2d):
    """nn.Conv2d, with three differences.

    Between 16-bit tensors on a CPU that has no 16-bit arithmetic it computes in float32, also under autocast. With its parameters
    frozen it keeps no activation for the backward pass, which is half the memory that a divergence takes. And where the kernels of ops
    ``conv3x3`` and ``conv_weight_grad`` are faster than PyTorch's, they compute it and its gradients, unless ``fused`` is False.
    """

    fused = True

    @property
    def keeps_size(self) -> bool:
        """Whether height and width stay, in the plainest way."""
        half = self.kernel_size[0] // 2
        plain = self.groups == 1 and self.padding_mode == "zeros" and self.dilation == (1, 1) and self.stride == (1, 1)
        return plain and self.kernel_size == (2 * half + 1,) * 2 and self.padding == (half, half)

    def forward(self, input: Tensor) -> Tensor:
        x, dtype = input, _computed(input)
        if x.device.type != "cpu" or dtype not in EMULATED_ON_CPU or "reference" not in self._kernels(x, self.weight):
            return self._convolved(x, self.weight, self.bias)
        with torch.autocast("cpu", enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return self._convolved(x.float(), self.weight.float(), bias).to(dtype)

    def _convolved(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.padding_mode != "zeros" or self.dilation != (1, 1) or self.groups != 1 or isinstance(self.padding, str):
            return self._conv_forward(x, weight, bias)
        kernels = self._kernels(x, weight)
        if _is_only_differentiated_in(x, weight, bias):
            return _FrozenConvolution.apply(x, weight, bias, self.stride, self.padding, kernels)
        if not _is_differentiated(x, weight, bias):
            return _convolve(x, weight, bias, self.stride, self.padding, kernels)
        if kernels.weight_grad == "reference" or not weight.requires_grad or x.is_inference():
            return F.conv2d(x, weight, bias, self.stride, self.padding)
        return _TrainedConvolution.apply(x, weight.view_as(weight), None if bias is None else bias.view_as(bias), kernels)

    def _kernels(self, x: Tensor, weight: Tensor) -> "Kernels":
        return _kernels(x, weight) if self.fused and self.keeps_size else PYTORCH


class Kernels(NamedTuple):
    """The backends of the ops of a convolution that keeps height and width; "reference" stands for PyTorch's."""

    conv3x3: str
    weight_grad: str


PYTORCH = Kernels("reference", "reference")


def _kernels(x: Tensor, weight: Tensor) -> Kernels:
    """Those that are faster than PyTorch's; none where a compiler, a transform or autocast looks for PyTorch's own convolution."""
    if x.device.type != "cpu" or not _modes.plainly_eager() or _modes.transforms_active() or torch.is_autocast_enabled("cpu"):
        return PYTORCH
    return Kernels(_ops.conv3x3_backend(x, weight), _ops.conv_weight_grad_backend(x, weight))


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, kernels: Kernels) -> Tensor:
    """The convolution, where no gradient is recorded."""
    if kernels.conv3x3 == "reference":
        return F.conv2d(x, weight, bias, stride, padding)
    return _ops.conv3x3(x, weight, bias, kernels.conv3x3)


def _is_differentiated(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether autograd will want any gradient."""
    wanted = x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    return wanted and torch.is_grad_enabled()


def _is_only_differentiated_in(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether autograd will want the gradient of x and of no parameter, and no transform looks for PyTorch's own convolution.

    Not of one image without a batch: PyTorch's gradients of convolutions, unlike the convolutions, want one.
    """
    if not (torch.is_grad_enabled() and x.requires_grad) or weight.requires_grad or (bias is not None and bias.requires_grad):
        return False
    if x.dim() != 4:
        return False
    return not torch.is_autocast_enabled(x.device.type) and _modes.plainly_eager() and not _modes.transforms_active()


class _TrainedConvolution(torch.autograd.Function):
    """A convolution that keeps height and width, whose parameters' gradients come from op ``conv_weight_grad``.

    The parameters come as views: of those autograd tells whether this backward pass, which may be one for x alone, wants their gradients.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, kernels: Kernels) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias_sizes, ctx.kernels = None if bias is None else [weight.shape[0]], kernels
        return _convolve(x, weight, bias, 1, weight.shape[2] // 2, kernels)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (grad_y,), (x, weight) = grads, ctx.saved_tensors
        wants_x = ctx.needs_input_grad[0]
        wants_parameters = [node is not None and torch._C._will_engine_execute_node(node) for node, _ in ctx.next_functions[1:]]
        padding = (weight.shape[2] // 2,) * 2
        if torch.is_grad_enabled() or _ops.is_batched(grad_y):
            # Without a bias there is no third input of which autograd could tell.
            wanted = (wants_x, *wants_parameters, False)[:3]
            return *_gradients(grad_y, x, weight, ctx.bias_sizes, (1, 1), padding, wanted), None
        grad_x, grad_weight, grad_bias = None, None, None
        if wants_x:
            grad_x = _gradient_of_input(grad_y, x, weight, (1, 1), padding, ctx.kernels)
        if any(wants_parameters):
            grad_weight, grad_bias = _ops.conv_weight_grad(grad_y, x, weight, ctx.bias_sizes is not None, ctx.kernels.weight_grad)
        return grad_x, grad_weight, grad_bias, None


def _gradient_of_input(grad_y: Tensor, x: Tensor, weight: Tensor, stride: Any, padding: Any, kernels: Kernels) -> Tensor | None:
    if kernels.conv3x3 != "reference":
        return _ops.conv3x3(grad_y, weight, None, kernels.conv3x3, transposed=True)
    return _gradients(grad_y, x, weight, None, stride, padding, (True, False, False))[0]


def _gradients(
    grad_y: Tensor, x: Tensor, weight: Tensor, bias_sizes: list[int] | None, stride: Any, padding: Any, wanted: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """PyTorch's, which can be differentiated again; in float32 where it would emulate."""
    dtype = x.dtype
    if x.device.type == "cpu" and dtype in EMULATED_ON_CPU:
        grad_y, x, weight = grad_y.float(), x.float(), weight.float()
    found = torch.ops.aten.convolution_backward(grad_y, x, weight, bias_sizes, stride, padding, (1, 1), False, (0, 0), 1, wanted)
    return tuple([None if gradient is None else gradient.to(dtype) for gradient in found])


class _FrozenConvolution(torch.autograd.Function):
    """A convolution that is differentiated in x alone: linear in x, so its derivative needs the weight and not x, which PyTorch's keeps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, kernels: Kernels) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.layout, ctx.stride, ctx.padding, ctx.kernels = (x.shape, x.stride()), stride, padding, kernels
        return _convolve(x, weight, bias, stride, padding, kernels)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (grad_y,), (weight,) = grads, ctx.saved_tensors
        kernels = PYTORCH if torch.is_grad_enabled() or _ops.is_batched(grad_y) else ctx.kernels
        # The op asks for x to know its shape and memory format. It does not read it, so memory that nobody has written to costs little.
        x = weight.new_empty_strided(*ctx.layout)
        return _gradient_of_input(grad_y, x, weight, ctx.stride, ctx.padding, kernels), None, None, None, None, None


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
