"""The noise contract: golden words, agreement with an independent model, statistics, and the invariances that users rely on."""

import math

import numpy as np
import oracle
import pytest
import torch

import fm_fast as fm
from fm_fast import _backends, _philox, random
from fm_fast.random import make_key

pytestmark = pytest.mark.usefixtures("poisoned_outputs")
needs_cpp = pytest.mark.skipif(_backends.why_not("noise", "cpu", "cpp") is not None, reason="the C++ library is not built")
SHAPES = [
    (3,),
    (5, 1),
    (4, 2),
    (3, 7),
    (2, 3, 5),
    (2, 3, 4, 5),
    (2, 3, 32, 32),
    (2, 3, 2, 3, 5),
    (13, 16, 7),
    (3, 40, 15),
    (1, 1, 129),
    (3, 130),
    (0, 4),
    (2, 0),
    (2, 3, 0),
    (2, 0, 3),
    (1, 0, 5, 3),
]
RANDOM123 = [
    ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, 0xFFFFFFFFFFFFFFFF, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), 0x299F31D0A4093822, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]


def draw(shape, backend, kind="normal", seed=11, step=3, stream="x0", index=0, ids=None, dtype=None):
    key = make_key(seed, step, ids, shape[0], torch.device("cpu"))
    chosen = _philox.Kind[kind]
    out = torch.int64 if kind == "word" else dtype or torch.float32
    return fm._ops.noise(key, shape, chosen, _philox.Stream[stream], index, out, backend)


@pytest.mark.parametrize(("counter", "seed", "expected"), RANDOM123)
def test_known_answers_of_random123(counter, seed, expected):
    signed = seed - 2**64 if seed >= 2**63 else seed
    got = _philox.philox(tuple(torch.tensor(c) for c in counter), torch.tensor(signed))
    assert tuple(int(w) for w in got) == expected
    assert tuple(int(w) for w in oracle.philox(*counter, seed)) == expected


def test_golden_values():
    """Published numbers: a change here breaks every saved experiment."""
    words = draw((2, 1, 5), "reference", "word", seed=0x123456789ABCDEF, step=7, stream="dequantise", index=2, ids=100)
    assert words.reshape(2, 5).tolist() == GOLDEN_WORDS
    z = fm.noise((1, 4), seed=0, step=0)
    assert z[0].tolist() == pytest.approx(GOLDEN_NORMALS, abs=5e-7)


GOLDEN_WORDS = [[396552379, 1617532760, 4095507535, 386547723, 3403249174], [3720475728, 1709475994, 3728392599, 1791714577, 2523358111]]
GOLDEN_NORMALS = [0.9911377, -0.9246626, -0.617609, -0.4820686]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["normal", "uniform", "sign", "word"])
def test_agrees_with_the_independent_model(shape, kind, backend):
    ids = torch.arange(shape[0]) * 1000 + 17
    got = draw(shape, backend, kind, stream="probe" if kind == "sign" else "x0", index=5, ids=ids)
    assert got.shape == shape
    if kind == "word":
        w, positions = oracle.words(shape, 11, 3, "x0", ids.numpy(), 5)
        expected = oracle.trim(w, positions, shape).astype(np.int64)
        assert np.array_equal(got.numpy(), expected)
        return
    stream = "probe" if kind == "sign" else "x0"
    expected = getattr(oracle, kind)(shape, 11, 3, stream, ids.numpy(), 5)
    tolerance = 4e-6 if kind == "normal" else 0.0
    np.testing.assert_allclose(got.numpy().astype(np.float64), expected, rtol=0, atol=tolerance)


def test_normals_are_accurate_to_a_few_units_in_the_last_place(backend):
    z = draw((64, 4096), backend).double().numpy()
    exact = oracle.normal((64, 4096), 11, 3)
    assert np.abs(z - exact).max() < 1.5e-6
    large = np.abs(exact) > 1e-2
    assert (np.abs(z - exact)[large] / np.abs(exact)[large]).max() < 5e-5


def test_torchs_default_dtype_is_the_default():
    """A network made under it takes its noise, as it takes torch.randn's."""
    torch.set_default_dtype(torch.float64)
    try:
        noise = fm.noise((4, 2), seed=11, step=3)
        assert noise.dtype == fm.noise((4,), seed=11, step=3, stream="t").dtype == torch.float64
        assert fm.sample(lambda x, t: torch.nn.Linear(2, 2)(x), noise, steps=2).x.dtype == torch.float64
        assert fm.noise((4, 2), seed=11, step=3, kind="word").dtype == torch.int64
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(noise, fm.noise((4, 2), seed=11, step=3).double())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_are_the_float32_numbers_rounded(dtype, backend):
    shape = (3, 5, 33)
    assert torch.equal(draw(shape, backend, dtype=dtype), draw(shape, backend).to(dtype))


def test_moments_tails_and_distribution(backend):
    z = draw((256, 16384), backend).double().flatten()
    n = z.numel()
    assert abs(float(z.mean())) < 5 / math.sqrt(n)
    assert abs(float(z.var()) - 1) < 5 * math.sqrt(2 / n)
    assert abs(float((z**3).mean())) < 5 * math.sqrt(15 / n)
    assert abs(float((z**4).mean()) - 3) < 5 * math.sqrt(96 / n)
    for limit in (3.0, 4.0, 5.0):
        expected = n * math.erfc(limit / math.sqrt(2))
        assert abs(int((z.abs() > limit).sum()) - expected) < 5 * math.sqrt(expected) + 1
    assert kolmogorov_smirnov(z, lambda x: 0.5 * torch.erfc(-x / math.sqrt(2))) < 2.0


def test_uniforms_and_signs_are_fair(backend):
    u = draw((64, 16384), backend, "uniform").double().flatten()
    assert float(u.min()) > 0
    assert float(u.max()) <= 1
    assert kolmogorov_smirnov(u, lambda x: x) < 2.0
    s = draw((64, 16384), backend, "sign", stream="probe")
    assert set(s.unique().tolist()) == {-1.0, 1.0}
    assert abs(float(s.double().mean())) < 5 / math.sqrt(s.numel())


def kolmogorov_smirnov(x, distribution):
    """sqrt(n) times the largest distance of distribution functions; above 2.0 with probability 7e-4."""
    x = x.sort().values
    n = x.numel()
    cumulative = distribution(x)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    return math.sqrt(n) * float(torch.maximum(cumulative - steps[:-1], steps[1:] - cumulative).max())


def test_tails_reach_beyond_six_sigma():
    word = torch.tensor([[0, 0, 0, 0], [7, 2**31, 7, 0]])
    z = _philox.normal(word)
    assert z[0, 0] == pytest.approx(math.sqrt(2 * 33 * math.log(2)), rel=1e-6)
    assert z.abs().max() > 6
    top = _philox.normal(torch.tensor([[2**32 - 1, 5, 2**32 - 1, 5]]))
    assert torch.equal(top, torch.zeros_like(top))


@pytest.mark.parametrize(
    "change", [{"seed": 12}, {"step": 4}, {"stream": "init"}, {"index": 1}, {"ids": 4096}], ids=lambda c: next(iter(c))
)
def test_seeds_steps_streams_indices_and_samples_are_independent(change, backend):
    shape = (4, 65536)
    a, b = draw(shape, backend).double().flatten(), draw(shape, backend, **change).double().flatten()
    assert abs(float((a * b).mean())) < 5 / math.sqrt(a.numel())
    assert not bool((a == b).any())


def test_samples_of_a_batch_are_independent(backend):
    z = draw((64, 16384), backend).double()
    gram = z @ z.T / z.shape[1] - torch.eye(64, dtype=torch.float64)
    assert float(gram.abs().max()) < 6 * math.sqrt(2 / z.shape[1])


@pytest.mark.parametrize("kind", ["normal", "sign"])
def test_one_batch_equals_micro_batches_ranks_and_any_order(kind, backend):
    whole = draw((64, 3, 7, 5), backend, kind)
    micro = [draw((16, 3, 7, 5), backend, kind, ids=16 * i) for i in range(4)]
    assert torch.equal(whole, torch.cat(micro))
    strided = draw((32, 3, 7, 5), backend, kind, ids=torch.arange(1, 64, 2))
    assert torch.equal(whole[1::2], strided)
    order = torch.randperm(64)
    assert torch.equal(whole[order], draw((64, 3, 7, 5), backend, kind, ids=order))


def test_logical_order_ignores_trailing_shape():
    assert torch.equal(draw((2, 3, 4, 5), "reference").flatten(2), draw((2, 3, 20), "reference"))


def test_large_ids_steps_and_indices(backend):
    top = 2**32 - 1
    got = draw((1, 8), backend, "word", seed=2**63 - 1, step=top, index=2**24 - 1, ids=top)
    w, _ = oracle.words((1, 8), 2**63 - 1, top, "x0", [top], 2**24 - 1)
    assert got.flatten().tolist() == w.flatten().tolist()


WRONG = {
    "argument kind: unknown code 4": {"kind": 4},
    "argument stream: expected 0 to 255, got 256": {"stream": 256},
    "argument stream: expected 0 to 255, got -1": {"stream": -1},
    "argument index: expected 0 to 16777215, got 16777216": {"index": 2**24},
    "argument index: expected 0 to 16777215, got -1": {"index": -1},
    "argument index: expected 0 to 16777215, got 4294967296": {"index": 2**32},
}


@needs_cpp
@pytest.mark.parametrize("message", WRONG)
def test_what_does_not_fit_the_counter_is_refused(message):
    """An index of 25 bits would repeat the numbers of another one."""
    arguments = {"out": torch.empty(2, 3), "key": torch.zeros(3, dtype=torch.int64), "kind": 0, "stream": 0, "index": 0} | WRONG[message]
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fm_fast.noise(**arguments)


def test_a_seed_from_torch_obeys_manual_seed_and_differs_between_ranks(monkeypatch):
    def keys(rank):
        monkeypatch.setattr(fm.random, "_rank", lambda: rank)
        torch.manual_seed(5)
        drawn = [make_key(None, step, None, 4, torch.device("cpu")) for step in (None, None, 3)]
        return drawn, torch.get_rng_state()

    (first, state), (again, _), (other, state_of_other) = keys(0), keys(0), keys(1)
    assert torch.equal(torch.stack(first), torch.stack(again))
    assert not torch.equal(first[0], first[1])
    assert all(one[0] != another[0] for one, another in zip(first, other, strict=True))
    assert all(0 <= int(key[0]) < 2**63 and 0 <= int(key[1]) < 2**32 for key in (*first, *other))
    assert torch.equal(state, state_of_other)  # what both draw next is the same: an order of the data, say


def test_keys_accept_tensors_as_well_as_numbers():
    numbers = make_key(9, 4, 2, 3, torch.device("cpu"))
    tensors = make_key(torch.tensor(9), torch.tensor([4]), torch.tensor([2, 3, 4]), 3, torch.device("cpu"))
    assert numbers.tolist() == [9, 4, 2]
    assert tensors.tolist() == [9, 4, 2, 3, 4]


def test_no_two_draws_of_a_large_run_share_their_words(backend):
    """Ranks, micro-batches, steps, streams and indices: 2^17 draws of 128 bits, all different."""
    draws = [
        draw((1024, 4), backend, "word", step=step, stream=stream, index=index, ids=1024 * part)
        for part in range(4)  # the micro-batches of two ranks
        for step in range(4)
        for stream in ("x0", "dequantise")
        for index in range(4)
    ]
    words = torch.cat(draws)
    assert words.shape[0] == 2**17
    assert len(torch.unique(words, dim=0)) == len(words)


def test_a_device_without_an_index_is_the_current_one(monkeypatch):
    """As tensors name it, so that ids on that device are accepted."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert random._indexed(torch.device("cuda")) == torch.device("cuda", 3)
    for name in ("cpu", "meta", "cuda:1"):
        assert random._indexed(torch.device(name)) == torch.device(name)


def test_a_key_of_nothing_is_drawn_at_once():
    """Words that differ, in the ranges of a seed, a step and the first of two thousand million ids."""
    torch.manual_seed(0)
    drawn = torch.randint(2**31, (3,))
    torch.manual_seed(0)
    key = make_key(None, None, None, 2, torch.device("cpu"))
    assert torch.equal(key, drawn) and key.dtype == torch.int64 and len(set(key.tolist())) == 3
    assert fm.random.FRESH_WORDS <= fm._checks.WORD // 2
    before = torch.get_rng_state()
    unused = make_key(None, None, None, 2, torch.device("cpu"), draws=False)
    assert unused.tolist() == [0, 0, 0] and torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("ids", [None, 3, torch.tensor([5, 0])])
def test_a_key_without_a_seed_holds_the_number_that_torch_draws(ids):
    torch.manual_seed(0)
    drawn = int(torch.randint(2**63 - 1, (1,)))
    torch.manual_seed(0)
    key = make_key(None, 7, ids, 2, torch.device("cpu"))
    assert key.tolist() == [drawn, 7, *(ids.tolist() if isinstance(ids, torch.Tensor) else [ids or 0])] and key.dtype == torch.int64


STREAM_KINDS = {"bridge": "normal", "x0": "normal", "init": "normal", "probe": "sign", "data_order": "word", "probe_rows": "word"}


@pytest.mark.parametrize("stream", [stream.name for stream in _philox.Stream])
def test_numbers_are_by_default_of_the_kind_that_their_stream_is_used_for(stream):
    kind = STREAM_KINDS.get(stream, "uniform")
    found = fm.noise((2, 3), seed=1, step=2, stream=stream)
    assert torch.equal(found, fm.noise((2, 3), seed=1, step=2, stream=stream, kind=kind))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_words_are_whole_numbers_whatever_the_dtype(dtype):
    found = fm.noise((2, 3), seed=1, step=2, kind="word", dtype=dtype)
    assert found.dtype == torch.int64 and torch.equal(found, fm.noise((2, 3), seed=1, step=2, kind="word"))
