"""divergence_step against the independent float64 model: kinds, layouts, dtypes, shared probes, groups, and what it refuses."""

import numpy as np
import oracle
import pytest
import torch
from probe_cases import DTYPES, SHAPES, tables
from thread_counts import on_thread_counts

from fm_fast import _backends, _ops
from fm_fast.random import Kind, Stream, make_key

pytestmark = pytest.mark.usefixtures("poisoned_outputs")
needs_cpp = pytest.mark.skipif(_backends.why_not("divergence_step", "cpu", "cpp") is not None, reason="the C++ library is not built")
SEED, STEP = 78, 6
KINDS = ["rademacher", "hadamard", "gaussian"]


def products(shape, count, dtype=torch.float32):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(2)).to(dtype)


def probe_set(kind, shape, total, share=1, index=0, ids=None):
    key = make_key(SEED, STEP, ids, shape[0], torch.device("cpu"))
    return _ops.ProbeSet(key, *tables(shape, total, kind == "hadamard"), index, total, share, kind == "gaussian")


def expected_probes(probes, shape, first, count, ids=None):
    """z in float64."""
    if not probes.normal:
        words = probes.codes.tolist(), probes.rows.tolist()
        return oracle.probes(shape, SEED, STEP, first, count, probes.index, probes.share, *words, ids)
    return np.stack([oracle.normal(shape, SEED, STEP, "probe", ids, probes.index + q // probes.share) for q in range(first, first + count)])


def evaluate(g, probes, backend, parts=None, bias=0.0, factor=1.0, sums=None):
    """(sums, dots) of one evaluation, cut into calls of ``parts`` probes."""
    total, batch = g.shape[0], g.shape[1]
    dots = torch.empty(total, batch, dtype=torch.float64)
    sums = torch.zeros(2, batch, dtype=torch.float64) if sums is None else sums
    first = 0
    with torch.no_grad():
        for count in parts or [total]:
            _ops.divergence_step(sums, dots, g[first : first + count], probes, first, bias, factor, backend)
            first += count
    return sums, dots


def check_dots(dots, g, z, z_error=0.0):
    """Sums of up to 1024 float32 numbers in 32 lanes: at most 1024/32 + 5 + 2 roundings of any term, then float64."""
    numbers = g.double().numpy()
    expected, size = ((z * numbers).reshape(*dots.shape, -1).sum(2), np.abs(z * numbers).reshape(*dots.shape, -1).sum(2))
    bound = (40 * 2.0**-24 if g.dtype != torch.float64 else 2.0**-48) * size + z_error * np.abs(numbers).reshape(*dots.shape, -1).sum(2)
    assert (np.abs(dots.numpy() - expected) <= bound).all()


def normal_error(probes):
    """How far float32 normals may lie from those of the float64 model."""
    return 5e-6 if probes.normal else 0.0


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_products_of_every_size(shape, kind, backend):
    g, probes = products(shape, 4), probe_set(kind, shape, 4, ids=50)
    z = expected_probes(probes, shape, 0, 4, np.arange(shape[0]) + 50)
    sums, dots = evaluate(g, probes, backend, bias=0.5, factor=-2.0)
    check_dots(dots, g, z, normal_error(probes))
    np.testing.assert_allclose(sums.numpy(), oracle.divergence_sums(dots.numpy(), 4, 0.5, -2.0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(3, 3, 7, 5), (40, 2), (2, 1100)], ids=str)
def test_dtypes(shape, kind, dtype, backend):
    g, probes = products(shape, 3, dtype), probe_set(kind, shape, 3)
    if not probes.normal or dtype == torch.float64:
        return check_dots(evaluate(g, probes, backend)[1], g, expected_probes(probes, shape, 0, 3), normal_error(probes))
    # The model was given the normals rounded to its dtype, so the products are with those very numbers.
    drawn = [_ops.noise(probes.key, shape, Kind.normal, Stream.probe, q, torch.float32, backend).to(dtype) for q in range(3)]
    check_dots(evaluate(g, probes, backend)[1], g, torch.stack(drawn).double().numpy())


def test_float64_products_are_summed_in_float64(backend):
    """Numbers whose sum in float32 would have no correct digit."""
    g = torch.zeros(1, 1, 40, dtype=torch.float64)
    probes = probe_set("rademacher", (1, 40), 1)
    g[0, 0, 0], g[0, 0, 1], g[0, 0, 39] = 1e12, -1e12, 1e-3
    g *= torch.from_numpy(expected_probes(probes, (1, 40), 0, 1))
    assert float(evaluate(g, probes, backend)[1]) == pytest.approx(1e-3, rel=1e-9)


def layouts(g):
    """The same numbers in every kind of memory, as far as the strides of a probe collapse."""
    yield g.contiguous()
    yield torch.stack([g, g], 1)[:, 1]
    yield torch.stack([g, g], 2)[:, :, 0]
    yield g.movedim(0, -1).contiguous().movedim(-1, 0)
    if g.dim() == 5:
        yield g.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, g.shape[:2])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(3, 3, 7, 5), (40, 2), (2, 1100), (2, 20, 9, 15)], ids=str)
def test_layouts(shape, kind, backend):
    g, probes = products(shape, 3), probe_set(kind, shape, 3)
    z = expected_probes(probes, shape, 0, 3)
    for layout in layouts(g):
        check_dots(evaluate(layout, probes, backend)[1], g, z, normal_error(probes))


@pytest.mark.parametrize("share", [1, 2, 3, 6, 12])
@pytest.mark.parametrize("kind", ["rademacher", "hadamard"])
def test_groups_and_chunks_of_one_evaluation(kind, share, backend):
    shape = (5, 3, 6, 6)
    g, probes = products(shape, 12), probe_set(kind, shape, 12, share=share, index=7)
    start = torch.arange(10, dtype=torch.float64).reshape(2, 5)
    sums, dots = evaluate(g, probes, backend, bias=0.25, factor=3.0, sums=start.clone())
    check_dots(dots, g, expected_probes(probes, shape, 0, 12))
    expected = start.numpy() + oracle.divergence_sums(dots.numpy(), 12 // share, 0.25, 3.0)
    np.testing.assert_allclose(sums.numpy(), expected, rtol=1e-12)
    assert torch.equal(sums[1], start[1]) == (share == 12)
    for parts in ([1] * 12, [5, 7], [4, 4, 4]):
        again = evaluate(g, probes, backend, parts, 0.25, 3.0, start.clone())
        assert torch.equal(again[1], dots)
        assert torch.equal(again[0], sums)


def test_the_sums_wait_for_the_last_probe(backend):
    g, probes = products((2, 6), 4), probe_set("rademacher", (2, 6), 4)
    sums, dots = torch.zeros(2, 2, dtype=torch.float64), torch.full((4, 2), torch.nan, dtype=torch.float64)
    with torch.no_grad():
        _ops.divergence_step(sums, dots, g[:3], probes, 0, 1.0, 1.0, backend)
    assert torch.equal(sums, torch.zeros_like(sums))
    assert torch.equal(dots.isnan(), torch.tensor([[False], [False], [False], [True]]).expand(4, 2))


def test_the_estimate_of_a_quadratic_form_is_its_trace(backend):
    """z . (A z) has the mean tr A; its variance over probes is 2 (|A|^2 - the diagonal's) for signs of a symmetric A."""
    count, d = 512, 24
    a = torch.randn(d, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a = (a + a.T) / 2
    probes = probe_set("rademacher", (1, d), count)
    z = _ops.probe(torch.empty(1, d), probes, 0, count, backend)
    sums, _ = evaluate((z.double() @ a).float(), probes, backend)
    variance = 2 * float((a**2).sum() - (a.diagonal() ** 2).sum()) / count
    assert abs(float(sums[0]) - float(a.trace())) < 5 * variance**0.5
    assert float(sums[1]) == pytest.approx(variance, rel=0.25)


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (2, 3, 0), (0, 3, 4, 4)], ids=str)
def test_empty_batches(shape, backend):
    sums, dots = evaluate(products(shape, 2), probe_set("rademacher", shape, 2), backend, bias=2.0)
    assert torch.equal(dots, torch.zeros(2, shape[0], dtype=torch.float64))
    assert torch.equal(sums[0], torch.full((shape[0],), 2.0, dtype=torch.float64))


@needs_cpp
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(3, 70_000), (64, 3, 33, 33), (5000, 2)], ids=str)
def test_the_number_of_threads_changes_nothing(shape, kind):
    g, probes = products(shape, 3), probe_set(kind, shape, 3)
    results = on_thread_counts(lambda: evaluate(g, probes, "cpp"))
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0], strict=True))


def test_nan_reaches_its_sample_only(backend):
    g = products((3, 50), 2)
    g[1, 1, 7] = torch.nan
    sums, dots = evaluate(g, probe_set("rademacher", (3, 50), 2), backend)
    assert torch.equal(dots.isnan(), torch.tensor([[False, False, False], [False, True, False]]))
    assert torch.equal(sums[0].isnan(), torch.tensor([False, True, False]))


def arguments(**changes):
    values = {
        "sums": torch.zeros(2, 3, dtype=torch.float64),
        "dots": torch.zeros(2, 3, dtype=torch.float64),
        "g": torch.zeros(2, 3, 4),
        "key": torch.zeros(3, dtype=torch.int64),
        "codes": torch.empty(0, dtype=torch.int64),
        "rows": torch.empty(0, dtype=torch.int64),
    }
    numbers = {"kind": 0, "index": 0, "first": 0, "share": 1, "groups": 1, "bias": 0.0, "factor": 1.0}
    return values | numbers | changes


@needs_cpp
def test_the_raw_op_refuses_gradients():
    wanted = arguments(g=torch.zeros(2, 3, 4, requires_grad=True))
    with pytest.raises(RuntimeError, match="argument g: requires grad"):
        torch.ops.fm_fast.divergence_step(**wanted)
    with torch.no_grad():
        torch.ops.fm_fast.divergence_step(**wanted)


WRONG = {
    "argument g: expected a floating": {"g": torch.zeros(2, 3, 4, dtype=torch.int64)},
    "argument g: expected at least one": {"g": torch.tensor(1.0)},
    "argument dots: expected .probes, B.": {"dots": torch.zeros(2, 4, dtype=torch.float64)},
    "argument dots: expected float64": {"dots": torch.zeros(2, 3)},
    "argument dots: expected a row for each": {"first": 1},
    "argument sums: expected a contiguous": {"sums": torch.zeros(3, 3, dtype=torch.float64)},
    "argument sums: expected float64": {"sums": torch.zeros(2, 3)},
    "argument kind": {"kind": 2},
    "argument index": {"index": 2**24},
    "argument first": {"first": -1},
    "argument share": {"share": 0},
    "argument groups: expected a divisor": {"groups": 3},
    "argument groups: expected": {"groups": 0},
    "argument codes: expected none": {"kind": 1, "codes": torch.zeros(4, dtype=torch.int64)},
    "argument codes: expected one code": {"codes": torch.zeros(3, dtype=torch.int64), "rows": torch.zeros(2, dtype=torch.int64)},
    "argument rows: expected one row": {"codes": torch.zeros(4, dtype=torch.int64), "rows": torch.zeros(1, dtype=torch.int64)},
    "argument key": {"key": torch.zeros(4, dtype=torch.int64)},
}


@needs_cpp
@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_leave_the_results_alone(message):
    wrong = arguments(**WRONG[message])
    before = wrong["dots"].clone(), wrong["sums"].clone()
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fm_fast.divergence_step(**wrong)
    assert torch.equal(wrong["dots"], before[0])
    assert torch.equal(wrong["sums"], before[1])
