"""Small things about time grids and the kinds of noise that users depend on and no other test looks at."""

import numpy as np
import pytest
import torch

import fm_fast as fm
from fm_fast import _philox
from fm_fast.grids import NAMED

ZERO = torch.zeros(2, 3, dtype=torch.float64)


def nfe(**options):
    return fm.sample(lambda x, t: x, ZERO, method="euler", **options).nfe


def test_the_named_shift_is_that_of_stable_diffusion_3():
    """Its shift is 3: the noise level 1/2 becomes 3/4."""
    np.testing.assert_allclose(NAMED["shift"].nodes(2, fm.OT()), [0.0, 0.25, 1.0], rtol=1e-15)


@pytest.mark.parametrize("off", [-1e-10, 1e-10])
def test_a_float64_time_that_is_nearly_a_node_is_that_node(off):
    """No dtype's rounding explains 1e-10 there; a step of that length would still be none."""
    assert nfe(steps=2, save=np.array([0.5 + off])) == 2
    assert nfe(steps=2, save=np.array([0.5 + 1e3 * off])) == 3


def test_a_time_a_little_outside_of_the_solve_is_refused():
    for outside in (0.5001, 0.50003, 0.1999):
        with pytest.raises(ValueError, match="save must lie inside the solve"):
            nfe(steps=2, t0=0.2, t1=0.5, save=[outside])


def test_short_steps_may_follow_long_ones_and_not_the_other_way_round():
    """A multistep method multiplies rounding errors by how much longer a step is than the one before."""
    options = {"method": "ab2", "noise": ZERO}
    fm.sample(lambda x, t: x, grid=[0.0, 0.5, 1.0 - 1e-6, 1.0], **options)
    with pytest.raises(ValueError, match="must not lengthen a step more than 100000 times"):
        fm.sample(lambda x, t: x, grid=[0.0, 1e-6, 0.5, 1.0], **options)


KINDS = {"bridge": "normal", "x0": "normal", "init": "normal", "probe": "sign", "data_order": "word", "probe_rows": "word"}


@pytest.mark.parametrize("stream", [stream.name for stream in _philox.Stream])
def test_numbers_are_by_default_of_the_kind_that_their_stream_is_used_for(stream):
    kind = KINDS.get(stream, "uniform")
    found = fm.noise((2, 3), seed=1, step=2, stream=stream)
    assert torch.equal(found, fm.noise((2, 3), seed=1, step=2, stream=stream, kind=kind))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_words_are_whole_numbers_whatever_the_dtype(dtype):
    found = fm.noise((2, 3), seed=1, step=2, kind="word", dtype=dtype)
    assert found.dtype == torch.int64 and torch.equal(found, fm.noise((2, 3), seed=1, step=2, kind="word"))
