"""conv3x3 against NumPy in float64: shapes, layouts, threads, errors; and the layer that uses it, in every mode of autograd."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from page_faults import new_pages
from thread_counts import on_thread_counts

import fm_fast as fm
from fm_fast import _backends, _ops
from fm_fast._ops import conv3x3 as function
from fm_fast._ops import convolutions
from fm_fast.nn import UNet, UNetConfig, convolution
from fm_fast.nn.convolution import conv3x3

REASON = _backends.why_not("conv3x3", "cpu", "cpp")
needs_cpp = pytest.mark.skipif(REASON is not None, reason=f"the C++ backend cannot run: {REASON}")
needs_default = pytest.mark.skipif(
    REASON is not None or _backends.ENVIRONMENT_BACKEND not in (None, "cpp"), reason="the layer does not choose the kernel here"
)
pytestmark = pytest.mark.usefixtures("poisoned_outputs")
# batch, inputs, outputs, height, width
SHAPES = [
    (2, 16, 16, 4, 4), (1, 16, 32, 1, 1), (3, 48, 32, 5, 7), (1, 16, 16, 1, 100), (1, 32, 16, 99, 2), (70, 16, 16, 3, 3),
    (2, 272, 48, 4, 6), (0, 16, 16, 3, 3), (3, 64, 160, 9, 8), (7, 32, 32, 17, 13), (1, 512, 464, 4, 5),
]  # fmt: skip
SIXTEEN_BITS = (torch.bfloat16, torch.float16)


def draw(*shape, index):
    return fm.noise(shape, seed=6, step=index).to(memory_format=torch.channels_last)


def problem(batch, inputs, outputs, height, width, transposed=False):
    """(x, weight, bias)"""
    weight = draw(*((inputs, outputs) if transposed else (outputs, inputs)), 3, 3, index=2)
    return draw(batch, inputs, height, width, index=1), weight, fm.noise((outputs,), seed=6, step=3)


def exact(x, weight, bias, transposed):
    """Tap by tap in float64, and the sum of the magnitudes, in which rounding errors are measured."""
    w = weight.double().numpy()
    w = w[:, :, ::-1, ::-1].swapaxes(0, 1) if transposed else w
    height, width = x.shape[2:]
    padded = np.pad(x.double().numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)))
    found = np.zeros((len(x), len(w), height, width)) + bias.double().numpy()[:, None, None]
    size = np.abs(found)
    for i in range(3):
        for j in range(3):
            shifted = padded[:, :, i : i + height, j : j + width]
            found += np.einsum("bchw,oc->bohw", shifted, w[:, :, i, j])
            size += np.einsum("bchw,oc->bohw", abs(shifted), abs(w[:, :, i, j]))
    return found, size


def assert_exact(got, arguments, transposed=False):
    """To a few roundings of the largest sum of magnitudes: the numbers of a tile are sums and differences of each other's, some doubled.

    And half a unit in the last place of the result.
    """
    wanted, size = exact(*arguments, transposed)
    error, last = np.abs(got.double().numpy() - wanted), 0.5 * torch.finfo(got.dtype).eps * np.abs(wanted)
    assert (error <= 8.0 * 2.0**-24 * size.max(initial=0.0) + last).all(), error.max()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_results_are_exact(shape, transposed, backend):
    arguments = problem(*shape, transposed)
    got = _ops.conv3x3(*arguments, backend, transposed)
    assert_exact(got, arguments, transposed)
    assert got.is_contiguous(memory_format=torch.channels_last) or backend == "reference"


@needs_cpp
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", SHAPES[1:6], ids=str)
@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
def test_16_bit_results_are_float32_rounded_once(dtype, shape, transposed):
    arguments = tuple(part.to(dtype) for part in problem(*shape, transposed))
    got = _ops.conv3x3(*arguments, "cpp", transposed)
    assert got.dtype == dtype and got.is_contiguous(memory_format=torch.channels_last)
    assert_exact(got, arguments, transposed)


@needs_cpp
@pytest.mark.parametrize("index", [3, 4])
def test_rounding_errors_are_about_twice_those_of_pytorch(index):
    """The root mean square over a whole image, against float64. A tile's polynomials, and not the sums, make them."""
    x, weight = draw(4, 64, 16, 16, index=index), draw(64, 64, 3, 3, index=index + 10)
    wanted = F.conv2d(x.double(), weight.double(), padding=1)
    ours, torchs = (
        (y.double() - wanted).square().mean().sqrt() for y in (_ops.conv3x3(x, weight, None, "cpp"), F.conv2d(x, weight, padding=1))
    )
    assert ours < 2.5 * torchs and ours < 3e-5


def error_of_points(points):
    """The relative root mean square error of F(4x4, 3x3) in NumPy's float32, for 64 channels and these points beside 0 and infinity."""
    points, rng = np.array([0.0, *points]), np.random.default_rng(0)
    others = [np.delete(points, i) for i in range(5)]
    transform = np.stack([*(np.append(np.poly(p)[::-1], 0.0) for p in others), np.poly(points)[::-1]])
    taps = np.vstack([np.vander(points, 3, increasing=True) / [[np.prod(p - q)] for p, q in zip(points, others, strict=True)], [0, 0, 1]])
    results = np.hstack([np.vander(points, 4, increasing=True).T, [[0], [0], [0], [1]]])
    d, g = rng.standard_normal((200, 64, 6, 6)), rng.standard_normal((64, 3, 3))
    d, g, transform, taps, results = (x.astype(np.float32) for x in (d, g, transform, taps, results))
    products = np.zeros((200, 6, 6), np.float32)
    for channel in range(64):
        products += (transform @ d[:, channel] @ transform.T) * (taps @ g[channel] @ taps.T)
    windows = np.lib.stride_tricks.sliding_window_view(d.astype(np.float64), (3, 3), (2, 3))
    wanted = np.einsum("tcijkl,ckl->tij", windows, g.astype(np.float64))
    return ((results @ products @ results.T - wanted) ** 2).mean() ** 0.5 / (wanted**2).mean() ** 0.5


def test_the_points_lose_half_of_what_the_usual_ones_do():
    """As docs/maths/conv3x3.md says."""
    ours, usual = error_of_points([0.5**0.5, -(0.5**0.5), 2**0.5, -(2**0.5)]), error_of_points([1.0, -1.0, 2.0, -2.0])
    assert ours < 0.6 * usual and 6e-7 < ours < 1e-6 and 1.4e-6 < usual < 2e-6, (ours, usual)


def test_the_transposed_is_the_gradient(backend):
    x, weight, _ = problem(3, 32, 48, 5, 6)
    grad_y = draw(3, 48, 5, 6, index=4)
    point = x.double().requires_grad_()
    (wanted,) = torch.autograd.grad(F.conv2d(point, weight.double(), padding=1), point, grad_y.double())
    torch.testing.assert_close(_ops.conv3x3(grad_y, weight, None, backend, transposed=True).double(), wanted, rtol=1e-4, atol=1e-4)


def test_layouts(backend):
    """The weight and x may lie as they like."""
    x, weight, bias = problem(*SHAPES[2])
    expected = _ops.conv3x3(x, weight, bias, backend)
    for placed in (
        weight.contiguous(),
        weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1),
        torch.cat([weight, weight])[: len(weight)],
    ):
        torch.testing.assert_close(_ops.conv3x3(x, placed, bias, backend), expected, rtol=1e-5, atol=1e-5)
        assert backend == "reference" or torch.equal(_ops.conv3x3(x, placed, bias, backend), expected)
    strided = torch.stack([bias, bias], 1)[:, 0]
    torch.testing.assert_close(_ops.conv3x3(x.contiguous(), weight, strided, backend), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(_ops.conv3x3(x, weight, None, backend), expected - bias[:, None, None], rtol=1e-4, atol=1e-4)


@needs_cpp
def test_results_depend_neither_on_the_threads_nor_on_the_batch():
    x, weight, bias = problem(20, 32, 48, 6, 6)
    first, *others = on_thread_counts(lambda: _ops.conv3x3(x, weight, bias, "cpp"))
    assert all(torch.equal(first, other) for other in others)
    assert torch.equal(_ops.conv3x3(x[7:9], weight, bias, "cpp"), first[7:9])


@needs_cpp
def test_calls_keep_their_working_memory():
    """Though the transformed weights of so many channels are more than glibc's allocator would keep."""
    arguments = problem(*SHAPES[-1])
    assert new_pages(lambda: _ops.conv3x3(*arguments, "cpp")) < 36 * 512 * 464 * 4 / 4096


@needs_cpp
@pytest.mark.parametrize(("dtype", "largest"), [(torch.float32, 2.0**118), (torch.bfloat16, 2.0**118), (torch.float16, 65504.0)], ids=str)
def test_large_numbers_stay_finite(dtype, largest):
    """Up to the bound of docs/maths/conv3x3.md, and in float16 all."""
    x, weight, bias = problem(3, 16, 32, 9, 8)
    weight = weight / weight.abs().sum((1, 2, 3), keepdim=True)
    arguments = tuple(part.to(dtype) for part in (x.sign() * largest, weight, bias))
    assert_exact(_ops.conv3x3(*arguments, "cpp"), arguments)


@needs_cpp
def test_nan_reaches_the_tiles_around_it_and_no_others():
    x, weight, bias = problem(2, 16, 16, 12, 12)
    x[0, 3, 5, 5] = float("nan")
    y = _ops.conv3x3(x, weight, bias, "cpp")
    assert torch.isnan(y[0, :, 4:7, 4:7]).all() and torch.isfinite(y[1]).all()
    assert torch.isfinite(y[0, :, :2]).all() and torch.isfinite(y[0, :, 8:]).all()


BAD = {
    "float64 x": (lambda a: a.update(x=a["x"].double()), "x: expected float32, bfloat16 or float16"),
    "bfloat16 y": (lambda a: a.update(y=a["y"].bfloat16()), "y: expected the dtype of x"),
    "contiguous x": (lambda a: a.update(x=a["x"].contiguous()), "x: expected channels_last"),
    "contiguous y": (lambda a: a.update(y=a["y"].contiguous()), "y: expected channels_last"),
    "other width": (lambda a: a.update(y=draw(2, 16, 4, 5, index=2)), "y: expected batch, height and width of x"),
    "few outputs": (lambda a: a.update(y=draw(2, 8, 4, 4, index=1)), "y: expected a multiple of 16"),
    "few inputs": (lambda a: a.update(x=draw(2, 8, 4, 4, index=1)), "x: expected a multiple of 16"),
    "three dimensions": (lambda a: a.update(x=a["x"][0]), r"x: expected \[B, C, H, W\]"),
    "size 5": (lambda a: a.update(weight=torch.empty(16, 16, 5, 5)), "weight: expected a size of 3"),
    "other channels": (lambda a: a.update(weight=torch.empty(16, 32, 3, 3)), "weight: expected the channels"),
    "float64 weight": (lambda a: a.update(weight=a["weight"].double()), r"weight: expected \[O, C, 3, 3\] of the dtype of x"),
    "short bias": (lambda a: a.update(bias=torch.empty(15)), r"bias: expected \[O\] of the dtype of x"),
    "a gradient": (lambda a: a["x"].requires_grad_(), "x: .*requires grad"),
}  # fmt: skip


@needs_cpp
@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_of_the_raw_op_are_named(name):
    change, message = BAD[name]
    x, weight, bias = problem(*SHAPES[0])
    arguments = {"y": torch.empty_like(x), "x": x, "weight": weight, "bias": bias}
    change(arguments)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fm_fast.conv3x3.default(*arguments.values(), False)


@needs_cpp
@pytest.mark.parametrize("transposed", [False, True])
def test_opcheck(transposed):
    x, weight, bias = problem(*SHAPES[0])
    torch.library.opcheck(torch.ops.fm_fast.conv3x3.default, (torch.zeros_like(x), x, weight, bias, transposed))


# The layer


@pytest.fixture
def chosen(monkeypatch):
    """The layer uses the kernel whatever the instruction set; whether each of its calls was the transposed one."""
    calls, kernel = [], function.__globals__["_conv3x3"]["cpp"]
    monkeypatch.setattr(convolutions, "FASTER_ON", (_backends.cpu_isa(),))
    monkeypatch.setitem(function.__globals__["_conv3x3"], "cpp", lambda *arguments: calls.append(arguments[-1]) or kernel(*arguments))
    return calls


def plain(layer, x):
    return F.conv2d(x, layer.weight, layer.bias, padding=1)


def assert_close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@needs_default
def test_the_layer_is_pytorchs(chosen):
    layer, x, grad_y = conv3x3(16, 32), draw(4, 16, 5, 4, index=3).requires_grad_(), draw(4, 32, 5, 4, index=4)
    wanted = torch.autograd.grad(plain(layer, x), [x, *layer.parameters()], grad_y)
    for got, expected in zip(torch.autograd.grad(layer(x), [x, *layer.parameters()], grad_y), wanted, strict=True):
        assert_close(got, expected)
    assert chosen == [False, True]
    with torch.no_grad():
        assert_close(layer(x), plain(layer, x))
    with torch.inference_mode():
        assert_close(layer(x), plain(layer, x))
    assert_close(layer.requires_grad_(False)(x.detach()), plain(layer, x).detach())
    assert chosen == [False, True, False, False, False]


@needs_default
def test_a_frozen_layer_is_differentiated_in_x_alone(chosen):
    layer, x, grad_y = conv3x3(16, 32).requires_grad_(False), draw(4, 16, 5, 4, index=3).requires_grad_(), draw(4, 32, 5, 4, index=4)
    y = layer(x)
    assert_close(y, plain(layer, x))
    (expected,) = torch.autograd.grad(plain(layer, x), x, grad_y)
    assert_close(torch.autograd.grad(y, x, grad_y, retain_graph=True)[0], expected)
    assert chosen == [False, True]
    several = torch.stack([grad_y, 2.0 * grad_y])
    (batched,) = torch.autograd.grad(y, x, several, is_grads_batched=True, retain_graph=True)
    assert_close(batched, torch.stack([expected, 2.0 * expected]))
    point = grad_y.clone().requires_grad_()
    (first,) = torch.autograd.grad(y, x, point, create_graph=True)
    (second,) = torch.autograd.grad(first, point, x.detach())
    assert_close(second, F.conv2d(x, layer.weight, padding=1))
    assert chosen == [False, True]


@needs_default
def test_where_the_kernel_does_not_run(chosen, monkeypatch):
    """Few or empty tiles, other layouts, types, shapes, transforms, compilers and autocast: PyTorch's convolution, without a word."""
    monkeypatch.setattr(convolution, "EMULATED_ON_CPU", frozenset())  # or autocast would compute in float32
    layer, x = conv3x3(16, 16).requires_grad_(False), draw(4, 16, 5, 4, index=3)
    conv3x3(64, 64).requires_grad_(False)(draw(3, 64, 4, 4, index=3))
    layer(draw(4, 16, 2, 2, index=3))
    layer.bfloat16()(x.bfloat16())
    layer.float()(x.contiguous())
    conv3x3(16, 16, stride=2)(x)
    conv3x3(16, 24)(x)
    conv3x3(8, 16)(x[:, :8].contiguous(memory_format=torch.channels_last))
    conv3x3(16, 16).double()(x.double())
    torch.func.vmap(lambda x: layer(x[None])[0])(x)
    torch.func.jvp(layer, (x,), (x,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(x)
    torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    assert chosen == []
    layer(x)
    assert chosen == [False]


@needs_default
def test_a_wrong_number_of_channels_is_pytorchs_to_refuse(chosen):
    layer, x = conv3x3(16, 32), draw(4, 48, 5, 4, index=3)
    for trains in (True, False):
        with pytest.raises(RuntimeError, match=r"expected input\[4, 48, 5, 4\] to have 16 channels, but got 48 channels instead"):
            layer.requires_grad_(trains)(x)
    assert chosen == []


@needs_default
def test_16_bit_layers_need_no_16_bit_arithmetic(chosen, monkeypatch):
    """The kernels compute in float32 themselves; what they do not know is PyTorch's float32, derivatives of derivatives too."""
    monkeypatch.setattr(convolution, "EMULATED_ON_CPU", frozenset({torch.bfloat16}))
    layer, x = conv3x3(16, 16).bfloat16(), draw(8, 16, 8, 8, index=3).bfloat16().requires_grad_()
    grad_y = draw(8, 16, 8, 8, index=4).bfloat16().requires_grad_()
    y = layer(x)
    inputs = [x, *layer.parameters()]
    got = torch.autograd.grad(y, inputs, grad_y, create_graph=True)
    assert chosen == [False]
    second = torch.autograd.grad(got[0].float().square().sum(), [layer.weight, grad_y])
    assert_nearly(torch.autograd.grad(layer(x), inputs, grad_y), got)
    assert chosen == [False, False, True]
    exact_x, exact_grad, exact_layer = (
        x.detach().double().requires_grad_(),
        grad_y.detach().double().requires_grad_(),
        conv3x3(16, 16).double(),
    )
    exact_layer.load_state_dict(layer.state_dict())
    wanted = torch.autograd.grad(plain(exact_layer, exact_x), [exact_x, *exact_layer.parameters()], exact_grad, create_graph=True)
    assert_nearly([y, *got], [plain(exact_layer, exact_x), *wanted])
    assert_nearly(second, torch.autograd.grad(wanted[0].square().sum(), [exact_layer.weight, exact_grad]))


def assert_nearly(got, wanted):
    """To bfloat16's precision of the largest value."""
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a.double(), b.double(), rtol=0.0, atol=2.0**-7 * b.abs().max().item())


@needs_default
def test_plain_layers_stay_plain(chosen):
    config = UNetConfig(8, 1, 0, channels=16, multipliers=(1, 2), blocks=1, attention_sizes=(), head_channels=8, groups=4)
    x = draw(2, 1, 8, 8, index=3)
    for fused in (True, False):
        before = len(chosen)
        UNet(config, fused=fused)(x, torch.tensor([0.2, 0.7])).sum().backward()
        assert (len(chosen) > before) == fused


@needs_default
def test_the_choice_is_made_by_instruction_set_and_backend(chosen, monkeypatch):
    x, weight, _ = problem(*SHAPES[5])
    assert _ops.conv3x3_backend(x, weight) == _backends.resolve("conv3x3", x.device)
    monkeypatch.setattr(_backends, "ENVIRONMENT_BACKEND", "reference")
    assert _ops.conv3x3_backend(x, weight) == "reference"
    monkeypatch.setattr(convolutions, "FASTER_ON", ())
    assert _ops.conv3x3_backend(x, weight) == "reference"
