"""The host's table of a solve: its numbers against quadrature rules and a small interpreter of linear combinations."""

import math
import types

import numpy as np
import pytest
import torch
from flows import Linear
from sampling_helpers import FIXED, lagrange_integral, network, noise64, schedule, solve, velocity_of

import fm_fast as fm
from fm_fast._solver import settings
from fm_fast._solver.plan import make_plan
from fm_fast.objectives import OBJECTIVES
from fm_fast.paths import NAMED as PATHS
from fm_fast.solvers import METHODS

NODES = np.array([0.1, 0.15, 0.3, 0.5, 0.55, 0.8, 0.9])
UPWARD_AND_DOWNWARD = pytest.mark.parametrize("nodes", [NODES, NODES[::-1]], ids=["up", "down"])


def plan_of(method, nodes=NODES, path="ot", objective="velocity"):
    return make_plan(METHODS[method], nodes, PATHS[path], OBJECTIVES[objective])


def interpret(plan, f, x):
    """Runs a plan literally: every lag counted back, every coefficient looked up."""
    outputs, number, stage_input = [], 0, x
    for segment in plan.segments:
        for row in range(segment.steps):
            for stage in segment.stages:
                output = f(stage_input, plan.times[number])
                if stage.velocity is not None:
                    output = stage.velocity[row, 0] * x + stage.velocity[row, 1] * output
                outputs.append(output)
                terms = [outputs[-1 - lag] for lag in stage.lags]
                stage_input = stage.coefficients[row, 0] * x + sum(c * k for c, k in zip(stage.coefficients[row, 1:], terms, strict=True))
                x = stage_input if stage.ends_step else x
                number += 1
    assert number == plan.evaluations
    return x


@UPWARD_AND_DOWNWARD
@pytest.mark.parametrize("method", FIXED)
@pytest.mark.parametrize(("path", "objective"), [("ot", "velocity"), ("vp", "noise"), ("cosine", "data"), ("ve", "score")])
def test_a_plan_is_the_solver_multiplied_out(path, objective, method, nodes):
    x0 = noise64(2, 3)
    found = interpret(plan_of(method, nodes, path, objective), network, x0)
    expected = solve(method, lambda x, t: velocity_of(path, objective, network(x, t), x, t), x0, nodes)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


@UPWARD_AND_DOWNWARD
@pytest.mark.parametrize("method", FIXED)
@pytest.mark.parametrize("path", ["ot", "vp"])
def test_weights_integrate_as_the_method_does(method, path, nodes):
    """The weights are those of the solver: the integral of a function of time is what the solver makes of dx/dt = g(t)."""
    plan = plan_of(method, nodes, path, "velocity" if path == "ot" else "noise")
    expected = solve(method, lambda x, t: torch.full_like(x, math.exp(2 * t) * math.cos(5 * t)), torch.zeros(1, dtype=torch.float64), nodes)
    assert plan.weights @ (np.exp(2 * plan.times) * np.cos(5 * plan.times)) == pytest.approx(float(expected), rel=1e-12)
    assert plan.weights.sum() == pytest.approx(nodes[-1] - nodes[0], rel=1e-12)


def test_midpoint_needs_one_divergence_a_step():
    assert (plan_of("midpoint").weights.reshape(-1, 2)[:, 0] == 0.0).all()
    assert np.count_nonzero(plan_of("midpoint").weights) == len(NODES) - 1
    np.testing.assert_allclose(plan_of("midpoint").weights.reshape(-1, 2)[:, 1], np.diff(NODES), rtol=1e-15)


def test_weights_of_a_multistep_method_add_up_over_the_steps_that_use_an_evaluation():
    plan = plan_of("ab2")
    expected = np.zeros(len(NODES) + 0)
    at_nodes = [0, *range(2, len(NODES))]
    expected[1] = NODES[1] - NODES[0]
    for step in range(1, len(NODES) - 1):
        for node, weight in zip((step - 1, step), lagrange_integral(NODES[step - 1 : step + 1], NODES[step], NODES[step + 1]), strict=True):
            expected[at_nodes[node]] += weight
    np.testing.assert_allclose(plan.weights, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("method", FIXED)
@pytest.mark.parametrize(("path", "objective"), [("ot", "data"), ("vp", "scoreflow"), ("cosine", "noise"), ("ve", "score")])
def test_factors_of_the_velocity(path, objective, method):
    plan = plan_of(method, NODES, path, objective)
    for number, t in enumerate(plan.times):
        a, s, da, ds = schedule(path, t)
        p, r = {
            "noise": (da / a, ds - da * s / a), "score": (da / a, -s * (ds - da * s / a)),
            "scoreflow": (da / a, -s * (ds - da * s / a)), "data": (ds / s, da - ds * a / s),
        }[objective]  # fmt: skip
        assert (plan.x_factors[number], plan.output_factors[number]) == pytest.approx((p, r), rel=1e-9)


@pytest.mark.parametrize(("method", "terms"), [("euler", [1]), ("midpoint", [1, 1]), ("rk4", [1, 1, 1, 4]), ("rk4_38", [1, 2, 3, 4])])
def test_no_update_reads_more_than_it_needs(method, terms):
    (segment,) = plan_of(method).segments
    assert [len(stage.lags) for stage in segment.stages] == terms
    assert [stage.ends_step for stage in segment.stages] == [False] * (len(terms) - 1) + [True]


def test_multistep_methods_settle_into_one_segment():
    plan = make_plan(METHODS["ab3"], np.arange(101) / 100, PATHS["ot"], OBJECTIVES["velocity"])
    assert [segment.steps for segment in plan.segments] == [2, 1, 1, 96]
    assert plan.segments[-1].stages[0].lags == (0, 1, 2) and plan.evaluations == 2 * 3 + 98


@pytest.mark.parametrize("method", FIXED)
def test_tables_are_what_the_op_reads(method):
    for segment in plan_of(method, path="vp", objective="noise").segments:
        for stage in segment.stages:
            assert stage.coefficients.dtype == np.float64 and stage.coefficients.flags.c_contiguous
            assert stage.coefficients.shape == (segment.steps, 1 + len(stage.lags))
            assert stage.velocity is None or (stage.velocity.shape == (segment.steps, 2) and stage.velocity.flags.c_contiguous)


@pytest.mark.parametrize("method", FIXED)
def test_places_name_step_and_stage(method):
    stages = {"euler": 1, "rk4": 4, "rk4_38": 4}.get(method, 2)
    expected = [(step, stage) for step in range(6) for stage in range(stages)]
    if method.startswith("ab"):
        starting, of = (1, 2) if method == "ab2" else (2, 3)
        expected = [(step, stage) for step in range(starting) for stage in range(of)] + [(step, 0) for step in range(starting, 6)]
    assert plan_of(method).places() == expected


def test_settings_of_plain_arguments_are_kept():
    def solve(**changes):
        before = settings._known_settings.cache_info()
        fm.sample(lambda x, t: x, torch.ones(2, 3), **{"method": "euler", "steps": 3, "path": fm.VP(), "t0": 0.25} | changes)
        after = settings._known_settings.cache_info()
        return after.hits - before.hits, after.misses - before.misses

    settings._known_settings.cache_clear()
    assert [solve(), solve(), solve(path=fm.VP(0.2, 15.0)), solve(steps=4), solve(t0=0)] == [(0, 1), (1, 0), (0, 1), (0, 1), (0, 1)]
    assert solve(path=Linear()) == solve(grid=[0.25, 1.0], steps=None) == solve(save=[0.5]) == (0, 0)


def test_kept_settings_let_nothing_through():
    """True equals 1 and has its hash; what was refused once is refused again."""
    fm.sample(lambda x, t: x, torch.ones(2, 3), method="euler", steps=1, churn=0)
    for _ in range(2):
        with pytest.raises(TypeError, match="steps must be a whole number, got bool"):
            fm.sample(lambda x, t: x, torch.ones(2, 3), method="euler", steps=True)
        with pytest.raises(TypeError, match="churn must be a number, got bool"):
            fm.sample(lambda x, t: x, torch.ones(2, 3), method="euler", steps=1, churn=False)


def test_plans_of_built_in_paths_are_kept_and_not_spoilt(monkeypatch):
    """A network may write into the times that it is given; a path of the user's own may have changed since."""
    made = []
    make = settings.make_plan
    monkeypatch.setattr(settings, "make_plan", lambda *arguments: (made.append(arguments), make(*arguments))[1])
    settings._known_plan.cache_clear()

    def writes(x, t):
        found = x * t[:, None]
        t.fill_(7.0)
        return found

    x = torch.ones(2, 3, dtype=torch.float64)
    results = [fm.sample(writes, x, path=path, method="midpoint", steps=3).x for path in ("ot", fm.OT(), fm.VP(), "ot", fm.VP())]
    assert len(made) == 2 and torch.equal(results[0], results[3])
    torch.testing.assert_close(results[0], fm.sample(lambda x, t: x * t[:, None], x, method="midpoint", steps=3).x, rtol=0, atol=0)
    assert len(made) == 2
    fm.sample(writes, x, path="vp", objective="noise", steps=3)
    fm.sample(writes, x, steps=4)
    assert len(made) == 4
    own = types.SimpleNamespace(**{name: getattr(fm.OT(), name) for name in ("alpha", "sigma", "d_alpha", "d_sigma")})
    fm.sample(writes, x, path=own, steps=4), fm.sample(writes, x, path=own, steps=4)
    assert len(made) == 6
