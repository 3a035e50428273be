"""Where guidance begins or ends the velocity jumps: adaptive steps end there, and keep their accuracy at the price of an evaluation."""

import itertools
import math

import numpy as np
import pytest
import torch
from sampling_helpers import Counted, noise64, solve
from test_guidance import LABELS, conditional, mixed

import fm_fast as fm
from fm_fast.solvers import METHODS

X0 = noise64(3, 2, 4)
INTERVAL, SCALE = (0.3, 0.6), 6.0
GUIDANCE = fm.Guidance(SCALE, {"y": -1}, INTERVAL)
OPTIONS = {"cond": {"y": LABELS}, "rtol": 1e-7, "atol": 1e-7}
LOOSE = {"cond": {"y": LABELS}, "rtol": 1e-5, "atol": 1e-5}
PIECES = ((0.0, 0.3), (0.3, 0.6), (0.6, 1.0))
ACCURACY = {"dopri5": 1e-6, "tsit5": 1e-6, "dopri8": 1e-6, "bosh3": 1e-4, "adaptive_heun": 1e-3, "fehlberg2": 1e-2}  # by our tolerances


def piecewise(x, times, forward=True):
    """The states at times, by Runge-Kutta steps of which none has a jump within."""
    states = {}
    for begin, end in PIECES if forward else [(end, begin) for begin, end in PIECES[::-1]]:
        scale = SCALE if {begin, end} == set(INTERVAL) else 1.0
        inner = sorted((t for t in times if min(begin, end) < t < max(begin, end)), reverse=not forward)
        for t, stop in itertools.pairwise((begin, *inner, end)):
            x = solve("rk4", lambda x, t, scale=scale: mixed(x, t, scale), x, np.linspace(t, stop, 101))
            states[stop] = x
    return [states[t] for t in times]


def tolerances(method):
    return OPTIONS if ACCURACY[method] < 1e-5 else LOOSE


def close(found, expected, method="dopri5"):
    torch.testing.assert_close(found, expected, rtol=ACCURACY[method], atol=ACCURACY[method])


@pytest.mark.parametrize("per_sample", [False, True, "shrink"])
@pytest.mark.parametrize("method", ACCURACY)
def test_adaptive_solves_keep_their_accuracy(method, per_sample):
    found = fm.sample(conditional, X0, guidance=GUIDANCE, method=method, per_sample=per_sample, **tolerances(method))
    close(found.x, piecewise(X0, [1.0])[0], method)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("method", ["dopri5", "dopri8", "adaptive_heun"])
@pytest.mark.parametrize("solver", [fm.sample, fm.encode])
def test_states_on_the_way(solver, method, per_sample):
    """Also at the jumps, and close to them."""
    times = [0.1, 0.3, 0.3001, 0.45, 0.6, 0.8, 1.0]
    times = times if solver is fm.sample else [1.0 - t for t in (0.3, 0.4, 0.4001, 0.5, 0.7)]
    found = solver(conditional, X0, guidance=GUIDANCE, method=method, per_sample=per_sample, save=times, **tolerances(method))
    close(found.saved, torch.stack(piecewise(X0, times, forward=solver is fm.sample)), method)


def test_an_evaluation_a_jump():
    """Beside those of the pieces by themselves, which look for a first step each. None is on the wrong side."""
    model, nfe, x = Counted(conditional), 0, X0
    found = fm.sample(model, X0, guidance=GUIDANCE, method="dopri5", **OPTIONS)
    for begin, end in PIECES:
        inside = fm.Guidance(SCALE, {"y": -1}) if (begin, end) == INTERVAL else None
        piece = fm.sample(conditional, x, guidance=inside, method="dopri5", t0=begin, t1=end, **OPTIONS)
        x, nfe = piece.x, nfe + piece.nfe
    assert found.nfe == len(model.times) <= nfe
    guided = [batch == 6 for batch in model.batches]
    assert guided == [INTERVAL[0] < t < INTERVAL[1] for t in model.times] and any(guided)
    assert math.nextafter(0.3, 0.0) in model.times and math.nextafter(0.3, 1.0) in model.times


@pytest.mark.parametrize("solver", [fm.sample, fm.encode])
@pytest.mark.parametrize("scale", [SCALE, torch.tensor([3.0, 2.0, 1.5], dtype=torch.float64)], ids=["number", "each"])
def test_fixed_steps_that_end_at_jumps_keep_their_order(solver, scale):
    forward = solver is fm.sample
    expected = X0
    for begin, end in PIECES if forward else [piece[::-1] for piece in PIECES[::-1]]:
        factor = torch.as_tensor(scale).reshape(-1, 1, 1) if {begin, end} == set(INTERVAL) else 1.0
        expected = solve("rk4", lambda x, t, factor=factor: mixed(x, t, factor), expected, np.linspace(begin, end, 201))
    options = {"cond": {"y": LABELS}, "guidance": fm.Guidance(scale, {"y": -1}, INTERVAL), "method": "rk4", "save": INTERVAL}
    errors = [float((solver(conditional, X0, steps=steps, **options).x - expected).abs().max()) for steps in (10, 20)]
    assert errors[1] < errors[0] / 10 and errors[1] < 1e-3


@pytest.mark.parametrize("solver", [fm.sample, fm.encode])
@pytest.mark.parametrize("method", ["ab2", "ab3"])
def test_multistep_methods_start_anew_at_jumps(solver, method):
    forward, table = solver is fm.sample, METHODS[method]
    (expected,) = piecewise(X0, [1.0]) if forward else piecewise(X0, [0.0], forward=False)
    options = {"cond": {"y": LABELS}, "guidance": GUIDANCE, "method": method}
    found = [solver(conditional, X0, steps=steps, **options) for steps in (320, 640)]  # 0.3 and 0.6 are among their times
    errors = [float((end.x - expected).norm()) for end in found]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(table.order(), abs=0.25)
    assert found[0].nfe == 320 + len(PIECES) * (table.history - 1) * (table.start.stages - 1)


@pytest.mark.parametrize("method", ["ab2", "ab3", "midpoint"])
def test_the_error_of_a_guided_likelihood(method):
    """v = y x cos t: x grows by exp(A), and the divergence's integral is A."""
    options = {"cond": {"y": torch.ones(1).double()}, "method": method, "kind": "exact", "error_estimate": True}
    field = lambda x, t, y: y[:, None] * x * torch.cos(t)[:, None]  # noqa: E731
    guidance = fm.Guidance(3.0, {"y": 0.0}, (0.25, 0.5))
    growth = math.sin(1.0) + 2.0 * (math.sin(0.5) - math.sin(0.25))
    exact = -0.5 * math.exp(-2.0 * growth) - 0.5 * math.log(2.0 * math.pi) - growth
    found = fm.log_likelihood(field, torch.ones(1, 1).double(), guidance=guidance, steps=320, **options)
    assert float(found.disc_err) == pytest.approx(abs(float(found.logp) - exact), rel=0.1)


@pytest.mark.parametrize("interval", [(0.26, 0.5), (0.25, 0.51), (0.0, 0.525), (0.275, 1.0)])
def test_an_error_estimate_needs_whole_coarse_steps_on_each_side_of_a_jump(interval):
    """Both solves would guide the same steps as a whole, and none see what that costs."""
    options = {"cond": {"y": LABELS}, "kind": "exact", "method": "rk4", "error_estimate": True}
    with pytest.raises(ValueError, match=r"guidance.interval must begin and end where every second step does for error_estimate"):
        fm.log_likelihood(conditional, X0, steps=40, guidance=fm.Guidance(2.0, {"y": -1}, interval), **options)
    grid = np.unique([np.linspace(*piece, 21) for piece in itertools.pairwise(sorted({0.0, 1.0, *interval}))])
    assert fm.log_likelihood(conditional, X0, grid=grid, guidance=fm.Guidance(2.0, {"y": -1}, interval), **options).disc_err is not None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("objective", ["velocity", "noise", "data", "score"])
@pytest.mark.parametrize("path", ["ot", "vp", "ve", "cosine"])
def test_an_error_estimate_takes_grids_that_stay_inside_of_the_ends(path, objective):
    """Whose nodes are off by up to 1e-5: 0.2 is not among them to the last digit, nor is a float32 0.8 among any."""
    guidance = fm.Guidance(1.5, {"y": -1}, (0.2, float(np.float32(0.8))))
    options = {"cond": {"y": LABELS}, "guidance": guidance, "path": path, "objective": objective, "kind": "exact", "on_nonfinite": "mark"}
    assert fm.log_likelihood(conditional, X0, steps=20, error_estimate=True, **options).disc_err is not None


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("method", ["dopri5", "bosh3"])
@pytest.mark.parametrize("solver", [fm.sample, fm.encode])
@pytest.mark.parametrize(("interval", "times"), [((0.0, 0.4), (0.4, 1.0)), ((0.4, 1.0), (0.0, 0.4)), ((0.4, 0.4), (0.4, 1.0))])
def test_a_solve_that_only_touches_the_interval_is_not_guided(interval, times, solver, method, per_sample):
    """A slope of the other side at the very end is no part of it."""
    options = {"method": method, "per_sample": per_sample, "t0": times[0], "t1": times[1], **OPTIONS}
    guided = solver(conditional, X0, guidance=fm.Guidance(8.0, {"y": -1}, interval), **options)
    alone = solver(conditional, X0, **options)
    assert torch.equal(guided.x, alone.x) and guided.nfe == alone.nfe


def test_a_sample_is_the_same_alone_and_in_a_batch():
    model, y = lambda x, t, y: x * y[:, None] * torch.cos(t)[:, None], torch.tensor([1.0, 2.0])
    options = {"guidance": fm.Guidance(2.0, {"y": -1}, (0.4, 0.8)), "method": "dopri5", "per_sample": True}
    x = torch.tensor([[1.0], [0.3]])
    together = fm.sample(model, x, cond={"y": y}, **options).x
    assert all(torch.equal(fm.sample(model, x[i : i + 1], cond={"y": y[i : i + 1]}, **options).x[0], together[i]) for i in range(2))


def test_an_interval_without_an_inner_end_changes_nothing():
    found = [
        fm.sample(conditional, X0, guidance=fm.Guidance(SCALE, {"y": -1}, interval), method="dopri5", t0=0.3, t1=0.6, **OPTIONS)
        for interval in ((0.0, 1.0), (0.3, 0.6), (0.3, 1.0))
    ]
    assert torch.equal(found[0].x, found[1].x) and torch.equal(found[0].x, found[2].x)
    assert found[0].nfe == found[1].nfe == found[2].nfe


@pytest.mark.parametrize("per_sample", [False, True])
def test_gradients(per_sample):
    """Of the state at the end, in the noise."""
    options = {"guidance": GUIDANCE, "method": "dopri5", "per_sample": per_sample, "grad": "direct", **OPTIONS}
    noise = X0.clone().requires_grad_()
    (found,) = torch.autograd.grad(fm.sample(conditional, noise, **options).x.sum(), noise)
    (expected,) = torch.autograd.grad(piecewise(noise, [1.0])[0].sum(), noise)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("per_sample", [False, True])
def test_likelihoods(per_sample):
    """Against fixed steps that end beside the jumps."""
    below, above = math.nextafter(0.3, 0.0), math.nextafter(0.6, 1.0)
    grid = np.concatenate([np.linspace(0.0, below, 81), np.linspace(0.3, 0.6, 81), np.linspace(above, 1.0, 81)])
    options = {"cond": {"y": LABELS}, "guidance": GUIDANCE, "kind": "exact", "seed": 0}
    expected = fm.log_likelihood(conditional, X0, method="rk4", grid=grid, **options)
    found = fm.log_likelihood(conditional, X0, method="dopri5", per_sample=per_sample, rtol=1e-7, atol=1e-7, **options)
    torch.testing.assert_close(found.logp, expected.logp, rtol=1e-6, atol=2e-5)


def test_both_ends_of_the_interval_are_guided_at_times_of_each_sample():
    """div of y x is 2 y in the plane, guided by 2.5 against 0: 5 y."""
    x, y = noise64(5, 2), torch.arange(1.0, 6.0, dtype=torch.float64)[:, None]
    times = torch.tensor([0.2, 0.25, 0.5, 0.75, 0.8], dtype=torch.float64)
    found = fm.divergence(lambda x, t, y: x * y, x, times, cond={"y": y}, guidance=fm.Guidance(2.5, {"y": 0.0}, (0.25, 0.75)), kind="exact")
    torch.testing.assert_close(found.div, torch.tensor([2.0, 10.0, 15.0, 20.0, 10.0], dtype=torch.float64))


def test_an_interval_that_ends_with_the_solve_costs_no_evaluation():
    counted = {}
    for end in (1.0, 0.99):
        model = Counted(conditional)
        fm.sample(model, X0, method="dopri5", per_sample=True, guidance=fm.Guidance(2.5, {"y": -1}, (0.25, end)), **LOOSE)
        counted[end] = len(model.times)
    assert counted[1.0] <= counted[0.99]
