"""The Triton kernels of group_norm_silu and its backward, interpreted, against torch's own functions in float64."""

import pytest
import torch
from norm_cases import LAYER, NAMES, Case, assert_close, expected, inputs, key, uncancelled
from triton_interpreter import poisoned, run_checks

from fm_fast import _philox

CASES = [
    Case(2, 6, groups=3, size=(5, 7)),
    Case(2, 32, groups=32, size=(4, 4), dropout=0.3, layouts="lll"),
    Case(2, 12, 20, groups=4, size=(5, 3), dropout=0.3, ids=(7, 3)),  # a group lies in both inputs
    Case(1, 24, 12, groups=3, size=(4, 3), layouts="lcl"),
    Case(1, 130, groups=2, size=(2, 1)),
    Case(2, 8, 8, groups=8, size=(1, 1), modulated=False),
    Case(3, 5, groups=1, size=(9,), activation=False),
    Case(2, 96, groups=32, size=(3, 3), layouts="lll", modulated=False),
    Case(1, 2, groups=1, size=(75, 75), dropout=0.2),  # more than one tile holds
    Case(1, 64, groups=8, size=(12, 16), layouts="lll"),
    Case(17, 4, groups=2, size=(2, 2)),  # more samples than the second kernel takes at once
]
WALKS = [
    Case(2, 6, 4, groups=2, size=(5, 6), dropout=0.3, ids=(7, 3), layouts="lll"),
    Case(1, 16, groups=4, size=(8, 8), dropout=0.3, layouts="lll"),
    Case(1, 8, groups=4, size=(13, 12), dropout=0.3, layouts="lll"),  # more tiles than the backward pass takes notes of
    Case(1, 8, groups=2, size=(8, 8), layouts="lll", modulated=False),
    Case(1, 4, 6, groups=5, size=(7, 5), dropout=0.3),
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def test_group_norm_silu_in_the_interpreter():
    run_checks(__file__)


def launch(case, tensors, grad_y, index=LAYER):
    """The result and all gradients, by name, in outputs that were NaN before."""
    from fm_fast.kernels.group_norm_silu import launch as forward
    from fm_fast.kernels.group_norm_silu_backward import launch as backward

    nothing, wide = torch.empty(0), torch.float64 if case.dtype == torch.float64 else torch.float32
    present = [nothing if t is None else t for t in tensors]
    y = poisoned(tensors[0]) if case.second == 0 else poisoned(grad_y)
    mean, rstd = (torch.full((case.batch, case.groups), torch.nan, dtype=wide) for _ in range(2))
    tail = (case.activation, case.dropout, index)
    forward(y, mean, rstd, *present, key(case), case.groups, 1e-5, *tail)
    gradients = [poisoned(t) for t in present]
    backward(*gradients, grad_y, *present, mean, rstd, key(case), case.groups, *tail)
    return {"y": y} | {name: g for name, g, t in zip(NAMES, gradients, tensors, strict=True) if t is not None}


def check(case):
    tensors, grad_y = inputs(case)
    assert_close(launch(case, tensors, grad_y), expected(case, tensors, grad_y), uncancelled(case, tensors, grad_y))


@pytest.mark.parametrize("case", CASES, ids=str)
def check_sizes_layouts_and_dropout(case):
    check(case)


@pytest.mark.parametrize("case", [case for case in CASES if "l" in case.layouts], ids=str)
def check_as_where_samples_are_many(case, monkeypatch):
    """Programs of more channels."""
    from fm_fast.kernels import _norm_geometry

    monkeypatch.setattr(_norm_geometry, "FEW_PROGRAMS", 0)
    check(case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["c", "l"])
def check_dtypes(dtype, layout):
    check(Case(2, 8, 8, groups=4, size=(4, 3), dtype=dtype, layouts=3 * layout, dropout=0.25))


def check_parameters_in_half_precision():
    check(Case(2, 8, groups=4, size=(4, 3), dtype=torch.bfloat16, parameter_dtype=torch.bfloat16))


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles so small that programs walk over the positions."""
    from fm_fast.kernels import _norm_geometry

    for name, elements in (("TILE", 32), ("HELD_TILE", 64)):
        monkeypatch.setattr(_norm_geometry, name, elements)


@pytest.mark.parametrize("case", WALKS, ids=str)
def check_walks(case, small_tiles):
    check(case)


def far_errors(case, tensors, grad_y):
    """The largest error of every result, relative to its largest number."""
    got, exact = launch(case, tensors, grad_y), expected(case, tensors, grad_y)
    return {name: float((got[name] - value).abs().max() / value.abs().max()) for name, value in exact.items()}


@pytest.mark.parametrize("layout", ["c", "l"])
def check_a_mean_far_from_zero(layout, small_tiles):
    case = Case(1, 8, groups=2, size=(16, 16), mean=300.0, modulated=False, layouts=3 * layout)
    errors = far_errors(case, *inputs(case))
    assert max(errors.values()) <= 4e-7 * 300.0, errors


@pytest.mark.parametrize("layout", ["c", "l"])
def check_a_walk_whose_first_values_are_far_from_the_rest(layout, small_tiles):
    """The sums are taken about them."""
    case = Case(1, 8, groups=2, size=(16, 16), mean=300.0, modulated=False, layouts=3 * layout)
    tensors, grad_y = inputs(case)
    tensors[0][:, :, :2] -= 600.0
    errors = far_errors(case, tensors, grad_y)
    assert max(errors.values()) <= 3e-6, errors


@pytest.mark.parametrize("probability", [0.0, 1e-12, 0.1, 0.5, 0.9999999999])
def check_the_limit_of_words_is_that_of_their_uniforms(probability):
    from fm_fast.kernels._norm_geometry import word_limit

    limit = word_limit(probability) % 2**32
    around = _philox.uniform(torch.arange(max(0, limit - 2), min(2**32, limit + 2)))
    assert int((around < torch.tensor(probability)).sum()) == min(limit, 2)


def check_an_empty_batch():
    case = Case(0, 4, 2, groups=2, size=(3, 3))
    tensors, grad_y = inputs(case)
    got = launch(case, tensors, grad_y)
    assert torch.equal(got["weight"], torch.zeros(6))


def check_channels_that_groups_does_not_divide():
    with pytest.raises(ValueError, match="multiple of 4 channels, got 6"):
        launch(Case(2, 6, groups=4, size=(3, 3)), *inputs(Case(2, 6, groups=2, size=(3, 3))))


@pytest.mark.parametrize("index", [-1, 2**24])
def check_an_index_of_no_counter_is_an_error(index):
    case = Case(2, 4, groups=2, size=(3, 3), dropout=0.5)
    with pytest.raises(ValueError, match=f"^index must be at least 0 and below 16777216, got {index}$"):
        launch(case, *inputs(case), index=index)
