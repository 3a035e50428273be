"""group_norm_silu against torch's own functions in float64: values, gradients, dropout, layouts."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from norm_cases import SEED, Case, assert_close, check, expected, inputs, mask, ours, replaced, uncancelled, with_gradients

from fm_fast import _ops
from fm_fast.nn.norm import GroupNormSiLU

pytestmark = pytest.mark.usefixtures("poisoned_outputs")
HALVES = [torch.bfloat16, torch.float16]
DTYPES = [torch.float64, torch.float32, *HALVES]
SIZES = [
    Case(2, 6, groups=3, size=(5, 7)),
    Case(3, 32, groups=32, size=(8, 8)),
    Case(2, 12, 20, groups=4, size=(5, 3)),  # a group lies in both inputs
    Case(2, 0, 6, groups=3, size=(5, 7)),  # all channels lie in the second
    Case(1, 130, groups=2, size=(3, 1)),
    Case(2, 8, 8, groups=8, size=(1, 1)),
    Case(3, 5, groups=1, size=(9,)),
    Case(2, 4, groups=2, size=(3, 2, 5)),
    Case(1, 3, groups=3, size=(50, 51)),  # more points than a piece holds
    Case(1, 130, 3, groups=1, size=(40, 26)),  # more numbers than are kept between the backward passes
    Case(4, 6, groups=2),
]


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
