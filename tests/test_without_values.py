"""Tensors without values: on the meta device, and fake ones, by which tools work out shapes and memory."""

import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fm_fast as fm

NOTHING = {"fake": FakeTensorMode, "meta": lambda: torch.device("meta")}


@pytest.fixture(params=NOTHING)
def nothing(request):
    """A mode whose tensors have no values; a look at one's address is an error, as it will be in torch."""
    with warnings.catch_warnings(), NOTHING[request.param]():
        warnings.simplefilter("error")
        yield


def field(x, t):
    return x * t[:, None]


def test_a_step_of_training(nothing):
    """Memory estimators run one like this, without a compiler."""
    o = torch.zeros(4, 3, 8, 8, requires_grad=True)
    fm.sample_path(torch.zeros(4, 3, 8, 8), seed=1, step=2).loss(o).backward()
    assert o.grad.shape == (4, 3, 8, 8)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"method": "euler", "save": "steps"},
        {"method": "ab2"},
        {"method": "rk4", "churn": 0.5},
        {"path": "vp", "objective": "noise", "method": "rk4"},
        {"path": fm.VE(), "objective": "score", "t0": 0.1, "dtype": torch.bfloat16},
        {"grad": "direct"},
    ],
    ids=lambda settings: "-".join(map(str, settings)) or "midpoint",
)
@pytest.mark.parametrize("solve", [fm.sample, fm.encode])
def test_fixed_steps(nothing, solve, settings):
    if "churn" in settings and solve is fm.encode:
        settings = {"method": "rk4"}  # which has none
    found = solve(field, torch.empty(4, 2), steps=3, **settings)
    assert found.x.shape == (4, 2) and found.nfe >= 3
    if "save" in settings:
        assert found.saved.shape == (4, 4, 2) and found.saved_t[0] in (0.0, 1.0)


def test_guidance(nothing):
    given = {"cond": {"y": torch.empty(4, 2)}, "guidance": fm.Guidance(2.0, null={"y": torch.empty(2)}, interval=(0.2, 1.0))}
    assert fm.sample(lambda x, t, y: field(x, t) + y, torch.empty(4, 2), steps=3, **given).x.shape == (4, 2)


def test_a_likelihood(nothing):
    found = fm.log_likelihood(field, torch.empty(4, 2), steps=3, probes=2, seed=0, step=0)
    assert found.logp.shape == (4,) and found.x0.shape == (4, 2)


@pytest.mark.parametrize("per_sample", [False, True, "shrink"])
def test_adaptive_steps_need_values(nothing, per_sample):
    with pytest.raises(ValueError, match="method must be a fixed-step one for meta and fake tensors"):
        fm.sample(field, torch.empty(4, 2), method="dopri5", per_sample=per_sample)
    with pytest.raises(ValueError, match="method must be a fixed-step one for meta and fake tensors"):
        fm.log_likelihood(field, torch.empty(4, 2), method="dopri5", seed=0, step=0)


def test_plans_made_meanwhile_serve_real_tensors_later():
    settings = {"method": "euler", "steps": 7, "path": "vp", "objective": "velocity"}
    with FakeTensorMode():
        fm.sample(field, torch.empty(4, 2), **settings)
    expected = x = fm.noise((4, 2), seed=0, step=0)
    for n in range(7):
        expected = expected + (1 - 1e-5) / 7 * field(expected, torch.full((4,), n * (1 - 1e-5) / 7))
    torch.testing.assert_close(fm.sample(field, x, **settings).x, expected)
