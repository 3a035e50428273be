"""step_error against the independent float64 model: sizes, dtypes and layouts, what is not finite, and what it refuses."""

import itertools

import numpy as np
import oracle
import pytest
import torch
from thread_counts import on_thread_counts

from fm_fast import _backends, _ops

needs_cpp = pytest.mark.skipif(_backends.why_not("step_error", "cpu", "cpp") is not None, reason="the C++ library is not built")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SMALL_SAMPLES = [(3,), (1, 1), (700, 1), (600, 2), (40, 5), (9, 127), (2, 3, 5, 7), (2, 3, 2, 3, 5)]
SHAPES = [*SMALL_SAMPLES, (3, 1025), (2, 3072), (1, 5, 33, 31), (2, 70, 3, 3)]
COEFFICIENTS = [-0.5, 0.3, 1.25, -2.0, 0.01, 3.0, 0.5, -1.5, 0.125, 2.0]
RTOL, ATOL = 0.3, 0.1


def data(shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def norm(y, end, k, backend, coefficients=COEFFICIENTS, rtol=RTOL, atol=ATOL):
    means = torch.full(y.shape[:1], torch.nan, dtype=torch.float64)
    with torch.no_grad():
        _ops.step_error(backend)(means, y, end, k, torch.tensor(coefficients[: len(k)], dtype=torch.float64), rtol, atol)
    return means


def check(found, y, end, k, coefficients=COEFFICIENTS, rtol=RTOL, atol=ATOL):
    """The error rounds as often as it has terms, the ratio a few times, and a sum of 1024 squares has 64 in a lane and 16 lanes."""
    model = [x.double().numpy() for x in (y, end, *k)]
    wanted, growth = oracle.step_error(model[0], model[1], model[2:], coefficients[: len(k)], rtol, atol)
    rounding = 2.0**-53 if torch.float64 in (y.dtype, end.dtype) else 2.0**-24
    assert (np.abs(found.numpy() - wanted) <= rounding * ((2 * len(k) + 4) * growth + 100 * wanted)).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sizes_and_numbers_of_terms(shape, dtype, backend):
    for terms in range(1, 11):
        y, end, *k = (data(shape, seed, dtype) for seed in range(2 + terms))
        check(norm(y, end, k, backend), y, end, k)


@pytest.mark.parametrize("shape", [(7, 3), (3, 2, 5, 4)], ids=str)
def test_every_mix_of_dtypes(shape, backend):
    for y_dtype, end_dtype, k_dtype in itertools.product(DTYPES, DTYPES, DTYPES):
        y, end, k = data(shape, 0, y_dtype), data(shape, 1, end_dtype), [data(shape, 2, k_dtype), data(shape, 3), data(shape, 4, k_dtype)]
        check(norm(y, end, k, backend), y, end, k)


def layouts(x):
    """Tensors of the same numbers in memory of every kind that has a batch, a channel and a point stride."""
    yield x.contiguous()
    yield torch.stack([x, x, x], 1)[:, 1]
    yield torch.cat([torch.zeros(1), x.flatten()])[1:].view(x.shape)
    yield x.movedim(0, -1).contiguous().movedim(-1, 0)
    if x.dim() == 4:
        yield x.contiguous(memory_format=torch.channels_last)
        yield torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last)[:, : x.shape[1]]


@pytest.mark.parametrize("shape", [(3, 4, 5, 3), (20, 3), (2, 3, 700), (2, 20, 9, 9), (7,), (9, 1)], ids=str)
def test_any_mix_of_layouts(shape, backend):
    y, end, k = data(shape, 0), data(shape, 1), data(shape, 2)
    for moved in itertools.product(layouts(y), layouts(end), layouts(k)):
        check(norm(moved[0], moved[1], [moved[2], k], backend), y, end, [k, k])


def test_expanded_inputs(backend):
    y, end, k = torch.ones(1, 1).expand(3, 70), torch.full((1, 70), 2.0).expand(3, 70), torch.arange(3.0)[:, None].expand(3, 70)
    np.testing.assert_allclose(norm(y, end, [k], backend, [1.0], 0.5, 1.0), [0.0, 0.25, 1.0], rtol=1e-6)


@pytest.mark.parametrize(("rtol", "atol"), [(0.0, 1e-3), (1e-3, 0.0), (1e-9, 1e-12)])
def test_tolerances(rtol, atol, backend):
    y, end, k = data((5, 40), 0), data((5, 40), 1), [data((5, 40), 2)]
    check(norm(y, end, k, backend, [1.0], rtol, atol), y, end, k, [1.0], rtol, atol)


def test_an_error_of_zero_is_zero(backend):
    y = data((3, 50), 0)
    assert not norm(y, y, [y, y], backend, [1.0, -1.0]).any()


@pytest.mark.parametrize("shape", [(6, 2), (6, 40), (6, 3, 700)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_what_is_not_finite_stays_in_its_sample(shape, dtype, backend):
    y, end, k = (data(shape, seed, dtype) for seed in range(3))
    for sample, tensor in ((1, y), (2, end), (3, k)):
        tensor[sample].view(-1)[-1] = torch.nan
    k[4].view(-1)[0], y[5].view(-1)[0] = torch.inf, torch.inf
    found = norm(y, end, [k, k], backend, [1.0, 2.0])
    assert found.isnan().tolist() == [False, True, True, True, False, False]
    assert found.isinf().tolist() == [False, False, False, False, True, False]


@pytest.mark.parametrize("shape", [(0,), (0, 3), (0, 3, 4, 4)], ids=str)
def test_no_samples(shape, backend):
    assert norm(torch.empty(shape), torch.empty(shape), [torch.empty(shape)], backend).shape == (0,)


@pytest.mark.parametrize("shape", [(2, 0), (2, 3, 0)], ids=str)
def test_the_mean_of_no_elements_is_nan(shape, backend):
    means, none = torch.full((2,), 7.0, dtype=torch.float64), torch.empty(shape)
    _ops.step_error(backend)(means, none, none, [none], torch.ones(1, dtype=torch.float64), 1.0, 1.0)
    assert means.isnan().tolist() == [True, True]


@needs_cpp
@pytest.mark.parametrize("shape", [(300, 2), (9, 300), (5, 3, 33, 33)], ids=str)
def test_a_sample_does_not_depend_on_its_batch(shape):
    y, end, k = data(shape, 0), data(shape, 1), [data(shape, 2), data(shape, 3)]
    assert torch.equal(norm(y[3:5], end[3:5], [x[3:5] for x in k], "cpp"), norm(y, end, k, "cpp")[3:5])


@needs_cpp
@pytest.mark.parametrize("shape", [(20_000, 2), (64, 3, 33, 33), (2, 200_000)], ids=str)
def test_the_number_of_threads_changes_nothing(shape):
    y, end, k = data(shape, 0), data(shape, 1), [data(shape, 2), data(shape, 3, torch.bfloat16)]
    results = on_thread_counts(lambda: norm(y, end, k, "cpp"))
    assert all(torch.equal(result, results[0]) for result in results[1:])


@needs_cpp
@pytest.mark.parametrize("which", ["y", "end", "k"])
def test_the_raw_op_refuses_gradients(which):
    y, end, k = (torch.ones(1, 2, requires_grad=name == which) for name in ("y", "end", "k"))
    arguments = (torch.empty(1, dtype=torch.float64), y, end, [torch.ones(1, 2), k], torch.ones(2, dtype=torch.float64), 1.0, 1.0)
    with pytest.raises(RuntimeError, match=f"argument {which}: requires grad"):
        torch.ops.fm_fast.step_error(*arguments)
    with torch.no_grad():
        torch.ops.fm_fast.step_error(*arguments)


@needs_cpp
def test_handles_are_given_back():
    """Neither a call nor a refused call keeps a reference to a tensor."""
    means, coefficients = torch.empty(1, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    y, end, k = torch.ones(1, 2), torch.ones(1, 2), torch.ones(1, 2)
    tensors = (means, y, end, k, coefficients)
    before = [t._use_count() for t in tensors]
    with torch.no_grad():
        for _ in range(10):
            torch.ops.fm_fast.step_error(means, y, end, [k, k], coefficients, 1.0, 1.0)
            with pytest.raises(RuntimeError, match="argument coefficients"):
                torch.ops.fm_fast.step_error(means, y, end, [k], coefficients, 1.0, 1.0)
    assert [t._use_count() for t in tensors] == before


WRONG = {
    "argument k: expected at least one": {"k": []},
    "argument k: expected the shape of y": {"k": [torch.ones(2, 4)]},
    "argument k: expected a floating": {"k": [torch.ones(2, 3, dtype=torch.uint8)]},
    "argument y: expected a floating": {"y": torch.ones(2, 3, dtype=torch.int64)},
    "argument y: expected at least one dimension": {"y": torch.tensor(1.0)},
    "argument end: expected the shape of y": {"end": torch.ones(2, 3, 1)},
    "argument means: expected float64": {"means": torch.empty(2)},
    "argument means: expected a contiguous tensor of 2": {"means": torch.empty(3, dtype=torch.float64)},
    "argument coefficients: expected float64": {"coefficients": torch.ones(1)},
    "argument coefficients: expected a contiguous tensor of 1": {"coefficients": torch.ones(2, dtype=torch.float64)},
    "argument k: strides do not collapse": {
        "y": torch.ones(2, 3, 4, 5),
        "end": torch.ones(2, 3, 4, 5),
        "k": [torch.ones(2, 3, 5, 4).transpose(2, 3)],
    },
}


@needs_cpp
@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments(message):
    arguments = {"means": torch.empty(2, dtype=torch.float64), "y": torch.ones(2, 3), "end": torch.ones(2, 3), "k": [torch.ones(2, 3)]}
    arguments |= {"coefficients": torch.ones(1, dtype=torch.float64), "rtol": 1.0, "atol": 1.0} | WRONG[message]
    with torch.no_grad(), pytest.raises(RuntimeError, match=message):
        torch.ops.fm_fast.step_error(**arguments)
