"""probe against the independent model: random and structured signs in every layout and dtype, and what it refuses."""

import numpy as np
import oracle
import pytest
import torch
from probe_cases import DTYPES, SHAPES, tables
from thread_counts import on_thread_counts

from fm_fast import _backends, _ops
from fm_fast.random import make_key

pytestmark = pytest.mark.usefixtures("poisoned_outputs")
needs_cpp = pytest.mark.skipif(_backends.why_not("probe", "cpu", "cpp") is not None, reason="the C++ library is not built")
SEED, STEP = 77, 5


def probe_set(batch, total, codes=(), rows=(), index=0, share=1, ids=None, normal=False):
    key = make_key(SEED, STEP, ids, batch, torch.device("cpu"))
    words = (torch.as_tensor(values, dtype=torch.int64) for values in (codes, rows))
    return _ops.ProbeSet(key, *words, index, total, share, normal)


def draw(shape, count, backend, first=0, dtype=torch.float32, layout=torch.contiguous_format, **probes):
    like = torch.empty(shape, dtype=dtype).to(memory_format=layout)
    chosen = probe_set(shape[0], first + count, **probes)
    with torch.no_grad():
        return _ops.probe(like, chosen, first, count, backend)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("share", [1, 2, 5])
def test_random_signs(shape, share, backend):
    got = draw(shape, 5, backend, first=2, index=3, share=share, ids=1000)
    expected = oracle.probes(shape, SEED, STEP, 2, 5, 3, share, ids=np.arange(shape[0]) + 1000)
    assert got.shape == (5, *shape)
    assert np.array_equal(got.numpy(), expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("share", [1, 4])
def test_structured_signs(shape, share, backend):
    codes, rows = tables(shape, 8, structured=True)
    got = draw(shape, 6, backend, first=2, share=share, codes=codes, rows=rows)
    expected = oracle.probes(shape, SEED, STEP, 2, 6, 0, share, codes.tolist(), rows.tolist())
    assert np.array_equal(got.numpy(), expected)


def test_probes_that_share_their_signs_are_rows_of_a_hadamard_matrix(backend):
    """Rows 0..15 against codes 0..15 are orthogonal, whatever signs they share."""
    z = draw((3, 16), 16, backend, share=16, codes=range(16), rows=range(16))
    gram = torch.einsum("kbi,lbi->bkl", z, z)
    assert torch.equal(gram, 16 * torch.eye(16).expand(3, 16, 16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(4, 3, 6, 7), (70, 2), (2, 1025), (2, 20, 9, 15)], ids=str)
def test_dtypes_and_layouts_hold_the_same_signs(shape, dtype, backend):
    expected = draw(shape, 3, backend).to(dtype)
    formats = [torch.contiguous_format, torch.channels_last] if len(shape) == 4 else [torch.contiguous_format]
    for layout in formats:
        got = draw(shape, 3, backend, dtype=dtype, layout=layout)
        assert got.dtype == dtype
        assert backend == "reference" or got[0].is_contiguous(memory_format=layout)
        assert torch.equal(got, expected)


@needs_cpp
@pytest.mark.parametrize("shape", [(4, 3, 6, 7), (70, 2), (2, 1025)], ids=str)
@pytest.mark.parametrize("structured", [False, True])
def test_probes_may_lie_anywhere(shape, structured):
    """Probes beside each other in every element, probes far apart, and every second sample of a batch."""
    codes, rows = tables(shape, 3, structured)
    expected = draw(shape, 3, "cpp", codes=codes, rows=rows)
    chosen = probe_set(shape[0], 3, codes, rows)
    for out in [
        torch.empty(*shape, 3).movedim(-1, 0),
        torch.full((7, *shape), torch.nan)[1::2],
        torch.full((3, shape[0], 2, *shape[1:]), torch.nan)[:, :, 1],
    ]:
        torch.ops.fm_fast.probe(out, chosen.key, chosen.codes, chosen.rows, 0, 0, 1)
        assert torch.equal(out, expected)


def test_any_division_into_calls_gives_the_same_probes(backend):
    codes, rows = tables((2, 3, 3, 5), 12, structured=True)
    whole = draw((2, 3, 3, 5), 12, backend, codes=codes, rows=rows, share=4)
    parts = [draw((2, 3, 3, 5), count, backend, first, codes=codes, rows=rows, share=4) for first, count in ((0, 1), (1, 4), (5, 7))]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("shape", [(64, 3, 9, 9), (40, 5)], ids=str)
def test_samples_depend_on_their_ids_alone(shape, backend):
    whole = draw(shape, 3, backend)
    ids = torch.randperm(shape[0])
    assert torch.equal(draw(shape, 3, backend, ids=ids), whole[:, ids])
    half = (shape[0] // 2, *shape[1:])
    assert torch.equal(draw(half, 3, backend, ids=shape[0] // 2), whole[:, shape[0] // 2 :])


@pytest.mark.parametrize("index", [0, 2**24 - 2])
def test_different_probes_are_independent(index, backend):
    z = draw((4, 65536), 2, backend, index=index).double()
    assert abs(float((z[0] * z[1]).mean())) < 5 / 512
    assert set(z.unique().tolist()) == {-1.0, 1.0}


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (2, 3, 0), (0, 3, 4, 4)], ids=str)
def test_empty_batches(shape, backend):
    assert draw(shape, 3, backend).shape == (3, *shape)


@needs_cpp
@pytest.mark.parametrize("structured", [False, True])
def test_the_number_of_threads_changes_nothing(structured):
    codes, rows = tables((16, 3, 33, 65), 4, structured)
    first, *others = on_thread_counts(lambda: draw((16, 3, 33, 65), 4, "cpp", codes=codes, rows=rows))
    assert all(torch.equal(first, other) for other in others)


WRONG = {
    "argument out: expected at least one": {"out": torch.tensor(0.0)},
    "argument out: expected a floating": {"out": torch.empty(2, 3, 4, dtype=torch.int64)},
    "argument out: strides do not collapse": {"out": torch.empty(2, 3, 2, 4, 5).transpose(3, 4)},
    "argument key": {"key": torch.zeros(4, dtype=torch.int64)},
    "argument codes: expected one code": {"codes": torch.zeros(5, dtype=torch.int64), "rows": torch.zeros(2, dtype=torch.int64)},
    "argument codes: expected a contiguous int64": {"codes": torch.zeros(4), "rows": torch.zeros(2, dtype=torch.int64)},
    "argument rows: expected one row": {"codes": torch.zeros(4, dtype=torch.int64), "rows": torch.zeros(1, dtype=torch.int64)},
    "argument rows: expected a contiguous int64": {"codes": torch.zeros(4, dtype=torch.int64), "rows": torch.zeros(2)},
    "argument index:": {"index": -1},
    "argument index . probes / share": {"index": 2**24 - 1},
    "argument first": {"first": -1},
    "argument share": {"share": 0},
}


@needs_cpp
@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments(message):
    arguments = {"out": torch.empty(2, 3, 4), "key": torch.zeros(3, dtype=torch.int64), "codes": torch.empty(0, dtype=torch.int64)}
    arguments |= {"rows": torch.empty(0, dtype=torch.int64), "index": 0, "first": 0, "share": 1} | WRONG[message]
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fm_fast.probe(**arguments)
