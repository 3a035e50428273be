"""convert: every prediction as every other, against the noise and data that the point was made of."""

import warnings

import numpy as np
import oracle
import pytest
import torch

import fm_fast as fm
from fm_fast.conversions import PREDICTIONS
from fm_fast.objectives import OBJECTIVES as BUILT_IN
from fm_fast.objectives import Objective

PATHS = {"ot": fm.OT(sigma_min=0.1), "ot exact": "ot", "vp": "vp", "ve": fm.VE(sigma_max=10.0), "cosine": "cosine"}
TIMES = torch.tensor([0.05, 0.3, 0.8, 0.97], dtype=torch.float64)


def ends(dtype=torch.float64):
    return [fm.noise((4, 3, 5), seed=9, step=step, dtype=dtype) for step in range(2)]


def meanings(path, t):
    """(x, what each prediction is there) of the ends, by the definitions, float64; t [B]."""
    (x1, x0), path = ends(), fm.paths.as_path(path)
    functions = (path.alpha, path.sigma, path.d_alpha, path.d_sigma)
    a, s, da, ds = (torch.as_tensor(f(t), dtype=torch.float64).expand(len(t))[:, None, None] for f in functions)
    exact = {"velocity": da * x1 + ds * x0, "noise": x0, "score": -x0 / s, "scoreflow": -x0 / s, "data": x1}
    return a * x1 + s * x0, exact


@pytest.mark.parametrize("to", PREDICTIONS)
@pytest.mark.parametrize("objective", BUILT_IN)
@pytest.mark.parametrize("path", PATHS)
def test_every_prediction_gives_every_other(path, objective, to):
    x, exact = meanings(PATHS[path], TIMES)
    found = fm.convert(exact[objective], x, TIMES, path=PATHS[path], objective=objective, to=to)
    torch.testing.assert_close(found, exact[to], rtol=1e-9, atol=1e-8)
    single = fm.convert(exact[objective][2:3], x[2:3], 0.8, path=PATHS[path], objective=objective, to=to)
    torch.testing.assert_close(single, exact[to][2:3], rtol=1e-9, atol=1e-8)


def test_the_oracles_schedule_agrees():
    """The schedules of the tests above are fm_fast's own; these are written down a second time."""
    for path in ("vp", "cosine"):
        a, s, da, ds = (values[:, None, None] for values in oracle.schedule(path, TIMES.numpy()))
        (x1, x0), (x, exact) = (end.numpy() for end in ends()), meanings(path, TIMES)
        np.testing.assert_allclose(x, a * x1 + s * x0, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(exact["velocity"], da * x1 + ds * x0, rtol=1e-9, atol=1e-9)


def test_the_naive_formula_of_the_docstring():
    x1, x0 = ends(torch.float32)
    t = TIMES.float()
    column = t[:, None, None]
    x = column * x1 + (1 - column) * x0
    torch.testing.assert_close(fm.convert(x1 - x0, x, t, to="data"), x + (1 - column) * (x1 - x0))


@pytest.mark.filterwarnings("ignore:t is outside")
@pytest.mark.parametrize("to", PREDICTIONS)
@pytest.mark.parametrize("objective", BUILT_IN)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("t", [0.0, 1.0])
def test_the_ends_are_finite(path, objective, to, t):
    x1, x0 = ends(torch.float32)
    assert fm.convert(x0, x1, t, path=PATHS[path], objective=objective, to=to).isfinite().all()


@pytest.mark.parametrize(
    ("objective", "to", "t", "expected"),
    [
        ("velocity", "data", 1.0, (1.0, 0.0)),
        ("velocity", "data", 0.0, (1.0, 1.0)),
        ("velocity", "noise", 0.0, (1.0, 0.0)),
        ("velocity", "noise", 1.0, (1.0, -1.0)),
        ("noise", "data", 1.0, (1.0, 0.0)),
        ("data", "noise", 0.0, (1.0, 0.0)),
        ("data", "velocity", 0.0, (-1.0, 1.0)),
        ("noise", "velocity", 1.0, (1.0, -1.0)),
    ],
)
def test_ends_without_a_division_are_exact(objective, to, t, expected):
    """On the OT path x = x0 at t = 0 and x1 at t = 1, and the velocity is x1 - x0; expected: the factors of x and of the output."""
    x, output = ends()
    found = fm.convert(output, x, t, objective=objective, to=to)
    torch.testing.assert_close(found, expected[0] * x + expected[1] * output, rtol=1e-15, atol=1e-15)


# Of the OT path: the conversions that multiply the output by a huge number at an end
HUGE = {
    0.0: {(objective, to) for objective in ("noise", "score", "scoreflow") for to in ("velocity", "data")},
    1.0: {("data", "velocity"), ("data", "noise"), ("data", "score"), ("velocity", "score"), ("noise", "score")},
}


@pytest.mark.parametrize("to", PREDICTIONS)
@pytest.mark.parametrize("objective", BUILT_IN)
@pytest.mark.parametrize("t", [0.0, 1.0])
def test_a_time_at_which_the_output_is_another_than_that_of_the_limit_is_told(objective, to, t):
    x1, x0 = ends()
    inside = min(max(t, 1e-5), 1.0 - 1e-5)
    for given in (t, torch.tensor(t), torch.full((len(x1),), t)):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            fm.convert(x0, x1, given, objective=objective, to=to)
            fm.convert(x0, x1, inside, objective=objective, to=to)
        messages = [str(warning.message) for warning in found]
        assert len(messages) == ((objective, to) in HUGE[t]) and all("call the network, too, with t kept inside" in m for m in messages)


class Smooth:
    """A path of one's own that stands still at both ends."""

    def alpha(self, t):
        return t * t * (3 - 2 * t)

    def sigma(self, t):
        return 1 - self.alpha(t)

    def d_alpha(self, t):
        return 6 * t * (1 - t)

    def d_sigma(self, t):
        return -6 * t * (1 - t)


@pytest.mark.filterwarnings("ignore:t is outside")
@pytest.mark.parametrize("t", [0.0, 1.0])
@pytest.mark.parametrize("objective", BUILT_IN)
def test_ends_where_the_path_stands_still(objective, t):
    x1, x0 = ends()
    for to in PREDICTIONS:
        found = fm.convert(x0, x1, t, path=Smooth(), objective=objective, to=to)
        assert found.isfinite().all()
        if objective == to:
            torch.testing.assert_close(found, x0, rtol=1e-6, atol=1e-6)
    noise = fm.convert(x0, x1, torch.tensor([0.5, 1.0, 0.5, 1.0]), path=Smooth(), objective="score", to="noise")
    torch.testing.assert_close(noise, -x0 * torch.tensor([0.5, 0.0, 0.5, 0.0], dtype=x0.dtype)[:, None, None], rtol=1e-9, atol=1e-8)


def test_dtypes_gradients_and_transforms():
    x1, x0 = ends(torch.float32)
    assert fm.convert(x0.bfloat16(), x1.bfloat16(), 0.5, to="noise").dtype == torch.bfloat16
    assert fm.convert(x0.double(), x1, 0.5, to="noise").dtype == torch.float32
    output, x = x0.clone().requires_grad_(), x1.clone().requires_grad_()
    gradients = torch.autograd.grad(fm.convert(output, x, 0.25, to="data").sum(), [output, x])
    torch.testing.assert_close(gradients, (torch.full_like(x, 0.75), torch.ones_like(x)))
    each = torch.func.vmap(lambda o, x, t: fm.convert(o[None], x[None], t, path="vp", to="score")[0])(x0, x1, TIMES)
    expected = fm.convert(x0, x1, TIMES, path="vp", to="score")
    torch.testing.assert_close(each, expected)
    compiled = torch.compile(lambda o, x, t: fm.convert(o, x, t, path="vp", to="score"), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x0, x1, TIMES), expected)


class Learned(torch.nn.Module):
    """From noise of a width to be learned."""

    def __init__(self):
        super().__init__()
        self.width = torch.nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def alpha(self, t):
        return t

    def sigma(self, t):
        return self.width * (1 - t)

    def d_alpha(self, t):
        return torch.ones_like(t)

    def d_sigma(self, t):
        return -self.width * torch.ones_like(t)


def test_gradients_of_the_time_and_of_a_paths_own_parameters():
    """The data are x + (1 - t) v whatever the width of the noise, and the score (t v - x) / ((1 - t) width^2)."""
    v, x = ends()
    t, path = TIMES.clone().requires_grad_(), Learned()
    (slope,) = torch.autograd.grad(fm.convert(v, x, t, to="data", path=path).sum(), t)
    torch.testing.assert_close(slope, -v.sum((1, 2)))
    (slope,) = torch.autograd.grad(fm.convert(v, x, 0.5, to="score", path=path).sum(), path.width)
    torch.testing.assert_close(slope, -2.0 * ((0.5 * v - x) / 0.5 / 2.0**3).sum())


def test_an_objective_of_ones_own():
    """Twice the noise."""
    mine = Objective(
        "mine", BUILT_IN["noise"].target, lambda p: (p.da / p.a, 0.5 * (p.ds - p.da * p.s / p.a)), velocity_divides_by_alpha=True
    )
    x, exact = meanings("cosine", TIMES)
    torch.testing.assert_close(fm.convert(2.0 * exact["noise"], x, TIMES, path="cosine", objective=mine, to="data"), exact["data"])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"output": torch.zeros(4, 2)}, ValueError, r"output must have the shape of x, \(4, 3\), got \(4, 2\)"),
        ({"output": torch.zeros(4, 3, dtype=torch.int64)}, TypeError, r"output must be float64, .*, got torch.int64"),
        ({"x": torch.zeros(())}, ValueError, r"x must have a batch dimension \[B, ...\], got a scalar"),
        ({"t": 1.5}, ValueError, r"t must lie in \[0, 1\], got 1.5"),
        ({"t": torch.zeros(3)}, ValueError, r"t must be a number, a scalar tensor or have shape \[4\], got \(3,\)"),
        ({"to": "scoreflow"}, ValueError, r"to must be one of velocity, noise, score, data, got 'scoreflow'"),
        ({"path": "linear"}, ValueError, r"path must be one of"),
        ({"objective": "x1"}, ValueError, r"objective must be one of"),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = {"output": torch.zeros(4, 3), "x": torch.zeros(4, 3), "t": 0.5, "to": "data", **change}
    with pytest.raises(error, match=message):
        fm.convert(arguments.pop("output"), arguments.pop("x"), arguments.pop("t"), **arguments)
