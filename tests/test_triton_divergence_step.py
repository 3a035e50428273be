"""The Triton kernels of divergence_step, interpreted, against the independent float64 model."""

import numpy as np
import oracle
import pytest
import torch
from probe_cases import DTYPES, random_words, tables
from triton_interpreter import array, data, key, run_checks

SEED, STEP = 0x123456789ABCDEF, 4
KINDS = ["rademacher", "hadamard", "gaussian"]
SHAPES = [(3,), (4, 2), (1, 128), (1, 1025), (2, 3, 5, 7), (1, 3, 16, 16), (1, 40, 3, 3), (1, 3, 2, 3, 5)]


def test_divergence_step_in_the_interpreter():
    run_checks(__file__)


def launch(g, kind="rademacher", share=1, index=0, ids=0, parts=None, bias=0.0, factor=1.0, sums=None):
    """(sums, dots) of one evaluation on all probes of g, cut into calls of ``parts``; dots were NaN before."""
    from fm_fast.kernels.divergence_step import launch as divergence_step

    total, batch = g.shape[:2]
    codes, rows = tables(g.shape[1:], total, kind == "hadamard")
    dots = torch.full((total, batch), float("nan"), dtype=torch.float64)
    sums = torch.zeros(2, batch, dtype=torch.float64) if sums is None else sums
    first = 0
    for count in parts or [total]:
        part, numbers = g[first : first + count], (int(kind == "gaussian"), index, first, share, total // share)
        divergence_step(sums, dots, part, key(SEED, STEP, ids), codes, rows, *numbers, bias, factor)
        first += count
    return sums, dots


def probes(kind, g, share=1, index=0, ids=None):
    """z in float64, as the model of g's dtype was given it."""
    total, shape = g.shape[0], tuple(g.shape[1:])
    if kind != "gaussian":
        codes, rows = tables(shape, total, kind == "hadamard")
        return oracle.probes(shape, SEED, STEP, 0, total, index, share, codes.tolist(), rows.tolist(), ids)
    z = np.stack([oracle.normal(shape, SEED, STEP, "probe", ids, index + q // share) for q in range(total)])
    return z if g.dtype == torch.float64 else array(torch.from_numpy(z).float().to(g.dtype))


def assert_dots(dots, g, kind, **numbers):
    """Sums of up to 1024 float32 numbers in a tree: 14 roundings of any term at most, and some of float64. The normals differ by 4e-6, and
    by a rounding of the model's dtype where they fall on different sides of a boundary."""
    z, values = probes(kind, g, **numbers), array(g)
    wanted, size = (z * values).reshape(*dots.shape, -1).sum(2), np.abs(z * values).reshape(*dots.shape, -1).sum(2)
    bound = (2.0**-50 if g.dtype == torch.float64 else 16 * 2.0**-24) * size
    if kind == "gaussian":
        boundary = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}.get(g.dtype, 0.0)
        magnitudes = np.abs(values).reshape(*dots.shape, -1)
        bound = bound + 5e-6 * magnitudes.sum(2) + 4 * boundary * magnitudes.max(2, initial=0.0)
    assert (np.abs(array(dots) - wanted) <= bound).all()


@pytest.mark.parametrize("kind", ["hadamard", "gaussian"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def check_products_of_every_size(shape, kind):
    g = data((2, *shape))
    sums, dots = launch(g, kind, index=7, ids=50, bias=0.5, factor=-2.0)
    assert_dots(dots, g, kind, index=7, ids=np.arange(shape[0]) + 50)
    np.testing.assert_allclose(array(sums), oracle.divergence_sums(array(dots), 2, 0.5, -2.0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def check_dtypes(kind, dtype):
    for shape in ((1, 3, 7, 5), (1, 2, 8, 16)):
        g = data((2, *shape), dtype)
        assert_dots(launch(g, kind)[1], g, kind)


def check_normals_are_rounded_to_the_dtype_of_the_products():
    """The product with a unit vector is the model's own number."""
    g = torch.zeros(1, 1, 40, dtype=torch.bfloat16)
    g[0, 0, 33] = 1.0
    found = launch(g, "gaussian")[1]
    assert torch.equal(found, found.to(torch.bfloat16).double()) and bool(found)


def check_float64_products_are_summed_in_float64():
    """Numbers whose sum in float32 would have no correct digit."""
    g = torch.zeros(1, 1, 40, dtype=torch.float64)
    g[0, 0, 0], g[0, 0, 1], g[0, 0, 39] = 1e12, -1e12, 1e-3
    g *= torch.from_numpy(probes("rademacher", g))
    assert float(launch(g)[1]) == pytest.approx(1e-3, rel=1e-9)


def check_rows_of_signs_are_added_in_float64():
    """128 elements each: 2^27 and -2^27, and 2^-10 between them, which float32 would lose."""
    g = torch.zeros(1, 1, 384)
    g[0, 0, 0], g[0, 0, 200], g[0, 0, 300] = 2.0**27, 2.0**-10, -(2.0**27)
    g *= torch.from_numpy(probes("rademacher", g)).float()
    assert float(launch(g)[1]) == 2.0**-10


def product_layouts(g):
    """The same numbers in every kind of memory, as far as the strides of a probe collapse."""
    return {
        "channels_last": g.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, g.shape[:2]),
        "probe slice": torch.stack([g, g], 1)[:, 1],
        "batch slice": torch.stack([g, g], 2)[:, :, 0],
        "misaligned": torch.cat([g.new_zeros(1), g.flatten()])[1:].view(g.shape),
        "probes innermost": g.movedim(0, -1).contiguous().movedim(-1, 0),
        "expanded": g[:, :1, :1, :1, :1].expand(g.shape),
    }


@pytest.mark.parametrize("kind", ["hadamard", "gaussian"])
@pytest.mark.parametrize("layout", list(product_layouts(data((2, 2, 3, 4, 4)))))
def check_layouts(layout, kind):
    for shape in ((2, 3, 7, 5), (1, 2, 8, 16)):
        g = product_layouts(data((2, *shape)))[layout]
        assert_dots(launch(g, kind)[1], g, kind)


@pytest.mark.parametrize(("kind", "share"), [("rademacher", 1), ("hadamard", 3), ("hadamard", 6)])
def check_groups_and_chunks(kind, share):
    g = data((6, 2, 3, 6, 6))
    start = torch.arange(4, dtype=torch.float64).reshape(2, 2)
    numbers = {"share": share, "index": 7, "bias": 0.25, "factor": 3.0}
    sums, dots = launch(g, kind, **numbers, sums=start.clone())
    assert_dots(dots, g, kind, share=share, index=7)
    wanted = start.numpy() + oracle.divergence_sums(array(dots), 6 // share, 0.25, 3.0)
    np.testing.assert_allclose(array(sums), wanted, rtol=1e-12)
    assert torch.equal(sums[1], start[1]) == (share == 6)
    again = launch(g, kind, **numbers, parts=[1, 2, 3], sums=start.clone())
    assert torch.equal(again[1], dots) and torch.equal(again[0], sums)


def check_more_groups_and_samples_than_a_tile(monkeypatch):
    from fm_fast.kernels import divergence_step

    monkeypatch.setattr(divergence_step, "FINISH_SAMPLES", 2)
    monkeypatch.setattr(divergence_step, "MOST_GROUPS", 2)
    g = data((6, 3, 2))
    sums, dots = launch(g, share=2, bias=-1.0, factor=0.5)
    np.testing.assert_allclose(array(sums), oracle.divergence_sums(array(dots), 3, -1.0, 0.5), rtol=1e-12, atol=1e-12)


def check_the_sums_wait_for_the_last_probe():
    g = data((4, 2, 6))
    sums, dots = launch(g, parts=[3])
    assert torch.equal(sums, torch.zeros_like(sums))
    assert torch.equal(dots.isnan(), torch.tensor([[False], [False], [False], [True]]).expand(4, 2))


@pytest.mark.parametrize("kind", KINDS)
def check_several_programs_a_sample_and_launches_beyond_the_limits(kind, monkeypatch):
    from fm_fast.kernels import _launch, _probes

    monkeypatch.setattr(_launch, "tiles_of", lambda elements: 2)
    monkeypatch.setattr(_launch, "TILE", 256)
    monkeypatch.setattr(_launch, "WORD_LIMIT", 0)
    monkeypatch.setattr(_launch, "GRID_LIMIT", 2)
    monkeypatch.setattr(_probes, "MOST_ROWS", 2)
    for shape in ((3, 3, 17, 9), (1, 1100)):
        g = data((2, *shape))
        assert_dots(launch(g, kind)[1], g, kind)


def check_nan_reaches_its_sample_only():
    g = data((2, 3, 50))
    g[1, 1, 7] = torch.nan
    sums, dots = launch(g)
    assert torch.equal(dots.isnan(), torch.tensor([[False, False, False], [False, True, False]]))
    assert torch.equal(sums[0].isnan(), torch.tensor([False, True, False]))


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (2, 3, 0), (0, 3, 4, 4)], ids=str)
def check_empty_batches(shape, kind):
    sums, dots = launch(data((2, *shape)), kind, bias=2.0)
    assert torch.equal(dots, torch.zeros(2, shape[0], dtype=torch.float64))
    assert torch.equal(sums, torch.tensor([[2.0], [0.0]], dtype=torch.float64).expand(2, shape[0]))


WRONG = {
    "dots must be contiguous float64": {"dots": torch.zeros(2, 4, dtype=torch.float64)},
    "dots must be .* got torch.float32": {"dots": torch.zeros(2, 3)},
    "dots must have a row for each of 3": {"first": 1},
    r"sums must be contiguous float64 \[2, 3\]": {"sums": torch.zeros(3, 3, dtype=torch.float64)},
    "kind must be": {"kind": 2},
    "kind must be 0, or 1 without codes": {"kind": 1, "codes": random_words(4)},
    "groups must divide": {"groups": 3},
    "groups must divide the number of probes, 2, got 0": {"groups": 0},
    "first and index at least 0": {"first": -1},
    "share must be at least 1": {"share": 0},
    "codes must have one code": {"codes": random_words(3), "rows": random_words(2)},
    "rows must have one row": {"codes": random_words(4), "rows": random_words(1)},
}


@pytest.mark.parametrize("message", WRONG)
def check_wrong_arguments_leave_the_results_alone(message):
    from fm_fast.kernels.divergence_step import launch as divergence_step

    arguments = {"sums": torch.zeros(2, 3, dtype=torch.float64), "dots": torch.zeros(2, 3, dtype=torch.float64), "g": data((2, 3, 4))}
    arguments |= {"key": key(SEED, STEP, 0), "codes": random_words(0), "rows": random_words(0), "kind": 0, "index": 0, "first": 0}
    arguments |= {"share": 1, "groups": 1, "bias": 1.0, "factor": 1.0} | WRONG[message]
    with pytest.raises(ValueError, match=message):
        divergence_step(**arguments)
    assert not arguments["dots"].any() and not arguments["sums"].any()
