"""linear_step against the independent float64 model: every dtype mix and layout, guidance, copies, aliasing, and what it refuses."""

import itertools

import numpy as np
import oracle
import pytest
import torch
from thread_counts import on_thread_counts

from fm_fast import _backends, _ops

pytestmark = pytest.mark.usefixtures("poisoned_outputs")
needs_cpp = pytest.mark.skipif(_backends.why_not("linear_step", "cpu", "cpp") is not None, reason="the C++ library is not built")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Largest relative error of rounding once, and half the distance of the smallest numbers.
ROUNDING = {torch.float64: (2**-53, 0.0), torch.float32: (2**-24, 0.0), torch.bfloat16: (2**-8, 0.0), torch.float16: (2**-11, 2**-25)}
SHAPES = [
    (3,),
    (1, 1),
    (5, 3),
    (4, 127),
    (3, 128),
    (2, 129),
    (1, 1025),
    (2, 3072),
    (40, 2),
    (2, 3, 5, 7),
    (2, 3, 9),
    (1, 5, 33, 31),
    (2, 70, 3, 3),
    (2, 3, 2, 3, 5),
]
COEFFICIENTS = [0.75, -0.5, 0.3, 1.25, -2.0, 0.01, 3.0, 0.5, -1.5, 0.125]


def data(shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def table_of(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def none():
    return torch.empty(0)


def step(x, k, coefficients, backend, guidance=1.0, out=None, copy=None, kept=None):
    out = torch.empty_like(x) if out is None else out
    with torch.no_grad():
        _ops.linear_step(backend)(out, none() if copy is None else copy, x, k, table_of(coefficients), 0, guidance, kept)
    return out


def check(out, x, k, coefficients, guidance=1.0, compute=torch.float32):
    """Each of the len(k) + 1 products and sums, the two operations of guidance and each coefficient round once."""
    expected, size = oracle.linear_step(x.double().numpy(), [o.double().numpy() for o in k], coefficients, guidance)
    relative, absolute = ROUNDING[out.dtype]
    errors = 2 * len(k) + 6
    bound = errors * ROUNDING[compute][0] * size + 1.01 * relative * np.abs(expected) + absolute
    # Where out is the compute type its own rounding is among those counted.
    assert (np.abs(out.double().numpy() - expected) <= bound).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sizes_and_numbers_of_terms(shape, dtype, backend):
    for terms in range(1, 10):
        x, *k = (data(shape, seed, dtype) for seed in range(1 + terms))
        coefficients = COEFFICIENTS[: 1 + terms]
        check(step(x, k, coefficients, backend), x, k, coefficients, compute=dtype)


@pytest.mark.parametrize("shape", [(3,), (5, 3), (2, 3, 5, 7), (2, 1025), (1, 2)], ids=str)
def test_guidance_mixes_the_halves_of_a_doubled_batch(shape, backend):
    for terms in range(1, 10):
        x, k = data(shape, 0), [data((2 * shape[0], *shape[1:]), 1 + j) for j in range(terms)]
        coefficients = COEFFICIENTS[: 1 + terms]
        check(step(x, k, coefficients, backend, 2.5), x, k, coefficients, 2.5)
        mixed = [o if j % 3 == 1 else o[: shape[0]].contiguous() for j, o in enumerate(k)]
        check(step(x, mixed, coefficients, backend, 2.5), x, mixed, coefficients, 2.5)


@pytest.mark.parametrize(("guidance", "half"), [(0.0, 1), (1.0, 0)])
def test_guidance_of_zero_and_one_choose_a_half(guidance, half, backend):
    x, k = torch.zeros(4, 33), data((8, 33), 1)
    chosen = k.chunk(2)[half]
    torch.testing.assert_close(step(x, [k], [1.0, 1.0], backend, guidance), chosen, rtol=0, atol=4 * 2**-24 * float(k.abs().max()))


@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
def test_every_mix_of_dtypes_rounds_once(x_dtype, out_dtype, backend):
    shape = (3, 2, 5, 4)
    compute = torch.float64 if torch.float64 in (x_dtype, out_dtype) else torch.float32
    x = data(shape, 0, x_dtype)
    for k_dtype, copy_dtype in itertools.product(DTYPES, DTYPES):
        k = [data(shape, 1, k_dtype), data((6, *shape[1:]), 2, k_dtype), data(shape, 3, torch.float32)]
        out, copy = torch.empty(shape, dtype=out_dtype), torch.empty(shape, dtype=copy_dtype)
        step(x, k, COEFFICIENTS[:4], backend, 1.5, out, copy)
        check(out, x, k, COEFFICIENTS[:4], 1.5, compute)
        check(copy, x, k, COEFFICIENTS[:4], 1.5, compute)


def test_a_copy_is_the_result_rounded_from_the_compute_type(backend):
    """1 + 2^-8 + 2^-17 rounds up in bfloat16; by way of float16, which has it as the tie 1 + 2^-8, it would round to 1."""
    x, k = torch.full((2, 40), 1.0 + 2**-8), torch.full((2, 40), 2.0**-17)
    out, copy = torch.empty(2, 40, dtype=torch.float16), torch.empty(2, 40, dtype=torch.bfloat16)
    step(x, [k], [1.0, 1.0], backend, out=out, copy=copy)
    assert bool((out == 1.0 + 2**-8).all())
    assert bool((copy == 1.0 + 2**-7).all())


def layouts(x):
    """Tensors of the same numbers in memory of every kind that has a batch, a channel and a point stride."""
    yield x.contiguous()
    yield torch.stack([x, x, x], 1)[:, 1]
    yield torch.stack([x, x], 0)[1]
    yield torch.cat([torch.zeros(1, dtype=x.dtype), x.flatten()])[1:].view(x.shape)
    yield x.movedim(0, -1).contiguous().movedim(-1, 0)
    if x.dim() == 4:
        yield x.contiguous(memory_format=torch.channels_last)
        yield torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last)[:, : x.shape[1]]


def like(layout, x):
    """A tensor of the same strides in memory full of NaN."""
    elements = layout.untyped_storage().nbytes() // layout.element_size()
    return torch.full((elements,), torch.nan, dtype=layout.dtype).as_strided(x.shape, layout.stride(), layout.storage_offset())


def written(tensor):
    """How many numbers of its memory are not NaN, also outside of the tensor."""
    elements = tensor.untyped_storage().nbytes() // tensor.element_size()
    return int((~tensor.as_strided((elements,), (1,), 0).isnan()).sum())


@pytest.mark.parametrize("shape", [(3, 4, 5, 3), (20, 3), (2, 3, 700), (2, 20, 9, 9), (1, 3, 2, 2), (7,), (9, 1), (2, 5, 1)], ids=str)
def test_any_mix_of_layouts_gives_the_same_numbers(shape, backend):
    x, k = data(shape, 0), data(shape, 1)
    expected = step(x, [k], [0.5, 0.25], backend)
    for x_layout, k_layout, out_layout in itertools.product(layouts(x), layouts(k), layouts(x)):
        out = like(out_layout, x)
        step(x_layout, [k_layout], [0.5, 0.25], backend, out=out)
        assert torch.equal(out, expected), (x_layout.stride(), k_layout.stride(), out.stride())
        assert written(out) == out.numel()


@pytest.mark.parametrize("shape", [(3, 4, 5, 3), (20, 3), (1, 3, 2, 2), (7,), (9, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts_of_halves_and_copies(shape, dtype, backend):
    x, k = data(shape, 0), data((2 * shape[0], *shape[1:]), 1, dtype)
    expected = step(x, [k], [0.5, 0.25], backend, 3.0)
    for x_layout, k_layout, copy_layout in itertools.product(layouts(x), layouts(k), layouts(k)):
        out, copy = torch.empty_like(x), like(copy_layout, k)
        step(x_layout, [k_layout], [0.5, 0.25], backend, 3.0, out, copy)
        assert torch.equal(out, expected)
        assert torch.equal(copy, torch.cat([expected, expected]).to(dtype))
        assert written(copy) == copy.numel()
        single = like(next(iter(layouts(x))), x).to(dtype)
        step(x_layout, [k_layout], [0.5, 0.25], backend, 3.0, out, single)
        assert torch.equal(single, expected.to(dtype))


@pytest.mark.parametrize("terms", [1, 2, 4, 5, 9])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (3, 2000), (40, 2)], ids=str)
def test_in_place_also_where_terms_are_the_state_itself(shape, dtype, terms, backend):
    x = data(shape, 0, dtype)
    k = [data(shape, 1 + j, dtype) for j in range(terms)]
    coefficients = COEFFICIENTS[: 1 + terms]
    k[-1] = x  # read by the last pass
    expected = step(x, [o.clone() for o in k], coefficients, backend)
    for state in [x.clone(), x.clone().to(memory_format=torch.channels_last) if x.dim() == 4 else torch.stack([x, x], 1)[:, 0]]:
        inputs = [*k[:-1], state]
        step(state, inputs, coefficients, backend, out=state)
        assert torch.equal(state, expected)


@pytest.mark.parametrize("terms", range(1, 10))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3,), (2, 3, 5, 7), (3, 2000), (40, 2)], ids=str)
def test_the_last_term_is_kept_as_it_came(shape, dtype, terms, backend):
    """Beside the same result, also where terms before it are guided, and in memory of any dtype and layout."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, k, coefficients = data(shape, 0, wide), [data(shape, 1 + j, dtype) for j in range(terms)], COEFFICIENTS[: 1 + terms]
    if terms % 3 == 0:
        k[0] = data((2 * shape[0], *shape[1:]), 1, dtype)
    expected = step(x, k, coefficients, backend, 2.5)
    for layout, kept_dtype in [*((layout, dtype) for layout in layouts(k[-1])), (k[-1], torch.float64), (k[-1], torch.bfloat16)]:
        kept = like(layout.to(kept_dtype) if kept_dtype != dtype else layout, k[-1])
        assert torch.equal(step(x, k, coefficients, backend, 2.5, kept=kept), expected)
        assert torch.equal(kept, k[-1].to(kept_dtype)) and written(kept) == kept.numel()


@pytest.mark.parametrize("terms", [1, 4, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_last_term_is_kept_also_where_the_result_takes_its_place(dtype, terms, backend):
    shape = (2, 3, 5, 70)
    x, k = data(shape, 0), [data(shape, 1 + j) for j in range(terms)]
    last, kept = k[-1].clone(), torch.empty(shape, dtype=dtype)
    expected = step(x, k, COEFFICIENTS[: 1 + terms], backend)
    step(x, k, COEFFICIENTS[: 1 + terms], backend, out=k[-1], kept=kept)
    assert torch.equal(k[-1], expected) and torch.equal(kept, last.to(dtype))


def test_no_coefficient_is_special(backend):
    x, k = torch.ones(2, 3), torch.ones(2, 3)
    k[0, 1], x[1, 2] = torch.nan, torch.inf
    out = step(x, [k], [0.0, 0.0], backend)
    assert torch.equal(out.isnan(), k.isnan() | x.isinf())
    assert torch.equal(step(x, [k], [1.0, 0.0], backend).isnan(), k.isnan())


def test_infinite_terms_stay_infinite_beside_guided_ones(backend):
    x, plain, pair = torch.zeros(2, 40), torch.full((2, 40), torch.inf), torch.ones(4, 40)
    assert bool((step(x, [pair, plain], [1.0, 1.0, 1.0], backend, 2.0) == torch.inf).all())


def test_the_row_of_the_table_is_chosen(backend):
    x, k = data((2, 5), 0), data((2, 5), 1)
    table = table_of([1.0, 0.5], [0.25, -1.0], [2.0, 3.0])
    for row in range(3):
        out = torch.empty_like(x)
        with torch.no_grad():
            _ops.linear_step(backend)(out, none(), x, [k], table, row, 1.0)
        check(out, x, [k], table[row].tolist())


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0), (2, 3, 0), (0, 3, 4, 4)], ids=str)
def test_empty_batches(shape, backend):
    x = torch.empty(shape)
    assert step(x, [torch.empty(shape)], [1.0, 1.0], backend).shape == shape
    assert step(x, [torch.empty(2 * shape[0], *shape[1:])], [1.0, 1.0], backend, 2.0).shape == shape


def test_expanded_inputs(backend):
    x, k = torch.ones(1, 1).expand(3, 70), torch.arange(3.0)[:, None].expand(3, 70)
    assert torch.equal(step(x, [k], [1.0, 2.0], backend, out=torch.empty(3, 70)), x + 2 * k)


@needs_cpp
@pytest.mark.parametrize("shape", [(3, 70_000), (64, 3, 33, 33)], ids=str)
def test_the_number_of_threads_changes_nothing(shape):
    x, k = data(shape, 0), [data((2 * shape[0], *shape[1:]), 1, torch.bfloat16), list(layouts(data(shape, 2)))[-1]]

    def stepped():
        copy, kept = torch.empty(shape, dtype=torch.bfloat16), torch.empty(shape)
        return step(x, k, [1.0, 0.5, -0.25], "cpp", 2.0, copy=copy, kept=kept), copy, kept

    results = on_thread_counts(stepped)
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0], strict=True))


@needs_cpp
def test_handles_are_given_back():
    """Neither a call nor a refused call keeps a reference to a tensor."""
    x, k, out, kept, table = torch.ones(1, 2), torch.ones(1, 2), torch.empty(1, 2), torch.empty(1, 2), table_of([1.0, 1.0, 1.0])
    tensors = (x, k, out, kept, table)
    before = [t._use_count() for t in tensors]
    with torch.no_grad():
        for _ in range(10):
            torch.ops.fm_fast.linear_step(out, none(), x, [k, k], table, 0, 1.0, kept)
            with pytest.raises(RuntimeError, match="argument row"):
                torch.ops.fm_fast.linear_step(out, none(), x, [k, k], table, 1, 1.0, kept)
    assert [t._use_count() for t in tensors] == before


@needs_cpp
@pytest.mark.slow
def test_lists_are_given_back():
    """A list that is kept costs 32 bytes or more: 100,000 calls would show as megabytes."""

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    x, table = torch.ones(1, 2), table_of([1.0, *[0.0] * 9])
    with torch.no_grad():
        for calls in (1000, 100_000):
            before = resident()
            for _ in range(calls):
                torch.ops.fm_fast.linear_step(x, none(), x, [x] * 9, table, 0, 1.0)
    assert resident() - before < 2**20


@needs_cpp
@pytest.mark.parametrize("which", ["x", "k"])
def test_the_raw_op_refuses_gradients(which):
    x, k = torch.ones(1, 2, requires_grad=which == "x"), torch.ones(1, 2, requires_grad=which == "k")
    arguments = (torch.empty(1, 2), none(), x, [torch.ones(1, 2), k], table_of([1.0, 1.0, 1.0]), 0, 1.0)
    with pytest.raises(RuntimeError, match=f"argument {which}: requires grad"):
        torch.ops.fm_fast.linear_step(*arguments)
    with torch.no_grad():
        torch.ops.fm_fast.linear_step(*arguments)


WRONG = {
    "argument k: expected at least one": {"k": [], "table": table_of([1.0])},
    "argument table": {"table": table_of([1.0])},
    "argument table: expected float64": {"table": table_of([1.0, 1.0]).float()},
    "argument table: expected a contiguous": {"table": table_of([1.0, 1.0], [1.0, 1.0]).T.contiguous().T},
    "argument row: expected 0 to 0, got 1": {"row": 1},
    "argument row: expected 0 to 0, got -1": {"row": -1},
    "argument out": {"out": torch.empty(2, 4)},
    "argument out: expected a floating": {"out": torch.empty(2, 3, dtype=torch.int64)},
    "argument copy": {"copy": torch.empty(3, 3)},
    "argument k": {"k": [torch.ones(6, 3)]},
    "argument kept": {"kept": torch.empty(2, 4)},
    "argument kept: expected a floating": {"kept": torch.empty(2, 3, dtype=torch.int64)},
    "argument k: expected the shape of x": {"kept": torch.empty(2, 3), "k": [torch.ones(4, 3)]},
    "argument k: expected a floating": {"k": [torch.ones(2, 3, dtype=torch.uint8)]},
    "argument k: expected the shape": {"k": [torch.ones(2, 3, 1)]},
    "argument x: expected a floating": {"x": torch.ones(2, 3, dtype=torch.int64)},
    "argument x: expected at least one dimension": {"x": torch.tensor(1.0)},
    "argument k: strides do not collapse": {
        "x": torch.ones(2, 3, 4, 5),
        "out": torch.empty(2, 3, 4, 5),
        "k": [torch.ones(2, 3, 5, 4).transpose(2, 3)],
    },
}


@needs_cpp
@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments(message):
    arguments = {"out": torch.empty(2, 3), "copy": none(), "x": torch.ones(2, 3), "k": [torch.ones(2, 3)], "table": table_of([1.0, 1.0])}
    arguments |= {"row": 0, "guidance": 1.0} | WRONG[message]
    with torch.no_grad(), pytest.raises(RuntimeError, match=message):
        torch.ops.fm_fast.linear_step(**arguments)
