"""The U-Net's convolutions: PyTorch's numbers in every dtype, layout and mode, and nothing kept for a gradient that nobody wants."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fm_fast as fm
from fm_fast.nn import convolution

LAYOUTS = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])


@LAYOUTS
@pytest.mark.parametrize("autocast", [False, True])
def test_16_bit_convolutions_without_16_bit_arithmetic_are_float32_rounded_once(autocast, layout, monkeypatch):
    monkeypatch.setattr(convolution, "EMULATED_ON_CPU", frozenset({torch.bfloat16}))
    layer, x = convolution.conv3x3(40, 8, stride=2), fm.noise((2, 40, 9, 8), seed=4, step=0).to(memory_format=layout)
    if not autocast:
        layer, x = layer.bfloat16(), x.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        output = layer(x)
    expected = F.conv2d(x.double(), layer.weight.double(), layer.bias.double(), stride=2, padding=1)
    assert output.dtype == torch.bfloat16 and output.is_contiguous(memory_format=layout)
    # Half a unit in the last place of bfloat16 is up to 2^-8 of the value (its significand has 8 bits), and a little for float32 sums.
    torch.testing.assert_close(output.double(), expected, rtol=2**-8 + 1e-6, atol=1e-5)
    output.sum().backward()
    assert layer.weight.grad.dtype == layer.weight.dtype and torch.isfinite(layer.weight.grad).all()


def test_convolutions_of_other_types_are_those_of_pytorch():
    layer, x = convolution.conv3x3(4, 8), fm.noise((2, 4, 5, 5), seed=4, step=0)
    assert torch.equal(layer(x), F.conv2d(x, layer.weight, layer.bias, padding=1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x.double().requires_grad_(False).float()).dtype == torch.bfloat16


def frozen(inputs=4, outputs=6, stride=2, dtype=torch.float64):
    return convolution.conv3x3(inputs, outputs, stride).to(dtype).requires_grad_(False)


def image(dtype=torch.float64, layout=torch.contiguous_format):
    return fm.noise((2, 4, 7, 6), seed=4, step=0).to(dtype).to(memory_format=layout).requires_grad_()


def kept_bytes(layer, x):
    """Bytes that autograd keeps of one call, but for the layer's own parameters."""
    own, kept = {p.data_ptr() for p in layer.parameters()}, {}

    def note(tensor):
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        layer(x)
    return sum(kept.values())


def test_frozen_convolutions_keep_no_activation():
    layer, x = frozen(), image()
    assert kept_bytes(layer, x) == 0
    assert kept_bytes(layer.requires_grad_(True), x) == x.nbytes


@LAYOUTS
@pytest.mark.parametrize(("dtype", "stride"), [(torch.float32, 1), (torch.float32, 2), (torch.float64, 2)])
def test_frozen_convolutions_are_those_of_pytorch(dtype, stride, layout):
    layer, x = frozen(stride=stride, dtype=dtype), image(dtype, layout)
    plain = F.conv2d(x, layer.weight, layer.bias, stride, padding=1)
    output, grad = layer(x), torch.randn_like(plain)
    (got,), (expected,) = (torch.autograd.grad(y, x, grad) for y in (output, plain))
    assert torch.equal(output, plain) and torch.equal(got, expected) and got.stride() == expected.stride()


@pytest.mark.parametrize("parameters_train", [False, True])
def test_one_image_without_a_batch(parameters_train):
    """[C, H, W], as nn.Conv2d takes it."""
    layer, x = frozen().requires_grad_(parameters_train), fm.noise((1, 4, 7, 6), seed=4, step=0)[0].double().requires_grad_()
    plain = F.conv2d(x, layer.weight, layer.bias, 2, padding=1)
    output, grad = layer(x), torch.randn_like(plain)
    (got,), (expected,) = (torch.autograd.grad(y, x, grad) for y in (output, plain))
    assert torch.equal(output, plain) and torch.equal(got, expected)


def test_frozen_convolutions_differentiate_twice():
    layer = frozen()
    assert torch.autograd.gradgradcheck(lambda x: layer(x).sin(), (image(),))


def test_frozen_convolutions_under_batched_gradients_and_checkpoints():
    layer, x = frozen(), image()
    output = layer(x)
    grads = torch.randn(3, *output.shape, dtype=output.dtype)
    (batched,) = torch.autograd.grad(output, x, grads, is_grads_batched=True, retain_graph=True)
    for grad, got in zip(grads, batched, strict=True):
        torch.testing.assert_close(got, torch.autograd.grad(output, x, grad, retain_graph=True)[0])
    (expected,) = torch.autograd.grad(output.sin().sum(), x)
    assert torch.equal(torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).sin().sum(), x)[0], expected)


def test_frozen_convolutions_under_transforms_and_autocast():
    layer, x = frozen(dtype=torch.float32), image(torch.float32)
    direction = torch.ones_like(x)
    _, tangent = torch.func.jvp(layer, (x,), (direction,))
    torch.testing.assert_close(tangent, F.conv2d(direction, layer.weight, None, 2, 1))
    per_sample = torch.func.vmap(torch.func.grad(lambda x: layer(x[None]).sin().sum()))(x)
    (whole,) = torch.autograd.grad(layer(x).sin().sum(), x)
    torch.testing.assert_close(per_sample, whole)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(x)
    assert output.dtype == torch.bfloat16
    (got,) = torch.autograd.grad(output.float().sum(), x)
    torch.testing.assert_close(got, torch.autograd.grad(layer(x).sum(), x)[0], rtol=0.05, atol=0.05)
