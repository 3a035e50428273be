"""The Triton kernel of path_sample, interpreted, against the independent float64 model."""

import numpy as np
import oracle
import pytest
import torch
from triton_interpreter import array, data, key, layouts, poisoned, run_checks, wide_dtype

import fm_fast as fm
from fm_fast._codes import ObjectiveCode
from fm_fast.objectives import as_objective, time_range
from fm_fast.paths import kernel_form
from fm_fast.time_samplers import as_time_sampler

SEED, STEP = 0x123456789ABCDEF, 4
PATHS = {"ot": fm.OT(), "ot-0.1": fm.OT(sigma_min=0.1), "vp": fm.VP(), "ve": fm.VE(), "cosine": fm.Cosine()}
OBJECTIVES = ["velocity", "noise", "score", "scoreflow", "data"]
TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def test_path_sample_in_the_interpreter():
    run_checks(__file__)


def launch(x1, x0=None, out=None, ids=0, path="ot", objective="velocity", sampler="uniform", t=None, rows=None, flip=0.0, levels=256,
           dequantise=False):  # fmt: skip
    """(x_t, t, rows) of the kernel, in outputs that were NaN before."""
    from fm_fast.kernels.path_sample import launch as path_sample

    out = poisoned(x1, dtype=x1.dtype if x1.is_floating_point() else torch.float32) if out is None else out
    wide, batch = wide_dtype(x1, x0, out), x1.shape[0]
    draw, target = as_time_sampler(sampler), ObjectiveCode[objective].value
    time_code = draw.code if t is None else -1
    t = torch.full((batch,), float("nan"), dtype=wide) if t is None else t
    code, a, b = kernel_form(PATHS[path]) if rows is None else (-1, 0.0, 0.0)
    rows = torch.full((batch, 6), float("nan"), dtype=wide) if rows is None else rows
    noise = torch.empty(0) if x0 is None else x0
    limits = time_range(PATHS[path], as_objective(objective))
    path_sample(out, t, rows, x1, noise, key(SEED, STEP, ids), code, a, b, target, time_code, draw.mean, draw.std, *limits, flip,
                float(levels), dequantise)  # fmt: skip
    return out, t, rows


def assert_point(out, x1, x0, rows, ids=None):
    """x_t against the model's, given the rows."""
    noise = oracle.normal(tuple(x1.shape), SEED, STEP, ids=ids) if x0 is None else array(x0)
    expected = oracle.sample(x1 if isinstance(x1, np.ndarray) else array(x1), noise, array(rows))
    tolerance = TOLERANCE[out.dtype] * max(1.0, np.abs(array(rows)[:, :2]).max())
    np.testing.assert_allclose(array(out), expected, rtol=TOLERANCE[out.dtype], atol=tolerance)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def check_times_and_coefficients(path, objective):
    sampler = ["uniform", "stratified", "logit-normal"][(OBJECTIVES.index(objective) + len(path)) % 3]
    ids = np.arange(2) + 7
    x1 = data((2, 1, 3, 5))
    out, t, rows = launch(x1, ids=7, path=path, objective=objective, sampler=sampler)
    low, high = oracle.time_range(path, objective)
    np.testing.assert_allclose(array(t), low + (high - low) * oracle.raw_time(sampler, 2, SEED, STEP, ids), rtol=3e-7, atol=6e-8)
    np.testing.assert_allclose(array(rows), oracle.coefficients(path, objective, array(t)), rtol=1e-6, atol=1e-7)
    assert_point(out, x1, None, rows, ids)


@pytest.mark.parametrize("path", PATHS)
def check_float64_coefficients_are_exact(path):
    t = torch.linspace(0, 0.95, 5, dtype=torch.float64)
    _, t, rows = launch(data((5, 2), torch.float64), path=path, t=t)
    np.testing.assert_allclose(array(rows), oracle.coefficients(path, "velocity", array(t)), rtol=1e-13, atol=1e-15)


def check_sigma_does_not_cancel_near_the_data():
    t = 1 - torch.logspace(-4.9, -1, 4, dtype=torch.float64)
    _, t, rows = launch(data((4, 1), torch.float64), path="vp", t=t)
    integral = 0.1 * (1 - array(t)) + 9.95 * (1 - array(t)) ** 2
    np.testing.assert_allclose(array(rows)[:, 1], np.sqrt(-np.expm1(-integral)), rtol=1e-14)


@pytest.mark.parametrize("x1_dtype", [torch.uint8, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def check_dtypes(x1_dtype, out_dtype):
    x1 = data((2, 3, 8, 4), x1_dtype)
    x0 = None if out_dtype in (torch.bfloat16, torch.float32) else data((2, 3, 8, 4), torch.float16, seed=2)
    out, t, rows = launch(x1, x0, out=poisoned(x1, dtype=out_dtype))
    assert t.dtype == rows.dtype == wide_dtype(x1, out)
    assert_point(out, oracle.data(array(x1), SEED, STEP), x0, rows)


@pytest.mark.parametrize("layout", list(layouts((2, 3, 4, 4))))
def check_layouts(layout):
    aligned, odd = (2, 3, 4, 8), (2, 3, 5, 7)
    for shape, out_layout in ((aligned, "contiguous"), (aligned, "channels_last"), (odd, "channels_last")):
        x1, x0 = layouts(shape)[layout], data(shape, seed=3) if out_layout == "contiguous" else None
        out, _, rows = launch(x1, x0, out=poisoned(layouts(shape)[out_layout]))
        assert_point(out, x1, x0, rows)


@pytest.mark.parametrize("shape", [(3,), (5, 1), (4, 2), (2, 2051), (1, 2, 9), (2, 3, 2, 3, 5), (2, 1, 28, 28), (1, 3, 33, 33)], ids=str)
def check_odd_sizes(shape):
    x1 = data(shape)
    out, _, rows = launch(x1)
    assert_point(out, x1, None, rows)


def check_two_blocks_a_row_and_several_tiles_a_program(launch_plan, monkeypatch):
    monkeypatch.setattr(launch_plan, "TILE", 128)
    monkeypatch.setattr(launch_plan, "tiles_of", lambda elements: 2)
    for size in (512, 490):
        x1 = data((2, size), torch.float16)
        out, _, rows = launch(x1)
        assert_point(out, x1, None, rows)


def check_offsets_beyond_32_bits_and_batches_beyond_the_grid(launch_plan, monkeypatch):
    monkeypatch.setattr(launch_plan, "WORD_LIMIT", 0)
    monkeypatch.setattr(launch_plan, "GRID_LIMIT", 2)
    for shape in ((5, 3, 4, 4), (3, 3, 5, 7)):
        x1 = data(shape)
        out, _, rows = launch(x1)
        assert_point(out, x1, None, rows)


@pytest.mark.parametrize("dequantise", [False, True])
@pytest.mark.parametrize("shape", [(6, 3, 4, 8), (6, 1, 5, 7)], ids=str)
def check_flip_and_data_map(shape, dequantise):
    x1 = data(shape, torch.uint8, levels=17)
    ids = np.arange(6) + 2
    out, _, rows = launch(x1, ids=2, flip=0.5, levels=17, dequantise=dequantise)
    expected = oracle.data(x1.numpy(), SEED, STEP, ids, flip=0.5, levels=17, dequantise=dequantise)
    assert_point(out, expected, None, rows, ids)


def check_given_times_are_clamped_and_nan_stays():
    x1 = data((4, 3))
    _, t, rows = launch(x1, path="vp", t=torch.tensor([-1.0, 0.25, 2.0, float("nan")]))
    np.testing.assert_array_equal(array(t), np.float32([0.0, 0.25, 1 - 1e-5, np.nan]))
    assert rows[3].isnan().any() and rows[:3].isfinite().all()


def check_given_coefficients_are_only_read():
    x1, rows, t = data((4, 3)), data((4, 6), seed=5), data((4,))
    out, t_after, rows_after = launch(x1, rows=rows.clone(), t=t.clone())
    assert torch.equal(t, t_after) and torch.equal(rows, rows_after)
    assert_point(out, x1, None, rows)


def check_ids_name_the_sample_not_its_place():
    x1 = data((3, 2, 3, 3))
    listed, _, _ = launch(x1, ids=[9, 4, 2**32 + 5])
    for i, identity in enumerate((9, 4, 5)):
        alone, _, _ = launch(x1[i : i + 1], ids=identity)
        assert torch.equal(listed[i], alone[0])


def check_nothing_to_do():
    launch(data((0, 3, 4, 4)))
    _, t, rows = launch(data((2, 0)))
    assert t.isfinite().all() and rows.isfinite().all()


def check_strides_that_do_not_collapse_are_an_error():
    with pytest.raises(ValueError, match=r"x1 must have strides that collapse"):
        launch(data((2, 3, 4, 5)).transpose(2, 3), out=torch.empty(2, 3, 5, 4))


def launch_codes(x1, out, rows, **codes):
    """Run the kernel on given rows, which it overwrites unless the path is -1."""
    from fm_fast.kernels.path_sample import launch as path_sample

    codes = {"path": 0, "path_a": 0.0, "path_b": 0.0, "objective": 0, "t_sampler": 0} | codes
    numbers = {"t_mean": 0.0, "t_std": 1.0, "t_min": 0.0, "t_max": 1.0, "flip": 0.0, "levels": 256.0, "dequantise": False}
    path_sample(out, torch.zeros(len(x1)), rows, x1, torch.empty(0), key(SEED, STEP, 0), **codes, **numbers)


@pytest.mark.parametrize("code", [-2, 5])
@pytest.mark.parametrize("argument", ["path", "objective", "t_sampler"])
def check_unknown_codes_are_an_error(argument, code):
    x1 = data((2, 3))
    out, rows = poisoned(x1), torch.zeros(2, 6)
    with pytest.raises(ValueError, match=f"^{argument} must be one of .*, got {code}$"):
        launch_codes(x1, out, rows, **{argument: code})
    assert out.isnan().all() and not rows.any()


@pytest.mark.parametrize("objective", [-1, 5])
def check_given_coefficients_may_be_those_of_any_objective(objective):
    x1, rows = data((4, 3)), data((4, 6), seed=5)
    out = poisoned(x1)
    launch_codes(x1, out, rows, path=-1, objective=objective, t_sampler=-1)
    assert_point(out, x1, None, rows)
