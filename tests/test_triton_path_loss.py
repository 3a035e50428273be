"""The Triton kernels of path_loss and path_loss_backward, interpreted, against the independent float64 model."""

import numpy as np
import oracle
import pytest
import torch
from triton_interpreter import array, data, key, layouts, poisoned, run_checks, wide_dtype

SEED, STEP = 0x123456789ABCDEF, 4
REDUCTIONS = ["mean", "sum", "none"]
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}
DTYPES = [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64]


def test_path_loss_in_the_interpreter():
    run_checks(__file__)


def coefficients(batch, dtype=torch.float32):
    """Rows without a special value, so that a swapped or forgotten number shows; the weights are positive, as all are."""
    rows = data((batch, 6), seed=9)
    return torch.cat([rows[:, :5], rows[:, 5:].abs()], 1).to(dtype)


def launch(o, x1, x0=None, weight=None, reduction="mean", ids=0, flip=0.0, levels=256, dequantise=False, gradient=True):
    """(loss, gradient) of the forward kernel, in outputs that were NaN before."""
    from fm_fast.kernels.path_loss import launch as path_loss

    rows = coefficients(o.shape[0], wide_dtype(x1, x0))
    loss = torch.full(o.shape[:1] if reduction == "none" else (), float("nan"), dtype=wide_dtype(o, rows))
    grad = poisoned(o) if gradient else o.new_empty(0)
    noise, mask = torch.empty(0) if x0 is None else x0, torch.empty(0) if weight is None else weight
    path_loss(loss, grad, o, x1, noise, key(SEED, STEP, ids), rows, mask, REDUCTIONS.index(reduction), flip, float(levels), dequantise)
    return loss, grad


def launch_backward(o, x1, grad_output, reduction="mean", weight=None, finished=False):
    from fm_fast.kernels.path_loss import launch_backward as path_loss_backward

    grad, rows = poisoned(o), coefficients(o.shape[0], wide_dtype(x1))
    mask = torch.empty(0) if weight is None else weight
    path_loss_backward(grad, o, x1, torch.empty(0), key(SEED, STEP, 0), rows, mask, grad_output, REDUCTIONS.index(reduction), 0.0, 256.0,
                       False, finished)  # fmt: skip
    return grad


def expected(o, x1, x0=None, weight=None, reduction="mean", ids=None, **data_map):
    """(loss, gradient) of the model."""
    values = oracle.data(array(x1), SEED, STEP, ids, **data_map)
    noise = oracle.normal(tuple(o.shape), SEED, STEP, ids=ids) if x0 is None else array(x0)
    mask = None if weight is None else array(weight)
    return oracle.loss(array(o), values, noise, array(coefficients(o.shape[0])), mask, reduction)


def assert_loss(found, wanted):
    (loss, grad), (wanted_loss, wanted_grad) = found, wanted
    np.testing.assert_allclose(array(loss), wanted_loss, rtol=2e-6)
    scale = np.abs(wanted_grad).max(initial=0.0)
    np.testing.assert_allclose(array(grad), wanted_grad, rtol=TOLERANCE[grad.dtype], atol=TOLERANCE[grad.dtype] * scale)


@pytest.mark.parametrize("o_dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("x1_dtype", DTYPES[::2], ids=str)
def check_dtypes(o_dtype, x1_dtype):
    o, x1 = data((2, 3, 8, 4), o_dtype), data((2, 3, 8, 4), x1_dtype, seed=2)
    x0 = data((2, 3, 8, 4), torch.bfloat16, seed=3) if o_dtype == torch.float32 else None
    reduction = "sum" if o_dtype == torch.float16 else "mean"
    assert_loss(launch(o, x1, x0, reduction=reduction), expected(o, x1, x0, reduction=reduction))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weight_shape", [None, (2,), (2, 3, 5, 7)], ids=str)
def check_reductions_and_weights(reduction, weight_shape):
    o, x1 = data((2, 3, 5, 7)), data((2, 3, 5, 7), seed=2)
    weight = None if weight_shape is None else data(weight_shape, seed=4).abs()
    assert_loss(launch(o, x1, weight=weight, reduction=reduction), expected(o, x1, weight=weight, reduction=reduction))


@pytest.mark.parametrize("o_layout", list(layouts((2, 3, 4, 4)))[:4])
@pytest.mark.parametrize("x1_layout", ["contiguous", "channels_last", "expanded"])
def check_mixed_layouts(o_layout, x1_layout):
    shape = (2, 3, 5, 7) if o_layout == "channels_last" else (2, 3, 4, 8)
    o, x1 = layouts(shape)[o_layout], layouts(shape)[x1_layout]
    assert_loss(launch(o, x1), expected(o, x1))


@pytest.mark.parametrize("shape", [(3,), (5, 1), (4, 2), (2, 2051), (1, 2, 9), (2, 3, 2, 3, 5), (1, 3, 33, 33)], ids=str)
def check_odd_sizes(shape):
    o, x1 = data(shape), data(shape, seed=2)
    assert_loss(launch(o, x1, reduction="none"), expected(o, x1, reduction="none"))


def check_many_programs_add_up_and_repeat(launch_plan, monkeypatch):
    monkeypatch.setattr(launch_plan, "TILE", 128)
    monkeypatch.setattr(launch_plan, "tiles_of", lambda elements: 2)
    o, x1 = data((2, 300), torch.bfloat16), data((2, 300), torch.float16, seed=2)
    for reduction in ("mean", "none"):
        found = launch(o, x1, reduction=reduction)
        assert_loss(found, expected(o, x1, reduction=reduction))
        assert all(torch.equal(a, b) for a, b in zip(found, launch(o, x1, reduction=reduction), strict=True))


def check_second_stage_with_more_partials_than_a_tile(monkeypatch):
    from fm_fast.kernels import _combine

    monkeypatch.setattr(_combine, "COMBINE_TILE", 32)
    o, x1 = data((40, 3)), data((40, 3), seed=2)
    assert_loss(launch(o, x1), expected(o, x1))


def check_offsets_beyond_32_bits_and_batches_beyond_the_grid(launch_plan, monkeypatch):
    monkeypatch.setattr(launch_plan, "WORD_LIMIT", 0)
    monkeypatch.setattr(launch_plan, "GRID_LIMIT", 2)
    for shape in ((5, 3, 4, 4), (3, 3, 5, 7)):
        o, x1 = data(shape), data(shape, seed=2)
        assert_loss(launch(o, x1), expected(o, x1))


@pytest.mark.parametrize("dequantise", [False, True])
def check_flip_and_data_map(dequantise):
    o, x1, ids = data((6, 3, 4, 8)), data((6, 3, 4, 8), torch.uint8, levels=17, seed=2), np.arange(6) * 3 + 1
    settings = dict(flip=0.5, levels=17, dequantise=dequantise, ids=ids)
    assert_loss(launch(o, x1, **settings), expected(o, x1, **settings))


def check_loss_without_gradient():
    o, x1 = data((3, 8)), data((3, 8), seed=2)
    loss, grad = launch(o, x1, gradient=False)
    assert grad.numel() == 0
    np.testing.assert_allclose(array(loss), expected(o, x1)[0], rtol=2e-6)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def check_backward_multiplies_before_rounding(reduction, dtype):
    o, x1 = data((3, 3, 8, 4), dtype), data((3, 3, 8, 4), dtype, seed=2)
    grad_output = torch.tensor([2.0**16, 1.0, -3.0]) if reduction == "none" else torch.tensor(2.0**16 if reduction == "mean" else 0.5)
    wanted = expected(o, x1, reduction=reduction)[1] * oracle.column(np.atleast_1d(array(grad_output)), array(o))
    grad = launch_backward(o, x1, grad_output, reduction)
    np.testing.assert_allclose(array(grad), wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * np.abs(wanted).max() / 8)


@pytest.mark.parametrize("shape", [(3, 3, 8, 4), (2, 5)], ids=str)
def check_a_finished_gradient_is_left_alone_where_grad_output_is_one(shape):
    o, x1 = data(shape), data(shape, seed=2)
    assert bool(launch_backward(o, x1, torch.ones(()), finished=True).isnan().all())
    for grad_output, reduction in ((torch.tensor(0.5), "sum"), (torch.ones(shape[0]), "none")):
        found = launch_backward(o, x1, grad_output, reduction, finished=True)
        assert torch.equal(found, launch_backward(o, x1, grad_output, reduction))


def check_half_gradient_survives_the_mean_of_many():
    """2 / N of a million elements is below float16's smallest number; the scaled gradient is not."""
    from fm_fast.kernels import path_loss

    o, x1 = data((2, 64), torch.float16), data((2, 64), torch.float16, seed=2)
    averaged = path_loss._averaged
    path_loss._averaged = lambda o, reduction: 2**26
    try:
        grad = launch_backward(o, x1, torch.tensor(2.0**24))
    finally:
        path_loss._averaged = averaged
    wanted = expected(o, x1, reduction="sum")[1] / 4
    np.testing.assert_allclose(array(grad), wanted, rtol=1e-3, atol=1e-3)


def check_nan_propagates():
    o, x1 = data((2, 8)), data((2, 8), seed=2)
    o[1, 3] = float("nan")
    loss, grad = launch(o, x1, reduction="none")
    assert loss[1].isnan() and loss[0].isfinite()
    assert grad.isnan().sum() == 1


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0)], ids=str)
def check_empty_batches(shape):
    o = torch.zeros(shape)
    assert launch(o, o)[0].isnan()
    assert launch(o, o, reduction="sum")[0] == 0.0
    assert launch(o, o, reduction="none")[0].isnan().all()
    launch_backward(o, o, torch.ones(()))


@pytest.mark.parametrize("reduction", [-1, 3])
def check_an_unknown_reduction_is_an_error(reduction):
    from fm_fast.kernels import path_loss

    o, x1, rows, nothing = data((2, 3)), data((2, 3), seed=2), coefficients(2), torch.empty(0)
    inputs, data_map = (o, x1, nothing, key(SEED, STEP, 0), rows, nothing), (0.0, 256.0, False)
    with pytest.raises(ValueError, match=f"^reduction must be 0 to 2, got {reduction}$"):
        path_loss.launch(torch.zeros(2), torch.zeros_like(o), *inputs, reduction, *data_map)
    with pytest.raises(ValueError, match=f"^reduction must be 0 to 2, got {reduction}$"):
        path_loss.launch_backward(torch.zeros_like(o), *inputs, torch.ones(2), reduction, *data_map)
