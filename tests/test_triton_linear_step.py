"""The Triton kernel of linear_step, interpreted, against the independent float64 model."""

import numpy as np
import oracle
import pytest
import torch
from triton_interpreter import array, data, layouts, poisoned, run_checks, wide_dtype

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Largest relative error of rounding once, and half the distance of the smallest numbers.
ROUNDING = {torch.float64: (2**-53, 0.0), torch.float32: (2**-24, 0.0), torch.bfloat16: (2**-8, 0.0), torch.float16: (2**-11, 2**-25)}
COEFFICIENTS = [0.75, -0.5, 0.3, 1.25, -2.0, 0.01, 3.0, 0.5, -1.5, 0.125]
GUIDANCE = 2.5


def test_linear_step_in_the_interpreter():
    run_checks(__file__)


def pair(shape, dtype=torch.float32, seed=1):
    """The output of a doubled batch."""
    return data((2 * shape[0], *shape[1:]), dtype, seed=seed)


def launch(x, k, coefficients=COEFFICIENTS, out=None, copy=None, guidance=GUIDANCE, kept=None):
    """The result, in an output that was NaN before; the rows beside that of the coefficients are NaN."""
    from fm_fast.kernels.linear_step import launch as linear_step

    out = poisoned(x) if out is None else out
    table = torch.full((3, 1 + len(k)), float("nan"), dtype=torch.float64)
    table[1] = torch.tensor(coefficients[: 1 + len(k)], dtype=torch.float64)
    linear_step(out, torch.empty(0) if copy is None else copy, x, k, table, 1, guidance, kept)
    return out


def expected(x, k, coefficients=COEFFICIENTS, guidance=GUIDANCE):
    return oracle.linear_step(array(x), [array(term) for term in k], coefficients[: 1 + len(k)], guidance)


def assert_step(out, model, terms, compute=torch.float32):
    """Each of the products and sums, the two operations of guidance and each coefficient round once, and the result to its dtype."""
    values, size = model
    relative, absolute = ROUNDING[out.dtype]
    bound = (2 * terms + 6) * ROUNDING[compute][0] * size + 1.01 * relative * np.abs(values) + absolute
    assert (np.abs(array(out) - values) <= bound).all()


SHAPES = [(3,), (5, 1), (4, 2), (2, 2051), (1, 2, 9), (2, 3, 2, 3, 5), (2, 1, 28, 28), (1, 3, 33, 33), (2, 3, 16, 16)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def check_odd_sizes(shape):
    x, k = data(shape), [data(shape, seed=2), pair(shape, seed=3)]
    assert_step(launch(x, k), expected(x, k), 2)


@pytest.mark.parametrize("terms", range(1, 10))
def check_numbers_of_terms(terms):
    shape = (2, 3, 4, 4)
    x = data(shape)
    k = [pair(shape, seed=2 + j) if j % 3 == 1 else data(shape, seed=2 + j) for j in range(terms)]
    assert_step(launch(x, k), expected(x, k), terms)


@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
def check_dtypes(x_dtype, out_dtype):
    shape = (2, 3, 4, 4)
    x = data(shape, x_dtype)
    compute = wide_dtype(x, torch.empty(0, dtype=out_dtype))
    for k_dtype, copy_dtype in zip(DTYPES, [torch.bfloat16, torch.float16, torch.float32, torch.float64], strict=True):
        k = [data(shape, k_dtype, seed=2), pair(shape, torch.float32, seed=3)]
        copy = poisoned(pair(shape), dtype=copy_dtype)
        out = launch(x, k, out=poisoned(x, dtype=out_dtype), copy=copy)
        assert_step(out, expected(x, k), 2, compute)
        for half in copy.chunk(2):
            assert_step(half, expected(x, k), 2, compute)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def check_two_blocks_a_row_of_16_bit_tensors(dtype):
    for size in (2048, 2050):
        x, k = data((1, size), dtype), [pair((1, size), dtype, seed=2)]
        copy = poisoned(x)
        out = launch(x, k, copy=copy)
        assert_step(out, expected(x, k), 1)
        assert torch.equal(copy, out)


@pytest.mark.parametrize("layout", list(layouts((2, 3, 4, 4))))
def check_layouts(layout):
    for shape, other in (((2, 3, 4, 8), "contiguous"), ((2, 3, 5, 7), "channels_last"), ((2, 3, 5, 7), "channel slice")):
        x, k = layouts(shape)[layout], [data(shape, seed=2), layouts((2 * shape[0], *shape[1:]))[layout]]
        guided = layouts((2 * shape[0], *shape[1:]))[other]
        out, copy = poisoned(layouts(shape)[other]), poisoned(guided, torch.float32)
        launch(x, [*k, guided], out=out, copy=copy)
        assert_step(out, expected(x, [*k, guided]), 3)
        assert torch.equal(copy, torch.cat([out, out]))


@pytest.mark.parametrize("channels_last", [False, True])
def check_tensors_that_lie_alike_are_one_row(channels_last, launch_plan):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    shape = (2, 3, 5, 7)
    tensors = {"out": data(shape), "copy": pair(shape), "x": data(shape), "k": pair(shape)}
    alike = {name: x.to(memory_format=layout) for name, x in tensors.items()}
    plan = launch_plan.elementwise_plan(2, shape[1:], alike)
    assert (plan.flat, plan.batch, plan.positions, set(plan.strides)) == (True, 1, 210, {(210, 210, 1)})
    out, copy = poisoned(alike["x"]), poisoned(alike["k"])
    launch(alike["x"], [alike["k"]], out=out, copy=copy)
    assert_step(out, expected(tensors["x"], [tensors["k"]]), 1)
    assert torch.equal(copy, torch.cat([out, out]))
    mixed = {**alike, "k": tensors["k"].to(memory_format=torch.contiguous_format if channels_last else torch.channels_last)}
    assert not launch_plan.elementwise_plan(2, shape[1:], mixed).flat


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (3, 700)], ids=str)
def check_in_place_also_where_a_term_is_the_state(dtype, shape):
    x, k = data(shape, dtype), [data(shape, dtype, seed=2)]
    wanted = launch(x, [*k, x.clone()])
    for state in (x.clone(), torch.stack([x, x], 1)[:, 0]):
        launch(state, [*k, state], out=state)
        assert torch.equal(state, wanted)


def check_the_halves_of_one_buffer():
    """What the sampler does without another dtype for the network: the state is the first half of its input, the copy the second."""
    shape = (3, 2, 4, 4)
    x, k = data(shape), [pair(shape, seed=2)]
    buffer = torch.cat([x, torch.full_like(x, float("nan"))])
    launch(buffer[:3], k, out=buffer[:3], copy=buffer[3:])
    assert_step(buffer[:3], expected(x, k), 1)
    assert torch.equal(buffer[:3], buffer[3:])


def check_offsets_beyond_32_bits_and_batches_beyond_the_grid(launch_plan, monkeypatch):
    monkeypatch.setattr(launch_plan, "WORD_LIMIT", 0)
    monkeypatch.setattr(launch_plan, "GRID_LIMIT", 2)
    monkeypatch.setattr(launch_plan, "TILE", 128)
    for shape in ((5, 3, 4, 4), (3, 3, 5, 7)):
        x, k = data(shape), [data(shape, seed=2).to(memory_format=torch.channels_last), pair(shape, seed=3)]
        assert_step(launch(x, k), expected(x, k), 2)
        assert_step(launch(x, k[1:]), expected(x, k[1:]), 1)


def check_no_coefficient_is_special():
    x, k = torch.ones(2, 3), torch.ones(2, 3)
    k[0, 1], x[1, 2] = torch.nan, torch.inf
    out = launch(x, [k], [0.0, 0.0])
    assert torch.equal(out.isnan(), k.isnan() | x.isinf())


def check_a_copy_is_rounded_from_the_compute_type():
    """1 + 2^-8 + 2^-17 rounds up in bfloat16; by way of float16, which has it as the tie 1 + 2^-8, it would round to 1."""
    x, k = torch.full((2, 40), 1.0 + 2**-8), torch.full((2, 40), 2.0**-17)
    out, copy = torch.empty(2, 40, dtype=torch.float16), torch.empty(2, 40, dtype=torch.bfloat16)
    launch(x, [k], [1.0, 1.0], out, copy)
    assert bool((out == 1.0 + 2**-8).all()) and bool((copy == 1.0 + 2**-7).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("terms", [1, 4])
def check_the_last_term_is_kept(terms, dtype):
    """In its own dtype and in others, in any layout, beside the same result, also where the result takes its place."""
    shape = (2, 3, 5, 7)
    x, k = data(shape), [data(shape, dtype, seed=2 + j) for j in range(terms)]
    if terms > 1:
        k[0] = pair(shape, dtype)
    wanted = launch(x, k)
    for kept_dtype, format in [(dtype, torch.contiguous_format), (dtype, torch.channels_last), (torch.float32, torch.contiguous_format)]:
        kept = torch.full(shape, float("nan"), dtype=kept_dtype).to(memory_format=format)
        assert torch.equal(launch(x, k, kept=kept), wanted) and torch.equal(kept, k[-1].to(kept_dtype))
    last, kept = k[-1].float(), torch.empty(shape)
    taken = last.clone()
    assert torch.equal(launch(x, [*k[:-1], taken], out=taken, kept=kept), launch(x, [*k[:-1], last])) and torch.equal(kept, last)


def check_nothing_to_do():
    for shape in ((0, 3, 4, 4), (2, 0), (0,)):
        assert launch(torch.empty(shape), [torch.empty(shape)]).shape == shape


WRONG = {
    "k must hold": {"k": []},
    "out must be": {"out": torch.empty(2, 4)},
    r"k\[1\] must be": {"k": [torch.ones(2, 3), torch.ones(6, 3)]},
    "copy must be": {"copy": torch.empty(3, 3)},
    "kept and the last k must be": {"kept": torch.empty(2, 4)},
    r"kept .* got \(2, 3\) and \(4, 3\)": {"kept": torch.empty(2, 3), "k": [torch.ones(4, 3)]},
    r"table must be contiguous float64 \[rows, 2\]": {"table": torch.ones(1, 3, dtype=torch.float64)},
    "table must be .* got torch.float32": {"table": torch.ones(1, 2)},
    "row must be 0 to 0, got 1": {"row": 1},
    "row must be 0 to 0, got -1": {"row": -1},
}


@pytest.mark.parametrize("message", WRONG)
def check_wrong_arguments(message):
    from fm_fast.kernels.linear_step import launch as linear_step

    arguments = {"out": torch.empty(2, 3), "copy": torch.empty(0), "x": torch.ones(2, 3), "k": [torch.ones(2, 3)]}
    arguments |= {"table": torch.ones(1, 2, dtype=torch.float64), "row": 0, "guidance": 1.0} | WRONG[message]
    with pytest.raises(ValueError, match=message):
        linear_step(**arguments)
