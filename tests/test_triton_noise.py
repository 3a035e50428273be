"""The Triton kernel of noise, interpreted, against the independent model and fm_fast's reference."""

import numpy as np
import oracle
import pytest
import torch
from triton_interpreter import array, key, run_checks

from fm_fast import reference
from fm_fast._philox import Kind, Stream

SEED, STEP = 0x123456789ABCDEF, 4
SHAPES = [(3,), (5, 1), (2, 130), (2, 3, 5, 7), (2, 3, 4, 32), (2, 2, 9, 16)]


def test_noise_in_the_interpreter():
    run_checks(__file__)


def launch(out, kind, stream, index=0, ids=0):
    from fm_fast.kernels.noise import launch as noise

    noise(out, key(SEED, STEP, ids), int(kind), int(stream), index)
    return out


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def check_numbers(shape):
    ids = np.arange(shape[0]) + 3
    normals = launch(torch.full(shape, float("nan")), Kind.normal, Stream.x0, index=2, ids=3)
    np.testing.assert_allclose(array(normals), oracle.normal(shape, SEED, STEP, ids=ids, index=2), rtol=2e-6, atol=2e-6)
    uniforms = launch(torch.full(shape, float("nan"), dtype=torch.float64), Kind.uniform, Stream.dequantise, ids=3)
    np.testing.assert_array_equal(array(uniforms), oracle.uniform(shape, SEED, STEP, "dequantise", ids))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def check_signs_and_words(shape):
    signs = launch(torch.full(shape, float("nan"), dtype=torch.bfloat16), Kind.sign, Stream.probe, index=300)
    np.testing.assert_array_equal(array(signs), oracle.sign(shape, SEED, STEP, index=300))
    words = launch(torch.full(shape, -1), Kind.word, Stream.data_order, ids=list(range(9, 9 + shape[0])))
    assert torch.equal(words, reference.noise(key(SEED, STEP, 9), shape, Kind.word, Stream.data_order))


@pytest.mark.parametrize("kind", Kind, ids=str)
def check_the_largest_stream_and_index(kind):
    out = torch.zeros((2, 130), dtype=torch.int64 if kind is Kind.word else torch.float32)
    launch(out, kind, 255, index=2**24 - 1)
    torch.testing.assert_close(out, reference.noise(key(SEED, STEP, 0), (2, 130), kind, 255, 2**24 - 1), rtol=2e-6, atol=2e-6)


WRONG = {
    "kind must be one of .*, got -1": (-1, 0, 0),
    "kind must be one of .*, got 4": (4, 0, 0),
    "stream must be at least 0 and below 256, got -1": (0, -1, 0),
    "stream must be at least 0 and below 256, got 256": (0, 256, 0),
    "index must be at least 0 and below 16777216, got -1": (0, 0, -1),
    "index must be at least 0 and below 16777216, got 16777216": (0, 0, 2**24),
}


@pytest.mark.parametrize("message", WRONG)
def check_numbers_of_no_counter_are_an_error(message):
    out = torch.full((2, 3), float("nan"))
    with pytest.raises(ValueError, match=f"^{message}$"):
        launch(out, *WRONG[message])
    assert out.isnan().all()
