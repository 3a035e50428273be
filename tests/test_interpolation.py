"""States within the steps of adaptive methods, which cost no evaluation of their own."""

import dataclasses
import itertools
import math
from functools import cache

import numpy as np
import pytest
import torch
import torchdiffeq
from sampling_helpers import network, noise64, solve
from test_embedded import POINTS, curved, rough

import fm_fast as fm
from fm_fast.solvers import ADAPTIVE, BOSH3, DOPRI5, METHODS, EmbeddedRungeKutta

X0 = noise64(3, 2, 4)
TIMES = [0.03, 0.11, 0.25, 0.5, 0.501, 0.77, 0.9]
INTERPOLATING = [name for name in ADAPTIVE if name != "dopri8"]
# The order up to which the weights within a step satisfy Butcher's conditions.
ORDERS = {"dopri5": 4, "tsit5": 4, "bosh3": 3, "fehlberg2": 2, "adaptive_heun": 2}


def conditions(a, c, w, theta):
    """What w must satisfy for the order of each: the integrals of the elementary differentials over part theta of a step."""
    ac = a @ c
    return [
        (1, w.sum() - theta),
        (2, w @ c - theta**2 / 2),
        (3, w @ c**2 - theta**3 / 3),
        (3, w @ ac - theta**3 / 6),
        (4, w @ c**3 - theta**4 / 4),
        (4, (w * c) @ ac - theta**4 / 8),
        (4, w @ a @ c**2 - theta**4 / 12),
        (4, w @ a @ ac - theta**4 / 24),
    ]


@pytest.mark.parametrize("theta", [0.0, 0.1, 0.5, 0.83, 1.0])
@pytest.mark.parametrize("name", INTERPOLATING)
def test_the_conditions_of_order(name, theta):
    method = ADAPTIVE[name]
    w, c = np.array(method.weights_within(theta)), np.array(method.table.c)
    for order, found in conditions(method.table.matrix(), c, w, theta):
        assert order > ORDERS[name] or abs(found) < 1e-13
    if theta == 1.0:
        np.testing.assert_allclose(w, method.table.b, atol=1e-13)


@cache
def exact(direction):
    """The states at TIMES, by short steps of RK4 from each to the next."""
    state, found, times = POINTS, {}, [0.0, *TIMES] if direction == "sample" else [1.0, *reversed(TIMES)]
    for begin, end in itertools.pairwise(times):
        state = found[end] = solve("rk4", curved, state, np.linspace(begin, end, 201))
    return torch.stack([found[time] for time in TIMES])


@pytest.mark.parametrize("grad", ["none", "direct"])
@pytest.mark.parametrize("name", ADAPTIVE)
@pytest.mark.parametrize("direction", ["sample", "encode"])
def test_states_within_steps(direction, name, grad, backend):
    tolerance = 1e-5 if ADAPTIVE[name].order == 2 else 1e-7
    found = getattr(fm, direction)(curved, POINTS, method=name, rtol=tolerance, atol=tolerance, save=TIMES, grad=grad, backend=backend)
    error = 1000 * tolerance if name == "fehlberg2" else 50 * tolerance  # its estimate is a two hundredth of Euler's
    torch.testing.assert_close(found.saved, exact(direction), rtol=error, atol=error)


@pytest.mark.parametrize("name", INTERPOLATING)
@pytest.mark.parametrize("field", [network, rough])
@pytest.mark.parametrize("direction", ["sample", "encode"])
def test_saving_changes_neither_the_end_nor_the_evaluations(direction, field, name, backend):
    arguments = {"method": name, "rtol": 1e-4, "atol": 1e-4, "backend": backend}
    plain = getattr(fm, direction)(field, X0, **arguments)
    saving = getattr(fm, direction)(field, X0, save=[0.0, *TIMES, 1.0], **arguments)
    assert saving.nfe == plain.nfe and torch.equal(saving.x, plain.x)
    ends = (saving.saved[0], saving.saved[-1])
    start, end = ends if direction == "sample" else reversed(ends)
    assert torch.equal(start, X0) and torch.equal(end, plain.x)


def test_the_states_of_torchdiffeq():
    """Its polynomial within a step of dopri5 is another one of the same order, and its last step goes beyond the end."""
    times = torch.tensor([0.0, *TIMES, 1.0], dtype=torch.float64)
    expected = torchdiffeq.odeint(lambda t, x: network(x, t.expand(3)), X0, times, rtol=1e-6, atol=1e-6, method="dopri5")
    found = fm.sample(network, X0, method="dopri5", rtol=1e-6, atol=1e-6, save=times)
    torch.testing.assert_close(found.saved, expected, rtol=1e-5, atol=1e-5)


def test_gradients_through_states_within_a_step():
    start, same = X0.clone().requires_grad_(), X0.clone().requires_grad_()
    found = fm.sample(network, start, method="dopri5", rtol=1e-9, atol=1e-9, save=[0.6], grad="direct")
    assert found.nfe < 1000
    expected = solve("rk4", network, same, np.linspace(0.0, 0.6, 201))
    found.saved.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(start.grad, same.grad, rtol=1e-6, atol=1e-6)


def test_the_state_is_wide_within_a_step():
    found = fm.sample(lambda x, t: -x, X0.to(torch.bfloat16), method="dopri5", rtol=1e-6, atol=1e-6, save=[0.3])
    assert found.saved.dtype == torch.float32
    torch.testing.assert_close(found.saved[0], math.exp(-0.3) * X0.to(torch.bfloat16).float(), rtol=0.02, atol=0.02)


# Methods that do not interpolate


def test_a_step_is_split_where_the_method_does_not_interpolate():
    split = dataclasses.replace(DOPRI5, dense=())
    assert not split.interpolates and not ADAPTIVE["dopri8"].interpolates and BOSH3.interpolates
    plain = fm.sample(network, X0, method=split, rtol=1e-8, atol=1e-8)
    saving = fm.sample(network, X0, method=split, rtol=1e-8, atol=1e-8, save=[0.5 + 1e-7, 0.5 + 2e-7])
    assert plain.nfe <= saving.nfe <= plain.nfe + 4 * 6, "the steps behind a saved time are not shortened"
    torch.testing.assert_close(saving.saved[0], saving.saved[1], rtol=1e-5, atol=1e-6)


def test_weights_within_a_step_have_an_order():
    """Which is computed, as a table's is: three times the right ones sum to 0 as well."""
    wrong = tuple(3.0 * weight for weight in DOPRI5.dense)
    with pytest.raises(ValueError, match="dense must give states of order 4 within a step, got order 3"):
        dataclasses.replace(DOPRI5, dense=wrong)
    assert dataclasses.replace(DOPRI5, dense=DOPRI5.dense) == DOPRI5


@pytest.mark.parametrize("dense", [(1.0, -1.0), (0.0,) * 6 + (1.0,), (math.nan,) * 7])
def test_wrong_weights_within_a_step(dense):
    with pytest.raises(ValueError, match="dense must hold 7 weights that sum to 0"):
        dataclasses.replace(DOPRI5, dense=dense)


def test_weights_within_a_step_need_a_slope_at_its_end():
    with pytest.raises(
        ValueError, match=r"dense must hold 2 weights that sum to 0, of a method with a stage at the end, got \(1.0, -1.0\)"
    ):
        EmbeddedRungeKutta(METHODS["heun2"], (0.5, -0.5), 2, dense=(1.0, -1.0))
