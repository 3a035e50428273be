"""Where results may be looked at: not where that would end a capture, or read what a transform hides."""

import warnings

import pytest
import torch
from torch.func import vmap

import fm_fast as fm
from fm_fast import _modes

X1 = torch.linspace(-1.0, 1.0, 18, dtype=torch.float64).reshape(3, 6)


def coarse_solve():
    return fm.log_likelihood(lambda x, t: -8 * x * t[:, None], X1, method="euler", steps=4, kind="exact", error_estimate=True)


def test_a_capture_is_not_ended_by_a_look_at_the_error_of_the_steps(monkeypatch):
    with pytest.warns(UserWarning, match="take more steps"):
        expected = coarse_solve()
    monkeypatch.setattr(_modes, "is_captured", lambda device: True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(coarse_solve().disc_err, expected.disc_err)


def test_a_capture_only_marks_what_is_not_finite(monkeypatch):
    solve = lambda: fm.sample(lambda x, t: x / 0.0, X1, method="euler", steps=1)  # noqa: E731
    with pytest.raises(FloatingPointError, match="3 of 3 samples are not finite"):
        solve()
    monkeypatch.setattr(_modes, "is_captured", lambda device: True)
    assert not solve().finite.any()


def test_where_values_may_be_read():
    seen = []

    def look(x):
        seen.append((_modes.values_readable(x), _modes.worth_a_wait(x)))
        return x

    look(X1), vmap(look)(X1), look(X1.to("meta"))
    assert seen == [(True, True), (False, False), (False, False)]


def test_solves_of_tensors_without_values_have_their_shapes():
    x = torch.empty(2, 3, device="meta")
    field = lambda x, t: x * t[:, None]  # noqa: E731
    assert fm.sample(field, x, method="rk4", steps=2).x.shape == (2, 3)
    assert fm.log_likelihood(field, x, steps=2).logp.shape == (2,)
