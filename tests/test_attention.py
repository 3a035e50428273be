"""attention against NumPy in float64: shapes, dtypes, threads, errors; and the layer that uses it, in every mode of autograd."""

import numpy as np
import pytest
import torch
from thread_counts import on_thread_counts

import fm_fast as fm
from fm_fast import _backends, _ops, reference
from fm_fast._ops import attention as function
from fm_fast.nn.attention import Attention

REASON = _backends.why_not("attention", "cpu", "cpp")
needs_cpp = pytest.mark.skipif(REASON is not None, reason=f"the C++ backend cannot run: {REASON}")
needs_default = pytest.mark.skipif(
    REASON is not None or _backends.ENVIRONMENT_BACKEND not in (None, "cpp"), reason="the layer does not choose the kernel here"
)
pytestmark = pytest.mark.usefixtures("poisoned_outputs")
# batch, pixels, heads, features: less than a vector, whole ones and parts, more queries than a unit has, odd numbers of vectors
SHAPES = [
    (2, 1, 1, 16), (3, 5, 2, 32), (1, 16, 3, 48), (2, 37, 1, 16), (2, 64, 2, 64), (1, 193, 1, 32), (1, 400, 2, 16), (0, 9, 1, 16),
    (2, 49, 1, 112), (2, 9, 2, 144),
]  # fmt: skip
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}


def problem(batch, pixels, heads, features, dtype=torch.float32, scale=1.0):
    """(joint, grad_out)"""
    joint = fm.noise((batch, pixels, 3, heads, features), seed=4, step=0) * scale
    return joint.to(dtype), fm.noise((batch, pixels, heads, features), seed=4, step=1).to(dtype)


def exact(joint, grad_out):
    """The result and the gradient of joint in float64, head by head, by the formulas of the softmax."""
    q, k, v = np.moveaxis(joint.double().numpy(), 2, 0)
    do, scale = grad_out.double().numpy(), joint.shape[4] ** -0.5
    s = np.einsum("bihd,bjhd->bhij", q, k) * scale
    p = np.exp(s - s.max(axis=-1, keepdims=True, initial=-np.inf))
    p /= p.sum(axis=-1, keepdims=True)
    dp = np.einsum("bihd,bjhd->bhij", do, v)
    ds = p * (dp - (p * dp).sum(axis=-1, keepdims=True)) * scale
    gradients = (np.einsum("bhij,bjhd->bihd", ds, k), np.einsum("bhij,bihd->bjhd", ds, q), np.einsum("bhij,bihd->bjhd", p, do))
    return np.einsum("bhij,bjhd->bihd", p, v), np.stack(gradients, axis=2)


def forward_and_backward(joint, grad_out, backend="cpp"):
    leaf = joint.clone().requires_grad_()
    out = _ops.attention(leaf, backend)
    return out.detach(), torch.autograd.grad(out, leaf, grad_out)[0]


def assert_near(got, wanted, rounding):
    """To so many roundings of the largest number: each is a sum of products with weights up to one."""
    assert got.shape == wanted.shape
    error = np.abs(got.double().numpy() - wanted).max(initial=0.0)
    assert error <= rounding * max(1.0, np.abs(wanted).max(initial=0.0)), error


@needs_cpp
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("shape", SHAPES)
def test_result_and_gradient_against_float64(shape, dtype):
    joint, grad_out = problem(*shape, dtype)
    for got, wanted in zip(forward_and_backward(joint, grad_out), exact(joint, grad_out), strict=True):
        assert got.dtype == dtype and got.is_contiguous()
        # 16-bit gradients also know the rounded result, by sum do o; float32 sums have as many terms as there are pixels or features.
        assert_near(got, wanted, (24 if dtype == torch.float32 else 3) * ROUNDING[dtype])


@needs_cpp
def test_large_scores_neither_overflow_nor_vanish():
    joint, grad_out = problem(2, 40, 1, 16, scale=30.0)
    assert exact(joint, grad_out)[0].std() > 1.0
    for got, wanted in zip(forward_and_backward(joint, grad_out), exact(joint, grad_out), strict=True):
        assert_near(got, wanted, 2.0**-11)  # scores of a thousand are off by 2^-14


@needs_cpp
def test_a_number_that_is_none_reaches_its_sample_and_head_alone():
    joint, grad_out = problem(2, 20, 2, 16)
    joint[0, 3, 1, 1, 5] = torch.nan  # of a key
    found, gradient = forward_and_backward(joint, grad_out)
    assert found[0, :, 1].isnan().all() and gradient[0, :, :, 1].isnan().any()
    for values in (found[1], found[0, :, 0], gradient[1], gradient[0, :, :, 0]):
        assert values.isfinite().all()


@needs_cpp
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FC00001, 0x7FC00055, 0xFFC00001 - 2**32, -1])
@pytest.mark.parametrize("part", [0, 1, 2])
def test_every_kind_of_no_number_stays_none(part, bits):
    """Also those with bits of their own."""
    joint, _ = problem(1, 20, 1, 16)
    joint.view(torch.int32)[0, 3, part, 0, 5] = bits
    found, expected = (_ops.attention(joint, backend) for backend in ("cpp", "reference"))
    assert torch.equal(found.isnan(), expected.isnan()) and bool(expected.isnan().any())


@needs_cpp
def test_results_depend_neither_on_threads_nor_on_the_rest_of_the_batch():
    joint, grad_out = problem(5, 70, 3, 32)
    (out, gradient), *others = on_thread_counts(lambda: forward_and_backward(joint, grad_out))
    for other in others:
        assert torch.equal(other[0], out) and torch.equal(other[1], gradient)
    alone = forward_and_backward(joint[3:4], grad_out[3:4])
    assert torch.equal(alone[0], out[3:4]) and torch.equal(alone[1], gradient[3:4])


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    joint, grad_out = problem(2, 5, 2, 16, dtype)
    out, log_sums = torch.zeros_like(grad_out), torch.zeros(2, 2, 5)
    torch.library.opcheck(torch.ops.fm_fast.attention.default, (out, log_sums, joint))
    arguments = (torch.zeros_like(joint), grad_out, joint, out, log_sums)
    torch.library.opcheck(torch.ops.fm_fast.attention_backward.default, arguments)


@needs_cpp
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"joint": torch.zeros(2, 5, 2, 2, 16)}, "joint"),
        ({"joint": torch.zeros(2, 5, 3, 2, 24)}, "16 features"),
        ({"joint": torch.zeros(2, 5, 3, 2, 16).double()}, "float32, bfloat16 or float16"),
        ({"joint": torch.zeros(2, 5, 3, 2, 32)[..., ::2]}, "without gaps"),
        ({"out": torch.zeros(2, 5, 2, 32)}, "out"),
        ({"out": torch.zeros(2, 5, 2, 16).bfloat16()}, "dtype"),
        ({"log_sums": torch.zeros(2, 5, 2)}, "log_sums"),
        ({"grad_out": torch.zeros(2, 5, 32)}, "grad_out"),
        ({"grad_joint": torch.zeros(2, 5, 3, 32)}, "grad_joint"),
    ],
)
def test_the_op_refuses_what_it_cannot_read(change, words):
    arguments = {
        "grad_joint": torch.zeros(2, 5, 3, 2, 16), "grad_out": torch.zeros(2, 5, 2, 16), "joint": torch.zeros(2, 5, 3, 2, 16),
        "out": torch.zeros(2, 5, 2, 16), "log_sums": torch.zeros(2, 2, 5),
    }  # fmt: skip
    with pytest.raises(RuntimeError, match=words):
        torch.ops.fm_fast.attention_backward(*{**arguments, **change}.values())


@needs_cpp
def test_second_derivatives_and_batched_gradients():
    joint, grad_out = problem(2, 6, 2, 16)
    leaf = joint.requires_grad_()

    def gradient(attend, point):
        return torch.autograd.grad(attend(leaf), leaf, point, create_graph=True)[0]

    point = grad_out.clone().requires_grad_()
    ours, plain = (gradient(attend, point) for attend in (lambda x: _ops.attention(x, "cpp"), reference.attention))
    torch.testing.assert_close(ours, plain)
    for got, wanted in zip(*[torch.autograd.grad(g.square().sum(), [leaf, point]) for g in (ours, plain)], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    out, several = _ops.attention(leaf, "cpp"), torch.stack([grad_out, 2.0 * grad_out])
    (batched,) = torch.autograd.grad(out, leaf, several, is_grads_batched=True)
    torch.testing.assert_close(batched, torch.stack([plain, 2.0 * plain]).detach())


# The layer


@pytest.fixture
def chosen(monkeypatch):
    """The layer uses the kernel whatever the instruction set; the shape of the joint projection of each forward call."""
    calls, kernel = [], function.__globals__["_attention"]["cpp"]
    monkeypatch.setitem(function.__globals__, "FASTER_ON", (_backends.cpu_isa(),))
    monkeypatch.setitem(
        function.__globals__["_attention"], "cpp", lambda *arguments: calls.append(tuple(arguments[-1].shape)) or kernel(*arguments)
    )
    return calls


def layer_of(fused=True):
    layer = Attention(32, heads=2, groups=4, fused=fused)
    for index, parameter in enumerate(layer.parameters()):
        parameter.data = fm.noise(tuple(parameter.shape), seed=5, step=index) * 0.3
    return layer


@needs_default
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_layer_is_the_plain_one(chosen, layout):
    layer, plain = layer_of(), layer_of(fused=False)
    x = fm.noise((2, 32, 5, 4), seed=6, step=0).to(memory_format=layout).requires_grad_()
    grad = fm.noise((2, 32, 5, 4), seed=6, step=1)
    torch.testing.assert_close(layer(x), plain(x))
    assert layer(x).is_contiguous(memory_format=layout)
    found, wanted = ([*torch.autograd.grad(net(x), [x, *net.parameters()], grad)] for net in (layer, plain))
    for got, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x), plain(x))
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), plain(x))
    assert chosen == [(2, 20, 3, 2, 16)] * 5


@needs_default
def test_where_the_kernel_does_not_run(chosen, monkeypatch):
    """Other features and dtypes, transforms, a backend of the environment: without a word."""
    layer, x = layer_of(), fm.noise((2, 32, 3, 3), seed=6, step=0)
    Attention(24, heads=1, groups=4)(fm.noise((2, 24, 3, 3), seed=6, step=0))
    layer_of().double()(x.double())
    torch.func.vmap(lambda x: layer(x[None])[0])(x)
    torch.func.jvp(layer, (x,), (x,))
    monkeypatch.setattr(_backends, "ENVIRONMENT_BACKEND", "reference")
    layer(x)
    monkeypatch.setattr(_backends, "ENVIRONMENT_BACKEND", None)
    monkeypatch.setitem(function.__globals__, "FASTER_ON", ())
    layer(x)
    assert chosen == []


@needs_default
def test_the_layer_in_a_compiled_training_step_and_under_autocast(chosen):
    layer, x = layer_of(), fm.noise((2, 32, 4, 4), seed=6, step=0)
    expected = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for got, wanted in zip(torch.autograd.grad(compiled(x).square().sum(), list(layer.parameters())), expected, strict=True):
        torch.testing.assert_close(got, wanted)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = layer(x)
    assert (rounded.float() - layer(x)).norm() < 2**-6 * layer(x).norm()


@needs_default
def test_the_divergence_of_a_network_uses_the_kernel(chosen):
    """Exact by batched gradients, estimated by single ones: both as with the plain layer."""
    layer, plain = (net.requires_grad_(False).eval() for net in (layer_of(), layer_of(fused=False)))
    x = fm.noise((2, 32, 2, 2), seed=6, step=0)
    for settings in ({"kind": "exact"}, {"probes": 3, "seed": 1, "step": 0}):
        found, expected = (fm.divergence(lambda x, t, net=net: net(x), x, t=0.5, **settings) for net in (layer, plain))
        torch.testing.assert_close(found.div, expected.div, rtol=1e-4, atol=1e-4)
    assert chosen


@needs_default
def test_an_exported_layer_can_be_trained(chosen):
    layer, x = layer_of(), fm.noise((2, 32, 3, 3), seed=6, step=0)
    exported = torch.export.export(layer, (x,)).module()
    found, wanted = (torch.autograd.grad(net(x).square().sum(), list(net.parameters())) for net in (exported, layer))
    for got, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
