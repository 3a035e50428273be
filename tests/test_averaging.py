"""The decays of averages and what they refuse."""

import math

import pytest

from fm_fast.train.optimiser.averaging import fixed_decay, gamma_of_width, power_function, power_function_of_width, warmed_up_decay


def test_decays():
    assert [fixed_decay(0.9).decay(n) for n in (0, 100)] == [0.9, 0.9]
    assert [warmed_up_decay(0.9).decay(n) for n in (0, 8, 1000)] == [1 / 10, 9 / 18, 0.9]
    assert [power_function(1.0).decay(n) for n in (0, 1, 9)] == [0.0, 0.25, pytest.approx(0.81)]


@pytest.mark.parametrize("width", [0.01, 0.05, 0.1, 0.25, 12**-0.5])
def test_the_width_of_the_power_function_is_its_standard_deviation(width):
    """Of the shares that it gives to 20,000 steps, as a share of the run."""
    averaging, steps = power_function_of_width(width), 20_000
    shares, kept = [0.0] * steps, 1.0
    for n in reversed(range(steps)):
        shares[n] = kept * (1.0 - averaging.decay(n))
        kept *= averaging.decay(n)
    assert sum(shares) == pytest.approx(1.0, abs=1e-9)
    mean = sum(share * n for n, share in enumerate(shares)) / steps
    variance = sum(share * (n / steps - mean) ** 2 for n, share in enumerate(shares))
    assert math.sqrt(variance) == pytest.approx(width, rel=1e-3)


def test_the_exponents_of_karras_et_al():
    assert gamma_of_width(0.05) == pytest.approx(16.97, abs=0.005) and gamma_of_width(0.10) == pytest.approx(6.94, abs=0.005)


@pytest.mark.parametrize(
    ("make", "value", "message"),
    [
        (fixed_decay, 1.5, "decay: expected a number in"),
        (warmed_up_decay, -0.1, "decay: expected a number in"),
        (power_function, -1.0, "gamma: expected more than -1"),
        (power_function_of_width, 0.3, "width: expected more than 0 and at most 0.2887"),
        (power_function_of_width, 0.0, "width: expected more than 0"),
        (fixed_decay, "0.9", "decay: expected a number in .* got '0.9'"),
        (power_function, None, "gamma: expected more than -1, got None"),
        (power_function_of_width, [0.1], "width: expected more than 0"),
    ],
)
def test_wrong_averages(make, value, message):
    with pytest.raises(ValueError, match=message):
        make(value)


def test_a_decay_of_one_stays_one():
    assert fixed_decay(1.0).decay(5) == 1.0 and fixed_decay(0.0).decay(5) == 0.0
