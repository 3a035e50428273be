"""conv_weight_grad against NumPy in float64: shapes, layouts, threads, errors; and the layer that uses it, in every mode of autograd."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from page_faults import new_pages
from thread_counts import on_thread_counts, threads

import fm_fast as fm
from fm_fast import _backends, _ops, reference
from fm_fast._ops import conv_weight_grad as function
from fm_fast._ops import convolutions
from fm_fast.nn import UNet, UNetConfig, convolution
from fm_fast.nn.convolution import conv1x1, conv3x3

REASON = _backends.why_not("conv_weight_grad", "cpu", "cpp")
needs_cpp = pytest.mark.skipif(REASON is not None, reason=f"the C++ backend cannot run: {REASON}")
needs_default = pytest.mark.skipif(
    REASON is not None or _backends.ENVIRONMENT_BACKEND not in (None, "cpp"), reason="the layer does not choose the kernel here"
)
pytestmark = pytest.mark.usefixtures("poisoned_outputs")
# batch, inputs, outputs, height, width, size
SHAPES = [
    (2, 16, 16, 4, 4, 3), (1, 16, 16, 1, 1, 1), (1, 16, 32, 1, 1, 3), (3, 48, 32, 5, 7, 3), (2, 64, 48, 2, 3, 3), (9, 32, 80, 8, 8, 3),
    (70, 16, 16, 3, 3, 3), (1, 16, 16, 3, 100, 3), (5, 130, 16, 4, 4, 1), (3, 16, 272, 3, 3, 3), (0, 16, 16, 3, 3, 3), (2, 3, 16, 6, 5, 1),
    (3, 17, 144, 5, 7, 1), (9, 24, 64, 8, 8, 1), (40, 16, 32, 9, 8, 3), (2, 160, 80, 6, 4, 3), (2, 150, 80, 6, 4, 1),
    (2, 512, 464, 4, 5, 3),
]  # fmt: skip


def draw(*shape, index):
    return fm.noise(shape, seed=5, step=index).to(memory_format=torch.channels_last)


def problem(batch, inputs, outputs, height, width, size):
    """(grad_y, x, weight)"""
    weight = torch.empty(outputs, inputs, size, size)
    return draw(batch, outputs, height, width, index=1), draw(batch, inputs, height, width, index=2), weight


def exact(grad_y, x, weight):
    """Tap by tap in float64, and the sum of the magnitudes, in which rounding errors are measured."""
    half, (height, width) = weight.shape[2] // 2, x.shape[2:]
    padded = np.pad(x.double().numpy(), ((0, 0), (0, 0), (half, half), (half, half)))
    dy = grad_y.double().numpy()
    found, size = np.zeros(weight.shape), np.zeros(weight.shape)
    for i in range(weight.shape[2]):
        for j in range(weight.shape[3]):
            shifted = padded[:, :, i : i + height, j : j + width]
            found[:, :, i, j] = np.einsum("bohw,bchw->oc", dy, shifted)
            size[:, :, i, j] = np.einsum("bohw,bchw->oc", abs(dy), abs(shifted))
    return (found, dy.sum((0, 2, 3))), (size, abs(dy).sum((0, 2, 3)))


def assert_exact(got, arguments):
    """To a few roundings of the sum of magnitudes; those of nine taps mix, whose sums are made together, and some are doubled.

    And half a unit in the last place of the result.
    """
    (weight, bias), (weight_size, bias_size) = exact(*arguments)
    sizes = ((24.0 if arguments[2].shape[2] == 3 else 4.0) * weight_size.max((2, 3), keepdims=True), 4.0 * bias_size)
    for value, wanted, size in zip(got, (weight, bias), sizes, strict=True):
        error, last = np.abs(value.double().numpy() - wanted), 0.5 * torch.finfo(value.dtype).eps * np.abs(wanted)
        assert (error <= 2.0**-24 * size + last).all(), error.max()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_are_exact(shape, backend):
    arguments = problem(*shape)
    assert_exact(_ops.conv_weight_grad(*arguments, True, backend), arguments)


@needs_cpp
@pytest.mark.parametrize("shape", [SHAPES[3], SHAPES[5], SHAPES[6]], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_gradients_are_float32_rounded_once(dtype, shape):
    arguments = tuple(part.to(dtype) for part in problem(*shape))
    got = _ops.conv_weight_grad(*arguments, True, "cpp")
    assert got[0].dtype == got[1].dtype == dtype
    assert_exact(got, arguments)


def test_without_a_bias_there_is_no_gradient_of_one(backend):
    arguments = problem(*SHAPES[0])
    with_bias, without = (_ops.conv_weight_grad(*arguments, bias, backend) for bias in (True, False))
    assert without[1] is None and torch.equal(with_bias[0], without[0])


def test_layouts(backend):
    """The gradient of the weight lies as the weight does; grad_y may lie as it likes."""
    grad_y, x, weight = problem(*SHAPES[4])
    expected = _ops.conv_weight_grad(grad_y, x, weight, True, backend)
    for layout in (torch.channels_last, torch.contiguous_format):
        placed = weight.contiguous(memory_format=layout)
        got = _ops.conv_weight_grad(grad_y.contiguous(), x, placed, True, backend)
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
        assert backend == "reference" or got[0].stride() == placed.stride()
    sliced = torch.cat([grad_y, grad_y])[: len(grad_y)]
    assert torch.equal(_ops.conv_weight_grad(sliced, x, weight, True, backend)[0], expected[0])


@needs_cpp
def test_the_sums_do_not_depend_on_the_threads():
    arguments = problem(20, 32, 48, 6, 6, 3)
    first, *others = on_thread_counts(lambda: _ops.conv_weight_grad(*arguments, True, "cpp"))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@needs_cpp
@pytest.mark.parametrize("size", [1, 3])
def test_long_sums_of_one_sign_are_summed_in_parts(size):
    """One number after the other their roundings would add up: in size 1 to 3e-6 over these 262,144 positions."""
    grad_y, x = (fm.noise((256, 16, 32, 32), seed=5, step=n, kind="uniform").to(memory_format=torch.channels_last) for n in (1, 2))
    weight = torch.empty(16, 16, size, size)
    got, (expected, _) = _ops.conv_weight_grad(grad_y, x, weight, True, "cpp"), exact(grad_y, x, weight)
    for found, value in zip(got, expected, strict=True):
        assert abs(found.double().numpy() / value - 1).max() < 1e-6


@needs_cpp
def test_calls_keep_their_working_memory():
    """Though the sums of so many channels are more than glibc's allocator would keep."""
    arguments = problem(*SHAPES[-1])
    assert new_pages(lambda: _ops.conv_weight_grad(*arguments, True, "cpp")) < 36 * 512 * 464 * 4 / 4096


@needs_cpp
def test_nan_stays_where_it_belongs():
    grad_y, x, weight = problem(*SHAPES[0])
    x[0, 3, 1, 1] = float("nan")
    grad_weight, grad_bias = _ops.conv_weight_grad(grad_y, x, weight, True, "cpp")
    assert torch.isnan(grad_weight[:, 3]).all() and torch.isfinite(grad_bias).all()
    assert torch.isfinite(grad_weight[:, :3]).all() and torch.isfinite(grad_weight[:, 4:]).all()


BAD = {
    "float64 x": (lambda a: a.update(x=a["x"].double()), "x: expected float32, bfloat16 or float16"),
    "bfloat16 grad_y": (lambda a: a.update(grad_y=a["grad_y"].bfloat16()), "grad_y: expected the dtype of x"),
    "bfloat16 of size 1": (lambda a: a.update(x=a["x"].bfloat16(), grad_y=a["grad_y"].bfloat16(),
                                              grad_weight=torch.empty(16, 16, 1, 1, dtype=torch.bfloat16)),
                           "grad_weight: expected float32 for size 1"),
    "contiguous x": (lambda a: a.update(x=a["x"].contiguous()), "x: expected channels_last"),
    "other width": (lambda a: a.update(x=draw(2, 16, 4, 5, index=2)), "grad_y: expected batch, height and width of x"),
    "few outputs": (lambda a: a.update(grad_y=draw(2, 8, 4, 4, index=1)), "grad_y: expected a multiple of 16"),
    "three dimensions": (lambda a: a.update(x=a["x"][0]), r"x: expected \[B, C, H, W\]"),
    "size 5": (lambda a: a.update(grad_weight=torch.empty(16, 16, 5, 5)), "grad_weight: expected a size of 1 or 3"),
    "few inputs": (lambda a: a.update(x=a["x"][:, :8].contiguous(memory_format=torch.channels_last), grad_weight=torch.empty(16, 8, 3, 3)),
                   "grad_weight: expected a multiple of 16 input channels for size 3"),
    "other channels": (lambda a: a.update(grad_weight=torch.empty(16, 17, 3, 3)), "grad_weight: expected the channels"),
    "short bias": (lambda a: a.update(grad_bias=torch.empty(15)), r"grad_bias: expected \[O\] of the dtype of x"),
    "a gradient": (lambda a: a["x"].requires_grad_(), "x: .*requires grad"),
}  # fmt: skip


@needs_cpp
@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_of_the_raw_op_are_named(name):
    change, message = BAD[name]
    grad_y, x, weight = problem(*SHAPES[0])
    arguments = {"grad_weight": weight, "grad_bias": torch.empty(16), "grad_y": grad_y, "x": x}
    change(arguments)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fm_fast.conv_weight_grad.default(*arguments.values())


@needs_cpp
def test_opcheck():
    grad_y, x, weight = problem(*SHAPES[0])
    torch.library.opcheck(torch.ops.fm_fast.conv_weight_grad.default, (torch.zeros_like(weight), torch.zeros(16), grad_y, x))


# The layer


@pytest.fixture
def chosen(monkeypatch):
    """The layer uses the kernel whatever the instruction set; the number of its calls."""
    calls, kernel = [], function.__globals__["_conv_weight_grad"]["cpp"]
    monkeypatch.setattr(convolutions, "FASTER_ON", (_backends.cpu_isa(),))
    monkeypatch.setitem(function.__globals__["_conv_weight_grad"], "cpp", lambda *arguments: calls.append(1) or kernel(*arguments))
    return calls


def gradients(layer, x, grad_y):
    return torch.autograd.grad(layer(x), [x, *layer.parameters()], grad_y)


def plain(layer, x):
    return F.conv2d(x, layer.weight, layer.bias, padding=layer.padding)


@needs_default
@pytest.mark.parametrize("build", [conv1x1, conv3x3])
def test_the_layer_is_pytorchs(build, chosen):
    layer, x, grad_y = build(16, 32), draw(2, 16, 5, 4, index=3).requires_grad_(), draw(2, 32, 5, 4, index=4)
    torch.testing.assert_close(layer(x), plain(layer, x), rtol=1e-5, atol=1e-5)
    expected = torch.autograd.grad(plain(layer, x), [x, *layer.parameters()], grad_y)
    got = gradients(layer, x, grad_y)
    assert chosen == [1]
    if build is conv1x1:  # of which the forward pass and the gradient of x are PyTorch's own
        assert torch.equal(layer(x), plain(layer, x)) and torch.equal(got[0], expected[0])
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@needs_default
def test_parameters_alone_and_the_input_alone(chosen):
    """Nothing is computed that nobody asked for."""
    layer, x, grad_y = conv3x3(16, 16), draw(2, 16, 5, 4, index=3), draw(2, 16, 5, 4, index=4)
    layer(x).backward(grad_y)
    assert chosen == [1] and layer.weight.grad is not None and layer.bias is not None and layer.bias.grad is not None
    x.requires_grad_()
    (alone,) = torch.autograd.grad(layer(x), x, grad_y)
    assert chosen == [1]
    torch.testing.assert_close(alone, torch.autograd.grad(plain(layer, x), x, grad_y)[0], rtol=1e-5, atol=1e-5)
    layer.weight.requires_grad_(False)
    (bias,) = torch.autograd.grad(layer(x), [layer.bias], grad_y)
    assert chosen == [1]
    torch.testing.assert_close(bias, grad_y.sum((0, 2, 3)))


@needs_default
@pytest.mark.parametrize("bias", [True, False])
def test_second_derivatives_and_many_gradients_at_once_are_pytorchs(bias, chosen):
    layer = convolution.Convolution(16, 16, 3, padding=1, bias=bias)
    x, grad_y = (draw(2, 16, 5, 4, index=index).requires_grad_() for index in (3, 4))

    def twice(function):
        first = torch.autograd.grad(function(x), [x, layer.weight], grad_y, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), [x, layer.weight, grad_y])

    for a, b in zip(twice(layer), twice(lambda x: plain(layer, x)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)
    several = torch.randn(3, *grad_y.shape)
    batched = torch.autograd.grad(layer(x), layer.weight, several, is_grads_batched=True)[0]
    for grad, got in zip(several, batched, strict=True):
        torch.testing.assert_close(got, torch.autograd.grad(plain(layer, x), layer.weight, grad)[0], rtol=1e-4, atol=1e-4)
    assert chosen == []


@needs_default
def test_where_the_kernel_does_not_run(chosen, monkeypatch):
    """Other layouts, types, shapes, transforms, compilers and autocast: PyTorch's convolution, without a word."""
    monkeypatch.setattr(convolution, "EMULATED_ON_CPU", frozenset())  # or autocast would compute in float32
    layer, x = conv3x3(16, 16), draw(2, 16, 5, 4, index=3)
    layer(x.contiguous()).sum().backward()
    conv3x3(16, 16, stride=2)(x).sum().backward()
    conv3x3(16, 24)(x).sum().backward()
    conv3x3(8, 16)(x[:, :8].contiguous(memory_format=torch.channels_last)).sum().backward()
    conv3x3(16, 16).double()(x.double()).sum().backward()
    torch.func.grad(lambda w: torch.func.functional_call(layer, {"weight": w}, (x,)).sum())(layer.weight.detach())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(x).sum().backward()
    torch.compile(layer, backend="aot_eager", fullgraph=True)(x).sum().backward()
    assert chosen == []
    layer(x).sum().backward()
    assert chosen == [1]


@needs_default
def test_plain_layers_stay_plain(chosen):
    """UNet(fused=False) is PyTorch's, convolutions included."""
    config = UNetConfig(8, 1, 0, channels=16, multipliers=(1, 2), blocks=1, attention_sizes=(), head_channels=8, groups=4)
    x = draw(2, 1, 8, 8, index=3)
    for fused in (True, False):
        before = len(chosen)
        UNet(config, fused=fused)(x, torch.tensor([0.2, 0.7])).sum().backward()
        assert (len(chosen) > before) == fused


@needs_default
def test_kinds_of_tensors_that_the_kernel_does_not_know_are_pytorchs(chosen):
    class Marked(torch.Tensor):
        pass

    layer, x = conv3x3(16, 16), draw(2, 16, 5, 4, index=3)
    layer(x.as_subclass(Marked)).sum().backward()
    assert chosen == []


@needs_default
def test_the_layer_keeps_its_input_and_weight_alone(chosen):
    layer, x, kept = conv3x3(16, 16), draw(2, 16, 5, 4, index=3).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.data_ptr()) or tensor, lambda tensor: tensor):
        layer(x)
    assert kept == [x.data_ptr(), layer.weight.data_ptr()]


@needs_default
def test_inputs_made_in_inference_mode_are_pytorchs_to_refuse(chosen):
    with torch.inference_mode():
        x = draw(2, 16, 5, 4, index=3)
    with pytest.raises(RuntimeError, match=r"[Ii]nference tensors cannot be saved"):
        conv3x3(16, 16)(x)


def test_the_reference_is_the_formula():
    arguments = problem(*SHAPES[3])
    assert_exact(reference.conv_weight_grad(*arguments), arguments)


def test_the_choice_is_made_by_instruction_set_and_backend(monkeypatch):
    _, x, weight = problem(*SHAPES[0])
    monkeypatch.setattr(convolutions, "FASTER_ON", ())
    assert _ops.conv_weight_grad_backend(x, weight) == "reference"
    monkeypatch.setattr(convolutions, "FASTER_ON", (_backends.cpu_isa(),))
    assert _ops.conv_weight_grad_backend(x, weight) == _backends.resolve("conv_weight_grad", x.device)
    monkeypatch.setattr(_backends, "ENVIRONMENT_BACKEND", "reference")
    assert _ops.conv_weight_grad_backend(x, weight) == "reference"


@needs_default
def test_two_threads_run_backward_at_once(chosen):
    """As DataParallel and pipelines do."""
    from concurrent.futures import ThreadPoolExecutor

    layer, x, grad_y = conv3x3(16, 16), draw(8, 16, 5, 4, index=3), draw(8, 16, 5, 4, index=4)
    with threads(1), ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: torch.autograd.grad(layer(x), list(layer.parameters()), grad_y), range(8)))
    assert all(torch.equal(a, b) for other in found for a, b in zip(found[0], other, strict=True))


def test_a_device_without_autocast_is_no_obstacle():
    """Networks are measured on the meta device, which has no autocast."""
    layer = conv3x3(16, 16).to("meta")
    assert layer(torch.empty(2, 16, 5, 4, device="meta")).shape == (2, 16, 5, 4)
