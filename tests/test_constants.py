"""The numbers of a plan on a device: copied there once, never while a CUDA graph is captured, and no network can change them."""

import numpy as np
import pytest
import torch

import fm_fast as fm
from fm_fast import _constants as constants
from fm_fast import _modes, random

CUDA = torch.device("cuda")
VALUES = np.array([[1.0, 0.25], [1.0, 0.75]])


@pytest.fixture
def capture(monkeypatch):
    """A make-believe GPU: its copies stay on the CPU. Returns a function that says whether a graph is being captured."""
    capturing = [False]
    monkeypatch.setattr(_modes, "is_captured", lambda device: capturing[0])
    monkeypatch.setattr(constants, "_copied", lambda values, device: values)
    monkeypatch.setattr(constants, "_hold", lambda values, device: None)
    constants._kept.cache_clear()
    yield lambda value: capturing.__setitem__(0, value)
    constants._kept.cache_clear()


def test_a_gpu_keeps_what_it_was_brought(capture):
    first = constants.constant(VALUES, torch.float32, CUDA)
    assert torch.equal(first, torch.tensor(VALUES, dtype=torch.float32))
    assert constants.constant(VALUES.copy(), torch.float32, CUDA) is first
    assert constants.constant(VALUES, torch.float64, CUDA).dtype == torch.float64
    assert constants.constant(VALUES.T.copy(), torch.float32, CUDA) is not first


def test_a_capture_takes_what_is_there_and_nothing_else(capture):
    kept = constants.constant(VALUES, torch.float32, CUDA)
    capture(True)
    assert constants.constant(VALUES, torch.float32, CUDA) is kept
    assert any(x is kept for x in constants._read_by_graphs)
    with pytest.raises(RuntimeError, match="call it once before the capture"):
        constants.constant(VALUES + 1.0, torch.float32, CUDA)


def test_a_stream_holds_what_it_reads(capture, monkeypatch):
    """Also what another stream made; graphs hold theirs for ever."""
    held = []
    monkeypatch.setattr(constants, "_hold", lambda values, device: held.append((values, device)))
    first, again = (constants.constant(VALUES, torch.float32, CUDA) for _ in range(2))
    assert [values is first for values, _ in held] == [True, True] and again is first and held[0][1] == CUDA
    capture(True)
    constants.constant(VALUES, torch.float32, CUDA)
    assert len(held) == 2


def test_inference_mode_leaves_no_mark(capture):
    with torch.inference_mode():
        kept = constants.constant(VALUES, torch.float32, CUDA)
    assert not kept.is_inference()


def test_a_network_that_writes_to_its_times_changes_no_later_solve(capture, monkeypatch):
    """A batch of one gets its times as they lie in memory."""
    on_gpu = constants.own_constant
    monkeypatch.setattr("fm_fast._solver.evaluate.own_constant", lambda values, dtype, device: on_gpu(values, dtype, CUDA))

    def model(x, t):
        velocity = torch.ones_like(x) * t
        t.mul_(1000.0)
        return velocity

    noise = torch.zeros(1, 2)
    first, second = (fm.sample(model, noise, steps=4).x for _ in range(2))
    assert torch.equal(first, second)
    torch.testing.assert_close(first, torch.full((1, 2), 0.5))


def test_samples_are_marked_where_a_capture_forbids_to_look(capture):
    capture(True)
    assert not fm.sample(lambda x, t: x / 0.0, torch.ones(2, 3), steps=1).finite.any()
    capture(False)
    with pytest.raises(FloatingPointError):
        fm.sample(lambda x, t: x / 0.0, torch.ones(2, 3), steps=1)


# Keys of the noise


@pytest.mark.parametrize("words", [(0, 0, None), (7, 0, 0), (2**63 - 1, 2**32 - 1, 2**32 - 5), (3, 5, None)])
def test_a_key_of_numbers_takes_no_copy_from_the_host(capture, monkeypatch, words):
    """On a GPU: torch.full would need one here."""
    units = constants.unit_words(CUDA)
    capture(True)
    launches = []
    monkeypatch.setattr(
        torch.Tensor, "add_", lambda self, other, alpha, add=torch.Tensor.add_: launches.append(alpha) or add(self, other, alpha=alpha)
    )
    key = random.make_key(*words, 4, CUDA)
    assert key.tolist() == [word or 0 for word in words] and len(launches) == sum(1 for word in words[1:] if word)
    assert torch.equal(units, torch.eye(3, dtype=torch.int64)), "what is kept was not written to"
    assert random._as_vector(0, CUDA, units).tolist() == [0]


def test_a_capture_that_comes_first_fills_its_key(capture, monkeypatch):
    capture(True)
    assert constants.unit_words(CUDA) is None
    full = torch.full
    monkeypatch.setattr(torch, "full", lambda *shape, device, **more: full(*shape, **more))
    assert random.make_key(3, 5, None, 4, CUDA).tolist() == [3, 5, 0]
