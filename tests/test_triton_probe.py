"""The Triton kernels of probe, interpreted, against the independent model."""

import numpy as np
import oracle
import pytest
import torch
from probe_cases import random_words, tables
from triton_interpreter import key, poisoned, run_checks

SEED, STEP = 0x123456789ABCDEF, 4
SHAPES = [
    (3,),
    (5, 1),
    (4, 2),
    (3, 128),
    (2, 1025),
    (1, 2, 9),
    (2, 3, 5, 7),
    (2, 3, 16, 16),
    (1, 5, 33, 31),
    (2, 70, 3, 3),
    (2, 3, 2, 3, 5),
]


def test_probe_in_the_interpreter():
    run_checks(__file__)


def launch(out, codes, rows, index=0, first=0, share=1, ids=0):
    """``out`` [K, B, ...], NaN before, filled with probes."""
    from fm_fast.kernels.probe import launch as probe

    out.fill_(float("nan"))
    probe(out, key(SEED, STEP, ids), codes, rows, index, first, share)
    return out


def assert_probes(out, codes, rows, index=0, first=0, share=1, ids=None):
    wanted = oracle.probes(tuple(out.shape[1:]), SEED, STEP, first, out.shape[0], index, share, codes.tolist(), rows.tolist(), ids)
    np.testing.assert_array_equal(out.double().numpy(), wanted)


@pytest.mark.parametrize(
    ("shape", "structured"), [*((shape, True) for shape in SHAPES), *((shape, False) for shape in SHAPES[3:8])], ids=str
)
def check_signs(shape, structured):
    codes, rows = tables(shape, 3, structured)
    numbers = {"index": 300, "first": 1, "share": 2}
    out = launch(torch.empty(2, *shape), codes, rows, **numbers, ids=9)
    assert_probes(out, codes, rows, **numbers, ids=np.arange(shape[0]) + 9)


def probe_layouts(shape, dtype):
    """[2, B, ...] in every kind of memory that an op may be given."""
    x = torch.empty(2, *shape, dtype=dtype)
    return {
        "contiguous": x,
        "channels_last": x.flatten(0, 1).to(memory_format=torch.channels_last).unflatten(0, x.shape[:2]),
        "probe slice": torch.cat([x, x])[::2],
        "batch slice": torch.cat([x, x], 1)[:, ::2],
        "misaligned": torch.empty(x.numel() + 1, dtype=dtype)[1:].view(x.shape),
        "probes innermost": torch.empty(*shape, 2, dtype=dtype).movedim(-1, 0),
    }


@pytest.mark.parametrize("layout", list(probe_layouts((2, 3, 4, 4), torch.float32)))
def check_layouts(layout):
    for shape, structured in (((1, 3, 8, 16), False), ((2, 5, 5, 9), True)):
        codes, rows = tables(shape, 2, structured)
        out = launch(probe_layouts(shape, torch.float32)[layout], codes, rows)
        assert_probes(out, codes, rows)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def check_dtypes(dtype):
    for shape in ((1, 3, 8, 16), (2, 81)):
        out = launch(torch.empty(2, *shape, dtype=dtype), *tables(shape, 2, False))
        assert_probes(out, *tables(shape, 2, False))


def check_listed_ids_name_the_sample():
    shape = (3, 2, 7, 7)
    out = launch(torch.empty(2, *shape), *tables(shape, 2, False), ids=[9, 4, 2**32 + 5])
    assert_probes(out, *tables(shape, 2, False), ids=[9, 4, 5])


def check_the_largest_index():
    out = launch(torch.empty(2, 1, 200), *tables((1, 200), 2, False), index=2**24 - 2)
    assert_probes(out, *tables((1, 200), 2, False), index=2**24 - 2)


def check_any_division_into_calls_gives_the_same_probes():
    shape = (2, 3, 3, 5)
    codes, rows = tables(shape, 6, True)
    whole = launch(torch.empty(6, *shape), codes, rows, share=4)
    parts = [launch(torch.empty(n, *shape), codes, rows, first=first, share=4) for first, n in ((0, 1), (1, 4), (5, 1))]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("structured", [False, True])
def check_several_tiles_a_program_and_launches_beyond_the_limits(structured, monkeypatch):
    from fm_fast.kernels import _launch, _probes

    monkeypatch.setattr(_launch, "tiles_of", lambda elements: 2)
    monkeypatch.setattr(_launch, "WORD_LIMIT", 0)
    monkeypatch.setattr(_launch, "GRID_LIMIT", 2)
    monkeypatch.setattr(_probes, "MOST_ROWS", 4)
    monkeypatch.setattr(_probes, "PARITY_WORDS", 8)
    for shape in ((3, 3, 33, 16), (1, 2048)):
        codes, rows = tables(shape, 2, structured)
        assert_probes(launch(torch.empty(2, *shape), codes, rows), codes, rows)


def check_nothing_to_do():
    for shape in ((0, 3, 4), (2, 0), (2, 3, 0)):
        assert launch(torch.empty(3, *shape), *tables(shape, 3, False)).shape == (3, *shape)


def check_strides_that_do_not_collapse_are_an_error():
    with pytest.raises(ValueError, match="out must have strides that collapse"):
        launch(torch.empty(2, 3, 2, 4, 5).transpose(3, 4), *tables((), 0, False))


WRONG = {
    "codes must have one code an element": {"codes": random_words(5), "rows": random_words(2)},
    "codes must be contiguous int64": {"codes": torch.zeros(4), "rows": random_words(2)},
    "rows must have one row a probe, 2": {"codes": random_words(4), "rows": random_words(1)},
    "rows must be contiguous int64": {"codes": random_words(4), "rows": torch.zeros(2)},
    "index at least 0": {"index": -1},
    "index . probe / share must be below": {"index": 2**24 - 1},
    "first and index at least 0": {"first": -1},
    "share must be at least 1": {"share": 0},
}


@pytest.mark.parametrize("message", WRONG)
def check_wrong_arguments(message):
    out = poisoned(torch.empty(2, 3, 4))
    with pytest.raises(ValueError, match=message):
        launch(out, **({"codes": random_words(0), "rows": random_words(0)} | WRONG[message]))
    assert bool(out.isnan().all())
