"""The reference U-Net: shapes, initial values, conditioning, dtypes, errors, and independent counts and formulas."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from unet_helpers import TINY, inputs, shaken

import fm_fast as fm
from fm_fast.nn import PRESETS, UNet, UNetConfig
from fm_fast.nn.attention import Attention
from fm_fast.nn.convolution import PYTORCH, Convolution
from fm_fast.nn.embedding import sinusoidal_embedding
from fm_fast.nn.layers import BlockSettings, Half, ResidualBlock

COLOUR = UNetConfig(16, 3, 0, channels=8, multipliers=(1, 1, 2), blocks=2, head_channels=8, groups=4)


@pytest.mark.parametrize("config", [TINY, UNetConfig.digits(), COLOUR])
def test_output_has_the_shape_of_the_input_and_starts_at_zero(config):
    x, t, _ = inputs(3, config.image_size, config.image_channels)
    output = UNet(config)(x, t)
    assert output.shape == x.shape
    assert torch.count_nonzero(output) == 0


@pytest.mark.parametrize("channels", [1, 3])
def test_all_convolutions_get_their_channels_last(channels):
    """Also of grey images, whose memory is the same in both layouts: the first convolution's output follows its input's strides."""
    model, layouts = UNet(replace(TINY, image_channels=channels)), []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(lambda module, inputs: layouts.append(inputs[0].stride(1)))
    model(torch.randn(2, channels, 8, 8), torch.rand(2))
    assert len(layouts) > 5 and set(layouts) == {1}


def test_other_sizes_and_non_square_images_work():
    model = shaken(UNet(TINY))
    x = fm.noise((2, 1, 6, 10), seed=0, step=0)
    assert model(x, torch.rand(2)).shape == x.shape


# Parameters of the published shapes, counted with torchcfm's code, which has no null class (hence one row of 4 x channels less).
@pytest.mark.parametrize(
    ("name", "changes", "parameters"),
    [
        ("cifar10-torchcfm", {}, 35_746_307),
        ("cifar10-paper", {}, 171_268_099),
        ("imagenet32-paper", {}, 228_149_507),
        ("imagenet64-paper", {}, 295_131_267),
        ("imagenet64-paper", {"classes": 1000}, 295_899_267 + 768),
        ("imagenet128-paper", {}, 542_804_483),
        ("imagenet128-paper", {"blocks": 2}, 420_498_691),
        ("sr64-256", {}, 311_790_723 + 768),
    ],
)
def test_presets_have_the_published_number_of_parameters(name, changes, parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in UNet(replace(PRESETS[name], **changes)).parameters()) == parameters


@pytest.mark.parametrize("name", ["digits", "fashion", "sr64-256"])
def test_presets_run(name):
    config = PRESETS[name]
    size, channels = config.image_size, config.low_resolution_channels
    with torch.device("meta"):
        x, t = torch.zeros(2, config.image_channels, size, size), torch.zeros(2)
        low = {"low_resolution": torch.zeros(2, channels, size // 4, size // 4)} if channels else {}
        assert UNet(config)(x, t, **low).shape == x.shape


def expected_parameters(c):
    """Counted by hand from the description of the architecture, independently of the module tree."""
    width = 4 * c.channels

    def conv(i, o, k=3):
        return i * o * k * k + o

    def block(i, o):
        skip = 0 if i == o else conv(i, o, 1)
        return 2 * i + conv(i, o) + width * 2 * o + 2 * o + 2 * o + conv(o, o) + skip

    def attention(o):
        return 2 * o + conv(o, 3 * o, 1) + conv(o, o, 1)

    low, high = c.widths
    embedding = (c.channels * width + width) + (width * width + width) + (c.classes + 1) * width
    encoder = block(low, low) + conv(low, low) + block(low, high) + attention(high)
    middle = 2 * block(high, high) + attention(high)
    fine = block(high + high, high) + block(high + low, high) + 2 * attention(high) + conv(high, high)
    decoder = fine + block(high + low, low) + block(low + low, low)
    ends = conv(c.image_channels, low) + 2 * low + conv(low, c.image_channels)
    return embedding + encoder + middle + decoder + ends


@pytest.mark.parametrize("config", [TINY, UNetConfig.digits()])
def test_parameter_count(config):
    assert sum(p.numel() for p in UNet(config).parameters()) == expected_parameters(config)


def test_null_class_is_what_none_means_and_differs_from_every_class():
    model = shaken(UNet(TINY))
    x, t, _ = inputs(4)
    outputs = [model(x, t, y=torch.full((4,), label)) for label in (-1, 0, 1, 2)]
    torch.testing.assert_close(model(x, t), outputs[0], rtol=0, atol=0)
    assert all((outputs[i] - outputs[j]).abs().max() > 1e-4 for i in range(4) for j in range(i))


def test_time_matters():
    model = shaken(UNet(TINY))
    x, _, _ = inputs(1)
    assert (model(x, torch.tensor([0.2])) - model(x, torch.tensor([0.201]))).abs().max() > 1e-5


def test_sinusoidal_embedding_is_the_formula():
    t = torch.tensor([0.0, 0.3, 1.0])
    rows = [
        [math.cos(1000 * float(v) * 10_000 ** (-k / 4)) for k in range(4)]
        + [math.sin(1000 * float(v) * 10_000 ** (-k / 4)) for k in range(4)]
        for v in t
    ]
    torch.testing.assert_close(sinusoidal_embedding(t, 8), torch.tensor(rows), rtol=0, atol=2e-4)
    rounded = torch.tensor([0.7539, 0.1234]).bfloat16()
    torch.testing.assert_close(sinusoidal_embedding(rounded, 8).float(), sinusoidal_embedding(rounded.float(), 8), rtol=0, atol=0)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("fused", [True, False])
def test_attention_is_softmax_of_scaled_products(fused, layout):
    layer = shaken(Attention(8, heads=2, groups=2, fused=fused)).double().train(fused)
    x = torch.randn(2, 8, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(memory_format=layout)
    joint = layer.query_key_value(layer.norm(x)).flatten(2)
    mixed = torch.empty(2, 8, 6, dtype=torch.float64)
    for head in range(2):
        q, k, v = (joint[:, part * 8 + head * 4 :][:, :4] for part in range(3))
        weights = torch.softmax(torch.einsum("bcq,bck->bqk", q, k) / 2.0, dim=-1)
        mixed[:, head * 4 : head * 4 + 4] = torch.einsum("bqk,bck->bcq", weights, v)
    expected = x + layer.projection(mixed.reshape(2, 8, 3, 2))
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)


def test_attention_is_where_asked_for_and_reaches_every_pixel():
    model = shaken(UNet(TINY))
    assert sum(isinstance(module, Attention) for module in model.modules()) == 1 + 1 + 2
    x, t, _ = inputs(1)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(model(x, t)[0, 0, 0, 0], x)
    assert torch.count_nonzero(gradient) == gradient.numel()


def double_noise(*shape):
    return fm.noise(shape, seed=5, step=0, dtype=torch.float64)


def normalised(x, norm):
    return F.group_norm(x, norm.groups, norm.weight, norm.bias)


@pytest.mark.parametrize("fused", [True, False])
def test_residual_block_is_the_formula(fused):
    block = shaken(ResidualBlock(4, 8, BlockSettings(width=6, groups=2, fused=fused))).double()
    x, e = double_noise(2, 4, 5, 5), double_noise(2, 6)
    scale, shift = block.modulation(e)[:, :, None, None].chunk(2, dim=1)
    h = normalised(block.first_conv(F.silu(normalised(x, block.first_norm))), block.second_norm) * (1 + scale) + shift
    expected = block.skip(x) + block.second_conv(F.silu(h))
    torch.testing.assert_close(block(x, e), expected)
    torch.testing.assert_close(block(x[:, :3], e, second=x[:, 3:]), expected)


def test_residual_block_that_adds_the_embedding_and_halves_the_image():
    block = shaken(ResidualBlock(4, 4, BlockSettings(width=6, groups=2, scale_shift=False), Half())).double()
    x, e = double_noise(2, 4, 6, 4), double_noise(2, 6)

    def half(image):
        return (image[..., ::2, ::2] + image[..., 1::2, ::2] + image[..., ::2, 1::2] + image[..., 1::2, 1::2]) / 4

    h = block.first_conv(half(F.silu(normalised(x, block.first_norm)))) + block.modulation(e)[:, :, None, None]
    torch.testing.assert_close(block(x, e), half(x) + block.second_conv(F.silu(normalised(h, block.second_norm))))


def test_blocks_start_as_the_identity():
    block, x = ResidualBlock(4, 4, BlockSettings(width=6, groups=2)), torch.randn(1, 4, 4, 4)
    assert torch.equal(block(x, torch.randn(1, 6)), x)
    assert torch.equal(Attention(4, 1, groups=2)(x), x)


def test_every_parameter_gets_a_finite_gradient():
    model = shaken(UNet(TINY))
    x, t, y = inputs(6)
    model(x, t, y=torch.cat([y[:3], torch.full((3,), -1)])).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("fused", [True, False])
def test_float64_gradients_by_finite_differences(fused):
    config = UNetConfig(2, 1, 2, channels=4, multipliers=(1, 1), blocks=1, attention_sizes=(2,), head_channels=4, groups=2)
    model = shaken(UNet(config, fused=fused)).double()
    x = torch.randn(2, 1, 2, 2, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(lambda x: model(x, torch.tensor([0.2, 0.7]), y=torch.tensor([0, -1])), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_of_another_dtype_takes_any_input(dtype):
    reference, model = shaken(UNet(TINY)), shaken(UNet(TINY)).to(dtype)
    model.load_state_dict(reference.state_dict())
    x, t, y = inputs(3)
    for given in (x, x.to(dtype)):
        output = model(given, t, y=y)
        assert output.dtype == dtype
        torch.testing.assert_close(output.float(), reference(x, t, y=y), rtol=0.1, atol=0.1)


def test_autocast_trains():
    model = shaken(UNet(TINY))
    x, t, y = inputs(3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(x, t, y=y)
    assert output.dtype == torch.bfloat16
    output.float().square().mean().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
    torch.testing.assert_close(output.float(), model(x, t, y=y), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("resampling", ["convolution", "pool", "block"])
def test_layouts_and_plain_layers_give_the_same(resampling):
    config = replace(TINY, resampling=resampling)
    fused, plain = UNet(config), shaken(UNet(config, fused=False))
    fused.load_state_dict(plain.state_dict())
    x, t, y = inputs(3)
    expected = plain(x, t, y=y)
    for given in (x, x.to(memory_format=torch.channels_last)):
        torch.testing.assert_close(fused(given, t, y=y), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(plain(given, t, y=y), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("fused", "training"), [(True, True), (True, False), (False, True)])
def test_every_way_to_a_divergence_agrees(fused, training):
    # Attention by PyTorch's fused kernels has neither a forward mode nor a batched backward.
    config = UNetConfig(2, 1, 0, channels=4, multipliers=(1,), blocks=1, attention_sizes=(2,), head_channels=4, groups=2)
    model, (x, t, _) = shaken(UNet(config, fused=fused)).train(training), inputs(2, size=2)
    one, other = (fm.divergence(model, x, t, mode=mode, kind="exact").div for mode in ("loop", "batched"))
    basis = torch.eye(4).reshape(4, 1, 1, 2, 2).expand(4, 2, 1, 2, 2)
    columns = torch.func.vmap(lambda v: torch.func.jvp(lambda x: model(x, t), (x,), (v,))[1])(basis)
    trace = columns.flatten(2).diagonal(dim1=0, dim2=2).sum(-1)
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(one.float(), trace, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": 5}, "groups: expected a divisor"),
        ({"head_channels": 3}, "head_channels: expected a divisor"),
        ({"dropout": 1.0}, r"dropout: expected a probability in \[0, 1\), got 1.0"),
        ({"heads": 2}, "heads, head_channels: expected one of them and 0 for the other, got 2 and 8"),
        ({"head_channels": 0}, "heads, head_channels: expected one of them"),
        ({"head_channels": 0, "heads": 3}, "heads: expected a divisor of the attended width 16, got 3"),
        ({"resampling": "cubic"}, "resampling: expected one of convolution, pool, block, got 'cubic'"),
        ({"time_scale": 0.0}, "time_scale: expected a positive number, got 0.0"),
        ({"low_resolution_channels": -1}, "low_resolution_channels: expected 0 or more"),
        ({"multipliers": ()}, "multipliers"),
        ({"channels": 9}, "channels: expected an even number"),
        ({"blocks": 0}, "blocks: expected at least 1"),
        ({"classes": -1}, "classes: expected 0 or more"),
    ],
)
def test_wrong_configurations(change, message):
    values = {"channels": 8, "multipliers": (1, 2), "groups": 4, "head_channels": 8} | change
    with pytest.raises(ValueError, match=message):
        UNetConfig(**values)


def test_lists_as_json_has_them_are_tuples():
    config = UNetConfig(image_size=8, image_channels=1, classes=10, multipliers=[1, 2], attention_sizes=[4])
    assert config == UNetConfig(image_size=8, image_channels=1, classes=10, multipliers=(1, 2), attention_sizes=(4,))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"channels": "a"}, TypeError, "channels: expected a whole number, got 'a'"),
        ({"blocks": 1.0}, TypeError, "blocks: expected a whole number, got 1.0"),
        ({"multipliers": (1, "2")}, TypeError, r"multipliers: expected a tuple of whole numbers, got \(1, '2'\)"),
        ({"multipliers": 2}, TypeError, "multipliers: expected a tuple of whole numbers, got 2"),
        ({"dropout": None}, TypeError, "dropout: expected a number, got None"),
        ({"scale_shift": 1}, TypeError, "scale_shift: expected True or False, got 1"),
        ({"time_scale": float("inf")}, ValueError, "time_scale: expected a finite number, got inf"),
    ],
)
def test_configurations_of_other_types(change, error, message):
    with pytest.raises(error, match=message):
        UNetConfig(**change)


@pytest.mark.parametrize(
    ("x_shape", "t_shape", "y", "error", "message"),
    [
        ((2, 1, 7, 8), (2,), None, ValueError, "divisible by 2 .*got 7x8"),
        ((2, 3, 8, 8), (2,), None, ValueError, r"x: expected shape \[B, 1, H, W\]"),
        ((2, 8, 8), (2,), None, ValueError, "x: expected shape"),
        ((2, 1, 8, 8), (3,), None, ValueError, r"t: expected shape \[2\], got \[3\]"),
        ((2, 1, 8, 8), (), None, ValueError, "t: expected shape"),
        ((2, 1, 8, 8), (2,), torch.zeros(3, dtype=torch.int64), ValueError, "y: expected shape"),
        ((2, 1, 8, 8), (2,), torch.zeros(2), TypeError, "y: expected int64"),
        ((2, 1, 8, 8), (2,), torch.tensor([0, 3]), ValueError, r"y: expected classes in 0\.\.2, or -1 for none, got 3"),
        ((2, 1, 8, 8), (2,), torch.tensor([0, -2]), ValueError, r"y: expected classes in 0\.\.2, or -1 for none, got -2"),
    ],
)
def test_wrong_inputs(x_shape, t_shape, y, error, message):
    with pytest.raises(error, match=message):
        UNet(TINY)(torch.zeros(x_shape), torch.zeros(t_shape), y=y)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": [0, 1]}, r"y: expected int64 labels \[2\], got list"),
        ({"y": 1}, r"y: expected int64 labels \[2\], got int"),
        ({"y": np.array([0, 1])}, r"y: expected int64 labels \[2\], got ndarray"),
        ({"x": np.zeros((2, 1, 8, 8))}, "x: expected a floating tensor, got ndarray"),
        ({"x": torch.zeros(2, 1, 8, 8, dtype=torch.uint8)}, "x: expected a floating tensor, got torch.uint8"),
        ({"t": torch.zeros(2, dtype=torch.int64)}, r"t: expected a floating tensor of shape \[2\], got torch.int64"),
    ],
)
def test_inputs_that_are_no_tensors_or_of_whole_numbers(change, message):
    given = {"x": torch.zeros(2, 1, 8, 8), "t": torch.zeros(2), "y": None, **change}
    with pytest.raises(TypeError, match=message):
        UNet(TINY)(**given)


def test_a_time_that_is_a_number():
    with pytest.raises(TypeError, match=r"t: expected a floating tensor of shape \[2\], got float"):
        UNet(TINY)(torch.zeros(2, 1, 8, 8), 0.5)


def test_classes_are_not_read_where_a_graph_is_made(monkeypatch):
    """A number that is read from a tensor would be a constant in it, or an error. Convolutions are PyTorch's there."""
    monkeypatch.setattr("fm_fast.nn.convolution._kernels", lambda x, weight: PYTORCH)
    model, given = shaken(UNet(TINY)).requires_grad_(False), inputs(2)
    graph = make_fx(lambda x, t, y: model(x, t, y=y))(*given)
    assert torch.equal(graph(*given), model(given[0], given[1], y=given[2]))
    each = torch.func.vmap(lambda x, t, y: model(x[None], t[None], y=y[None])[0])(*given)
    torch.testing.assert_close(each, model(given[0], given[1], y=given[2]))


def test_labels_for_an_unconditional_network():
    model = UNet(UNetConfig(8, 1, 0, channels=8, multipliers=(1,), groups=4, head_channels=8))
    with pytest.raises(ValueError, match="y: expected None"):
        model(torch.zeros(1, 1, 8, 8), torch.zeros(1), y=torch.zeros(1, dtype=torch.int64))


def test_settings_of_a_convolution_that_its_kernels_do_not_have():
    """Are PyTorch's to follow: padding that goes round makes images that tile."""
    x, changed = torch.randn(2, 32, 8, 8), {"padding_mode": "circular"}
    for settings in (changed, {"dilation": 2, "padding": 2}, {"groups": 4}, {"groups": 4, "padding_mode": "reflect"}):
        layer = Convolution(32, 32, **{"kernel_size": 3, "padding": 1, **settings})
        plain = nn.Conv2d(32, 32, **{"kernel_size": 3, "padding": 1, **settings})
        plain.load_state_dict(layer.state_dict())
        torch.testing.assert_close(layer(x), plain(x))
        assert layer(x).shape == x.shape
    layer, plain = Convolution(32, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1, padding_mode="circular")
    layer.load_state_dict(plain.state_dict())
    layer.padding_mode = "circular"  # as one changes a whole network
    torch.testing.assert_close(layer(x), plain(x))


def test_many_networks_at_once():
    """By vmap over their weights."""
    networks, (x, t, y) = [shaken(UNet(TINY)) for _ in range(2)], inputs(2)
    parameters, buffers = torch.func.stack_module_state(networks)

    def call(parameters, buffers):
        return torch.func.functional_call(networks[0], (parameters, buffers), (x, t, y))

    found = torch.func.vmap(call)(parameters, buffers)
    torch.testing.assert_close(found, torch.stack([network(x, t, y) for network in networks]), rtol=1e-4, atol=1e-5)


def test_saved_tensors_may_come_back_in_another_layout():
    """As those that hooks keep elsewhere do."""
    model, (x, t, y) = shaken(UNet(replace(TINY, channels=32, head_channels=32)), 0.03), inputs(2)  # wide enough for the kernels

    def gradients():
        model.zero_grad()
        model(x, t, y).square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    expected = gradients()
    with torch.autograd.graph.saved_tensors_hooks(lambda kept: kept.contiguous().clone(), lambda kept: kept):
        found = gradients()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()) + 1e-7)


class Wrapped(nn.Module):
    """A layer within another that has no weight of its own, as adapters have it."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *given):
        return self.inner(*given)


@pytest.mark.parametrize("training", [True, False])
def test_layers_within_others(training):
    model, (x, t, y) = shaken(UNet(TINY)).train(training), inputs(2)
    expected = model(x, t, y)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Conv2d | nn.Linear) and not isinstance(module, Wrapped):
                setattr(module, name, Wrapped(child))
    torch.testing.assert_close(model(x, t, y), expected)


class Adapted(nn.Module):
    """A layer in 16 bits with parameters of its own in 32, as adapters keep them."""

    def __init__(self, inner):
        super().__init__()
        self.factor, self.inner = nn.Parameter(torch.ones(())), inner

    def forward(self, x):
        return self.inner(x)


def test_adapters_and_weights_that_are_no_parameters_keep_the_dtype_of_the_layer():
    """As those of copies that nn.DataParallel makes are none."""
    model, (x, t, y) = shaken(UNet(TINY)).bfloat16().eval(), inputs(2)
    expected, bare = model(x, t, y), copy.deepcopy(model)
    for layers, name in ((model, "stem"), (model.time, "first")):
        setattr(layers, name, Adapted(getattr(layers, name)))
    assert torch.equal(model(x, t, y), expected)
    for module in bare.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                del module._parameters[name]
                object.__setattr__(module, name, parameter.data)
    assert not list(bare.parameters())
    assert bare(x, t, y).dtype == torch.bfloat16


def test_a_frozen_convolution_whose_padding_is_a_word():
    x = torch.randn(2, 16, 8, 8, requires_grad=True)
    for padding in ("same", "valid"):
        layer = Convolution(16, 16, 3, padding=padding).requires_grad_(False)
        plain = nn.Conv2d(16, 16, 3, padding=padding)
        plain.load_state_dict(layer.state_dict())
        (found,), (expected,) = (torch.autograd.grad(each(x).square().sum(), x) for each in (layer, plain))
        torch.testing.assert_close(found, expected)
