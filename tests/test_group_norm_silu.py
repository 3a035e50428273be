"""group_norm_silu against torch's own functions in float64: values, gradients, dropout, layouts, transforms, memory, errors."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from norm_cases import LAYER, SEED, Case, assert_close, expected, inputs, key, mask, uncancelled, with_gradients
from thread_counts import on_thread_counts
from torch.autograd import gradcheck, gradgradcheck
from torch.func import jvp, vmap

from fm_fast import _backends, _ops
from fm_fast.nn.norm import GroupNormSiLU

pytestmark = pytest.mark.usefixtures("poisoned_outputs")
needs_cpp = pytest.mark.skipif(_backends.why_not("group_norm_silu", "cpu", "cpp") is not None, reason="the C++ library is not built")
HALVES = [torch.bfloat16, torch.float16]
DTYPES = [torch.float64, torch.float32, *HALVES]
SIZES = [
    Case(2, 6, groups=3, size=(5, 7)),
    Case(3, 32, groups=32, size=(8, 8)),
    Case(2, 12, 20, groups=4, size=(5, 3)),  # a group lies in both inputs
    Case(1, 130, groups=2, size=(3, 1)),
    Case(2, 8, 8, groups=8, size=(1, 1)),
    Case(3, 5, groups=1, size=(9,)),
    Case(2, 4, groups=2, size=(3, 2, 5)),
    Case(1, 3, groups=3, size=(50, 51)),  # more points than a piece holds
    Case(1, 130, 3, groups=1, size=(40, 26)),  # more numbers than are kept between the backward passes
    Case(4, 6, groups=2),
]


def settings(case):
    return _ops.NormSettings(case.groups, 1e-5, case.activation, case.dropout, LAYER)


def ours(case, backend):
    def run(*tensors):
        return _ops.group_norm_silu(tensors, key(case) if case.dropout else None, settings(case), backend)

    return run


def check(case, backend):
    tensors, grad_y = inputs(case)
    got = with_gradients(ours(case, backend), tensors, grad_y)
    assert_close(got, expected(case, tensors, grad_y), uncancelled(case, tensors, grad_y))
    return got


def replaced(case, **changes):
    return Case(**{**case.__dict__, **changes})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SIZES, ids=str)
def test_sizes_and_dtypes(case, dtype, backend):
    if case.total // case.groups * int(np.prod(case.size, dtype=int)) == 1:
        pytest.skip("torch refuses one number a group")
    for modulated, activation, dropout in ((True, True, 0.0), (False, True, 0.3), (True, False, 0.3), (False, False, 0.0)):
        check(replaced(case, dtype=dtype, modulated=modulated, activation=activation, dropout=dropout), backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_mix_of_layouts(dtype, backend):
    for layouts, dropout in itertools.product(itertools.product("cl", repeat=3), (0.0, 0.3)):
        got = check(Case(2, 20, 12, groups=8, size=(6, 5), dtype=dtype, layouts="".join(layouts), dropout=dropout), backend)
        if backend == "cpp":
            assert got["y"].is_contiguous(memory_format=torch.channels_last if layouts[0] == "l" else torch.contiguous_format)


def strided(x):
    yield torch.stack([x, x], 1)[:, 1]
    yield torch.cat([x, x], 1)[:, : x.shape[1]]
    yield torch.cat([torch.zeros(1), x.flatten()])[1:].view(x.shape)
    yield x.transpose(2, 3).contiguous().transpose(2, 3)
    yield torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last)[:, : x.shape[1]]
    yield x[:1, :, :1, :1].expand(x.shape)


def test_other_strides(backend):
    case = Case(3, 8, 8, groups=4, size=(4, 6))
    (x, second, *others), grad_y = inputs(case)
    for a, b, g in itertools.zip_longest(strided(x), strided(second), strided(grad_y)):
        tensors = (a, b, *others)
        assert_close(with_gradients(ours(case, backend), tensors, g), expected(case, tensors, g), uncancelled(case, tensors, g))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_parameters_of_another_dtype(dtype, parameters, backend):
    got = check(Case(2, 8, groups=2, size=(5, 5), dtype=dtype, parameter_dtype=parameters), backend)
    assert got["y"].dtype == got["x"].dtype == dtype
    assert all(got[name].dtype == parameters for name in ("weight", "bias", "scale", "shift", "embedding"))


@pytest.mark.parametrize("layout", ["c", "l"])
@pytest.mark.parametrize("mean", [100.0, -10_000.0])
def test_a_mean_far_from_zero(layout, mean, backend):
    """The variance is that of the numbers as float32 holds them; what is left is the rounding of mean rstd."""
    case = Case(2, 16, groups=4, size=(32, 32), mean=mean, layouts=3 * layout, modulated=False)
    tensors, grad_y = inputs(case)
    got, exact = with_gradients(ours(case, backend), tensors, grad_y), expected(case, tensors, grad_y)
    for name, value in exact.items():
        assert float((got[name] - value).abs().max()) <= 4e-7 * abs(mean) * float(value.abs().max()), name


@pytest.mark.parametrize("layout", ["c", "l"])
def test_a_first_piece_unlike_the_rest(layout, backend):
    """A shift taken from dark first lines would cost the variance of bright ones most of its digits."""
    case = Case(1, 8, groups=2, size=(64, 64), layouts=3 * layout, modulated=False)
    (x, *others), grad_y = inputs(case)
    x = x * 0.1 + 100.0
    x[:, :, :1] = 0.0
    tensors = (x, *others)
    y, exact = ours(case, backend)(*tensors), expected(case, tensors, grad_y)["y"]
    assert float((y - exact).abs().max()) <= 1e-5 * float(exact.abs().max())


@pytest.mark.parametrize("layout", ["c", "l"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision_is_no_worse_than_torch_itself(dtype, layout, backend):
    case = Case(4, 32, groups=8, size=(16, 16), dtype=dtype, parameter_dtype=dtype, layouts=3 * layout, modulated=False)
    tensors, grad_y = inputs(case)
    exact = expected(case, tensors, grad_y)
    torchs = with_gradients(lambda x, s, e, w, b, *_: F.silu(F.group_norm(x, case.groups, w, b)), tensors, grad_y)
    got = with_gradients(ours(case, backend), tensors, grad_y)
    for name, value in exact.items():
        assert float((got[name] - value).norm()) <= float((torchs[name] - value).norm()), name


def test_silu_at_the_ends_of_its_range(backend):
    """Weights 0 and biases of any size make the norm's output whatever is asked for."""
    z = torch.tensor([0.0, -0.0, 1e-30, 20.0, 88.0, 89.0, 1e4, 3e38, -20.0, -87.0, -88.3, -88.72, -100.0, -1e4, torch.inf, torch.nan])
    x = torch.randn(1, z.numel(), 9)
    y = _ops.group_norm_silu((x, None, None, torch.zeros_like(z), z, None, None), None, _ops.NormSettings(1, 1e-5, True, 0.0, 0), backend)
    torch.testing.assert_close(y[0, :, 0].double(), F.silu(z.double()), rtol=3e-7, atol=4e-35, equal_nan=True)


def test_nan_and_infinity_stay_in_their_group(backend):
    (x, *others), _ = inputs(Case(2, 8, groups=4, size=(4, 5)))
    x[0, 1, 2, 3], x[1, 6, 0, 0] = torch.nan, torch.inf
    y = ours(Case(2, 8, groups=4, size=(4, 5)), backend)(x, *others)
    spoiled = torch.zeros(2, 8, dtype=torch.bool)
    spoiled[0, :2] = spoiled[1, 6:] = True
    assert torch.equal(y.isnan().flatten(2).any(2), spoiled)


# --- dropout ---


@pytest.mark.parametrize("ids", [0, 5, (7, 3, 7)], ids=str)
@pytest.mark.parametrize("layouts", ["ccc", "llc", "clc"])
def test_the_mask_is_that_of_the_noise_contract(ids, layouts, backend):
    case = Case(3, 20, 7, groups=3, size=(6, 7), dropout=0.25, ids=ids, layouts=layouts)
    tensors, _ = inputs(case)
    y = ours(case, backend)(*tensors)
    assert torch.equal(y == 0, mask(case) == 0)
    kept = ours(replaced(case, dropout=0.0), backend)(*tensors)
    torch.testing.assert_close(y, kept * mask(case).float(), rtol=3e-7, atol=0)


def test_masks_differ_by_sample_step_and_layer_and_keep_their_share():
    def dropped(layer, step):
        layer = GroupNormSiLU(4, 16, dropout=0.2, index=layer)
        return layer(torch.randn(4, 16, 40, 40), key=torch.tensor([SEED, step, 0])) == 0

    first, other_layer, other_step = dropped(0, 0), dropped(1, 0), dropped(0, 1)
    draws = first.numel()
    for masks in (first, other_layer, other_step):
        assert abs(float(masks.float().mean()) - 0.2) < 4 * (0.16 / draws) ** 0.5
    for a, b in ((first, other_layer), (first, other_step), (first[:1], first[1:2]), (first[:, :1], first[:, 1:2])):
        assert abs(float((a & b).float().mean()) - 0.04) < 5 * (0.04 * 0.96 / a.numel()) ** 0.5


def test_parts_of_a_batch_draw_what_the_whole_draws(backend):
    case = Case(4, 8, groups=2, size=(5, 5), dropout=0.3)
    tensors, _ = inputs(case)
    whole = ours(case, backend)(*tensors)
    parts = [t if t is None or t.dim() == 1 else t[2:] for t in tensors]
    assert torch.equal(ours(replaced(case, batch=2, ids=2), backend)(*parts), whole[2:])


def test_no_dropout_without_a_key_or_in_evaluation():
    layer, x, noise = GroupNormSiLU(2, 8, dropout=0.5), torch.randn(2, 8, 4, 4), torch.tensor([1, 2, 3])
    assert (layer(x) != 0).all()
    assert (layer(x, key=noise) == 0).any()
    assert (layer.eval()(x, key=noise) != 0).all()


def test_fused_equals_plain_with_dropout():
    arguments = {"dropout": 0.3, "index": 5}
    fused, plain = (GroupNormSiLU(4, 16, fused=fused, **arguments) for fused in (True, False))
    x, second, noise = torch.randn(3, 10, 6, 5), torch.randn(3, 6, 6, 5), torch.tensor([1, 2, 3])
    a, b = (layer(x, second=second, key=noise) for layer in (fused, plain))
    assert torch.equal(a == 0, b == 0)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


# --- derivatives and transforms ---


def small_case(**changes):
    return replaced(Case(1, 3, 1, groups=2, size=(3, 1), dtype=torch.float64, dropout=0.2), **changes)


@pytest.mark.parametrize("case", [small_case(), small_case(channels=2, second=0, activation=False, dropout=0.0)], ids=str)
def test_gradcheck_of_every_input(case, backend):
    tensors, _ = inputs(case)
    leaves = [t.clone().requires_grad_() for t in tensors if t is not None]

    def run(*present):
        rest = iter(present)
        return ours(case, backend)(*[None if t is None else next(rest) for t in tensors])

    assert gradcheck(run, leaves, check_batched_grad=backend == "cpp")


def test_gradgradcheck(backend):
    case = small_case(size=(2, 1))
    tensors, _ = inputs(case)
    assert gradgradcheck(ours(case, backend), [t.clone().requires_grad_() for t in tensors])


def test_jvp_equals_the_gradient(backend):
    case = small_case()
    tensors, grad_y = inputs(case)
    directions = tuple(torch.randn_like(t) for t in tensors)
    _, tangent = jvp(ours(case, backend), tensors, directions)
    exact = expected(case, tensors, grad_y)
    inner = sum((exact[name] * d).sum() for name, d in zip(list(exact)[1:], directions, strict=True))
    torch.testing.assert_close((tangent * grad_y).sum(), inner, rtol=1e-9, atol=0)


def test_vmap_over_samples_equals_the_batch(backend):
    case = small_case(dropout=0.0)
    tensors, _ = inputs(case)
    whole = ours(case, backend)(*tensors)
    dims = tuple(None if t.dim() == 1 else 0 for t in tensors)
    one = vmap(
        lambda *t: ours(case, backend)(*[a if a.dim() == 1 and d is None else a[None] for a, d in zip(t, dims, strict=True)])[0], dims
    )
    torch.testing.assert_close(one(*tensors), whole)


@pytest.mark.parametrize(
    "case", [Case(2, 8, 4, groups=3, size=(4, 5), dropout=0.3), Case(2, 8, groups=2, size=(4, 4), layouts="lcl", modulated=False)], ids=str
)
def test_compiled_without_a_break(case, backend):
    torch._dynamo.reset()
    tensors, grad_y = inputs(case)
    run = ours(case, backend)
    eager = with_gradients(run, tensors, grad_y)
    compiled = with_gradients(torch.compile(run, fullgraph=True, backend="aot_eager"), tensors, grad_y)
    for name, value in eager.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-5, atol=1e-6)


@needs_cpp
def test_opcheck():
    for case in (
        Case(2, 8, 4, groups=3, size=(4, 5), dropout=0.3),
        Case(2, 8, groups=2, size=(4, 4), dtype=torch.bfloat16, modulated=False),
    ):
        tensors, grad_y = inputs(case)
        nothing = torch.empty(0)
        present = [nothing.clone() if t is None else t for t in tensors]
        y, statistics = torch.zeros(case.shape, dtype=case.dtype), torch.zeros(2, case.batch, case.groups)
        tail = (key(case), case.groups, 1e-5, True, case.dropout, LAYER)
        torch.library.opcheck(torch.ops.fm_fast.group_norm_silu.default, (y, *statistics, *present, *tail))
        torch.ops.fm_fast.group_norm_silu(y, *statistics, *present, *tail)
        gradients = [torch.zeros_like(t) for t in present]
        arguments = (*gradients, grad_y, *present, *statistics, key(case), case.groups, True, case.dropout, LAYER)
        torch.library.opcheck(torch.ops.fm_fast.group_norm_silu_backward.default, arguments)


# --- what training needs ---


def saved_bytes(function):
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel() * t.element_size()) or t, lambda t: t):
        result = function()
    return sum(sizes), result


@needs_cpp
def test_one_full_size_tensor_is_saved():
    """torch keeps the input of the norm and that of silu; ours keeps the first and two numbers a group."""
    layer, x = GroupNormSiLU(8, 32), torch.randn(4, 32, 16, 16, requires_grad=True)
    ours, _ = saved_bytes(lambda: layer(x))
    torchs, _ = saved_bytes(lambda: F.silu(F.group_norm(x, 8, layer.weight, layer.bias)))
    size = x.numel() * 4
    assert size <= ours <= size + 1024
    assert torchs >= 2 * size


@needs_cpp
@pytest.mark.parametrize("layout", ["c", "l"])
def test_bitwise_repeatable_for_any_thread_count(layout):
    case = Case(5, 24, 40, groups=8, size=(17, 19), dropout=0.1, layouts=3 * layout)
    tensors, grad_y = inputs(case)
    results = on_thread_counts(lambda: with_gradients(ours(case, "cpp"), tensors, grad_y))
    assert all(torch.equal(value, results[0][name]) for result in results[1:] for name, value in result.items())


def test_an_empty_batch(backend):
    case = Case(0, 4, 2, groups=2, size=(3, 3), dropout=0.2)
    tensors, grad_y = inputs(case)
    got = with_gradients(ours(case, backend), tensors, grad_y)
    assert got["y"].shape == case.shape
    assert torch.equal(got["weight"], torch.zeros(6))
    assert torch.equal(got["bias"], torch.zeros(6))


def test_a_single_number_a_group_becomes_the_bias(backend):
    bias = torch.randn(4)
    run = ours(Case(1, 4, groups=4, activation=False), backend)
    torch.testing.assert_close(run(torch.randn(1, 4, 1, 1), None, None, torch.ones(4), bias, None, None)[0, :, 0, 0], bias)


@needs_cpp
def test_inputs_made_under_inference_mode_train():
    case = Case(2, 8, groups=2, size=(3, 3))
    with torch.inference_mode():
        x = inputs(case)[0][0]
    weight = torch.ones(8, requires_grad=True)
    ours(case, "cpp")(x, None, None, weight, torch.zeros(8), None, None).sum().backward()
    assert bool(weight.grad.isfinite().all())


def test_a_second_backward_gives_the_same(backend):
    tensors, grad_y = inputs(Case(2, 8, groups=2, size=(3, 3)))
    x = tensors[0].requires_grad_()
    y = ours(Case(2, 8, groups=2, size=(3, 3)), backend)(x, *tensors[1:])
    first, again = (torch.autograd.grad(y, x, grad_y, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, again)


def test_state_dicts_of_group_norm_load():
    norm, layer = torch.nn.GroupNorm(4, 8), GroupNormSiLU(4, 8, activation=False)
    torch.nn.init.normal_(norm.weight)
    layer.load_state_dict(norm.state_dict())
    x = torch.randn(2, 8, 5, 5)
    torch.testing.assert_close(layer(x), norm(x), rtol=1e-5, atol=1e-6)


# --- errors ---

WRONG_SETTINGS = {
    "groups must be at least 1": {"groups": 0},
    "channels must be a multiple of groups, 3, got 8": {"groups": 3},
    "eps must be positive": {"eps": 0.0},
    "dropout must lie in": {"dropout": 1.0},
    "index must lie in": {"index": 2**24},
}


@pytest.mark.parametrize("message", WRONG_SETTINGS)
def test_wrong_settings(message):
    with pytest.raises((ValueError, TypeError), match=message):
        GroupNormSiLU(**{"groups": 2, "channels": 8, **WRONG_SETTINGS[message]})


WRONG_INPUTS = {
    "x must have 8 channels, got 6": {"x": torch.ones(2, 6, 3, 3)},
    "x must be float64, float32": {"x": torch.ones(2, 8, 3, 3, dtype=torch.int64)},
    "x must have shape": {"x": torch.ones(8)},
    "x and second must have 8 channels, got 9": {"second": torch.ones(2, 1, 3, 3)},
    "second must have the dtype of x": {"x": torch.ones(2, 6, 3, 3), "second": torch.ones(2, 2, 3, 3).double()},
    "second must have the shape of x": {"x": torch.ones(2, 6, 3, 3), "second": torch.ones(2, 2, 3, 4)},
    "embedding must have shape": {"embedding": torch.ones(2, 6)},
    "scale must have shape": {"scale": torch.ones(2, 8, 1, 1)},
    "shift must be a torch.Tensor": {"shift": 1.0},
    "shift must be float64": {"shift": torch.ones(2, 8, dtype=torch.int64)},
    "key must be int64 of shape": {"key": torch.ones(3)},
}


@pytest.mark.parametrize("message", WRONG_INPUTS)
def test_wrong_inputs(message):
    arguments = {"x": torch.ones(2, 8, 3, 3), **WRONG_INPUTS[message]}
    with pytest.raises((ValueError, TypeError), match=message):
        GroupNormSiLU(2, 8)(arguments.pop("x"), **arguments)


def raw_arguments(**changes):
    nothing, x = torch.empty(0), torch.ones(2, 4, 3, 3)
    arguments = {
        "y": torch.empty_like(x),
        "mean": torch.empty(2, 2),
        "rstd": torch.empty(2, 2),
        "x": x,
        "second": nothing,
        "embedding": nothing,
    }
    arguments |= {"weight": torch.ones(4), "bias": torch.ones(4), "scale": nothing, "shift": nothing, "key": nothing}
    return arguments | {"groups": 2, "eps": 1e-5, "activation": True, "dropout": 0.0, "index": 0} | changes


WRONG_RAW = {
    "argument y: expected the shape of x with 4 channels": {"y": torch.empty(2, 4, 3, 2)},
    "argument y: expected the dtype of x": {"y": torch.empty(2, 4, 3, 3).double()},
    "argument x: expected a number of channels that groups divides": {"groups": 3},
    "argument groups: expected 1 to 4, got 0": {"groups": 0},
    "argument mean: expected a contiguous tensor of 4": {"mean": torch.empty(3)},
    "argument mean: expected float32, or float64": {"mean": torch.empty(2, 2).double()},
    "argument weight: expected 4 numbers": {"weight": torch.ones(3)},
    "argument scale: expected 4 numbers for each of 2 samples": {"scale": torch.ones(2, 3)},
    "argument second": {"second": torch.ones(2, 4, 3, 2)},
    "argument key": {"dropout": 0.5},
    "argument dropout": {"dropout": 1.0},
    "argument index": {"index": -1},
    "argument x: expected .B, C": {"x": torch.ones(2, 4)},
    "argument x: requires grad": {"x": torch.ones(2, 4, 3, 3, requires_grad=True)},
}


@needs_cpp
@pytest.mark.parametrize("message", WRONG_RAW)
def test_wrong_arguments_of_the_raw_op(message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fm_fast.group_norm_silu(**raw_arguments(**WRONG_RAW[message]))


@pytest.mark.parametrize("how", ["batched", "create_graph"])
def test_an_input_computed_from_another_gets_its_own_gradient_only(how):
    """As in a U-Net, whose decoder reads a skip connection beside what was computed from it."""
    source = torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    layer = GroupNormSiLU(2, 8).double()
    y = layer(torch.sin(3.0 * source), second=source)
    layer.fused = False
    plain = layer(torch.sin(3.0 * source), second=source)
    z = torch.randn(2, *y.shape, dtype=torch.float64)
    expected = torch.stack([torch.autograd.grad(plain, source, row, retain_graph=True)[0] for row in z])
    if how == "batched":
        (found,) = torch.autograd.grad(y, source, z, is_grads_batched=True)
    else:
        found = torch.stack([torch.autograd.grad(y, source, row, create_graph=True)[0] for row in z])
    torch.testing.assert_close(found, expected)
