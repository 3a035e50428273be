"""Learning-rate schedules against their closed forms, and the paper's at its own numbers."""

import math

import pytest
from trainer_helpers import tiny

from fm_fast.train.optimiser.schedule import FLOOR, SCHEDULES


def rates(kind, finished, **changes):
    config = tiny(**{"schedule": kind, "steps": 100, "warmup": 10, "learning_rate": 1.0} | changes)
    return [config.rate.after(step) for step in finished]


@pytest.mark.parametrize("kind", SCHEDULES)
def test_every_schedule_rises_linearly_to_the_peak(kind):
    assert rates(kind, (0, 4, 8, 9)) == pytest.approx([0.1, 0.5, 0.9, 1.0], abs=2e-8)
    assert rates(kind, (0,), warmup=0) == rates(kind, (0,), warmup=1) == [1.0]
    assert max(rates(kind, range(120))) == 1.0


def test_closed_forms():
    assert rates("constant", (10, 50, 99, 1000)) == [1.0] * 4
    assert rates("linear", (10, 55, 99, 100, 120)) == pytest.approx([1.0, 0.5, 1 / 90, FLOOR, FLOOR], abs=2e-8)
    assert rates("cosine", (10, 40, 55, 100, 120)) == pytest.approx([1.0, 0.75, 0.5, FLOOR, FLOOR], abs=2e-8)
    assert rates("inverse_sqrt", (10, 39, 89, 999)) == pytest.approx([math.sqrt(10 / 11), 0.5, 1 / 3, 0.1], abs=2e-8)
    assert rates("inverse_sqrt", (0, 3, 99), warmup=0) == pytest.approx([1.0, 0.5, 0.1], abs=2e-8)


def test_the_schedule_of_the_paper():
    """CIFAR-10: 391k steps, from 1e-8 over 45k steps to 5e-4, and linearly down to 1e-8 (appendix E, table 3)."""
    settings = {"steps": 391_000, "warmup": 45_000, "learning_rate": 5e-4}
    first, half, peak, middle, last = rates("linear", (0, 22_499, 44_999, 218_000, 390_999), **settings)
    assert first == pytest.approx(1e-8 + 5e-4 / 45_000, rel=1e-3) and half == pytest.approx(2.5e-4, rel=1e-4)
    assert peak == 5e-4 and middle == pytest.approx(2.5e-4, rel=1e-4) and last == pytest.approx(1e-8 + 5e-4 / 346_000, rel=1e-3)


def test_a_peak_below_the_floor_stays():
    assert rates("cosine", (0, 50, 100), learning_rate=1e-10) == [1e-10] * 3


def test_an_unknown_schedule():
    with pytest.raises(ValueError, match="schedule: expected one of constant, linear, cosine, inverse_sqrt, got 'step'"):
        tiny(schedule="step")
