"""The Triton kernel of step_error, interpreted, against the independent float64 model."""

import numpy as np
import oracle
import pytest
import torch
from triton_interpreter import array, data, layouts, run_checks

COEFFICIENTS = [-0.5, 0.3, 1.25, -2.0, 0.01, 3.0, 0.5, -1.5, 0.125]
RTOL, ATOL = 0.3, 0.1


def test_step_error_in_the_interpreter():
    run_checks(__file__)


def launch(y, end, k, coefficients=COEFFICIENTS):
    """The means, which were NaN before."""
    from fm_fast.kernels.step_error import launch as step_error

    means = torch.full(y.shape[:1], float("nan"), dtype=torch.float64)
    step_error(means, y, end, k, torch.tensor(coefficients[: len(k)], dtype=torch.float64), RTOL, ATOL)
    return means


def assert_norm(y, end, k):
    """As in test_step_error.py; a tile of 1024 squares is added in a tree."""
    wanted, growth = oracle.step_error(array(y), array(end), [array(x) for x in k], COEFFICIENTS[: len(k)], RTOL, ATOL)
    rounding = 2.0**-53 if torch.float64 in (y.dtype, end.dtype) else 2.0**-24
    found = array(launch(y, end, k))
    assert (np.abs(found - wanted) <= rounding * ((2 * len(k) + 4) * growth + 50 * wanted)).all()


def tensors(shape, terms=2, dtype=torch.float32):
    return data(shape, dtype, seed=1), data(shape, dtype, seed=2), [data(shape, dtype, seed=3 + j) for j in range(terms)]


@pytest.mark.parametrize("shape", [(3,), (5, 1), (4, 2), (2, 2051), (2, 3, 2, 3, 5), (1, 3, 33, 33), (2, 3, 16, 16)], ids=str)
def check_odd_sizes(shape):
    assert_norm(*tensors(shape))


@pytest.mark.parametrize("terms", [1, 4, 9])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def check_numbers_of_terms_and_dtypes(terms, dtype):
    y, end, k = tensors((2, 3, 4, 4), terms, dtype)
    assert_norm(y, end, k)
    assert_norm(y.float(), end, k)


@pytest.mark.parametrize("layout", list(layouts((2, 3, 4, 4))))
def check_layouts(layout):
    for shape, other in (((2, 3, 4, 8), "contiguous"), ((2, 3, 5, 7), "channels_last")):
        x = layouts(shape)[layout]
        assert_norm(x, layouts(shape)[other], [x, data(shape, seed=3)])


def check_channels_last_samples_are_rows(launch_plan):
    y, end, k = tensors((2, 3, 5, 7))
    last = [x.to(memory_format=torch.channels_last) for x in (y, end, *k)]
    plan = launch_plan.sample_plan(y, y=last[0], end=last[1])
    assert (plan.flat, plan.batch, plan.positions, set(plan.strides)) == (True, 2, 105, {(105, 105, 1)})
    assert_norm(last[0], last[1], last[2:])
    assert not launch_plan.sample_plan(y, y=last[0], end=end).flat


def check_several_programs_a_sample_and_launches_beyond_the_limits(launch_plan, monkeypatch):
    monkeypatch.setattr(launch_plan, "tiles_of", lambda elements: 2)
    monkeypatch.setattr(launch_plan, "TILE", 128)
    monkeypatch.setattr(launch_plan, "WORD_LIMIT", 0)
    monkeypatch.setattr(launch_plan, "GRID_LIMIT", 2)
    for shape in ((3, 3, 17, 9), (1, 1100)):
        assert_norm(*tensors(shape))
    y, end, k = tensors((3, 700))
    assert torch.equal(launch(y[1:2], end[1:2], [x[1:2] for x in k]), launch(y, end, k)[1:2])


def check_what_is_not_finite_stays_in_its_sample():
    y, end, k = (data((6, 50), seed=seed) for seed in range(3))
    for sample, tensor in ((1, y), (2, end), (3, k)):
        tensor[sample, 7] = torch.nan
    k[4, 3] = torch.inf
    found = launch(y, end, [k])
    assert found.isnan().tolist() == [False, True, True, True, False, False]
    assert found.isinf().tolist() == [False, False, False, False, True, False]


def check_nothing_to_do():
    assert launch(torch.empty(0, 3), torch.empty(0, 3), [torch.empty(0, 3)]).shape == (0,)
    assert launch(torch.empty(2, 0), torch.empty(2, 0), [torch.empty(2, 0)]).isnan().all()


WRONG = {
    "k must hold": {"k": []},
    "end must be y's size": {"end": torch.ones(2, 4)},
    r"k\[1\] must be y's size": {"k": [torch.ones(2, 3), torch.ones(6, 3)]},
    r"means must be contiguous float64 \[2\], got torch.float32": {"means": torch.ones(2)},
    r"coefficients must be contiguous float64 \[1\], got torch.float64 \(2,\)": {"coefficients": torch.ones(2, dtype=torch.float64)},
}


@pytest.mark.parametrize("message", WRONG)
def check_wrong_arguments(message):
    from fm_fast.kernels.step_error import launch as step_error

    arguments = {"means": torch.ones(2, dtype=torch.float64), "y": torch.ones(2, 3), "end": torch.ones(2, 3), "k": [torch.ones(2, 3)]}
    arguments |= {"coefficients": torch.ones(1, dtype=torch.float64), "rtol": 1.0, "atol": 1.0} | WRONG[message]
    with pytest.raises(ValueError, match=message):
        step_error(**arguments)
