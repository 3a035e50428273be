"""odeint's options and odeint_adjoint's arguments, as torchdiffeq takes them: followed, without effect and said so, or refused."""

import math
import warnings

import pytest
import torch
import torchdiffeq

from fm_fast.compat.torchdiffeq import odeint, odeint_adjoint

Y0 = torch.linspace(-1.0, 1.0, 12, dtype=torch.float64).reshape(3, 4)
TIMES = torch.tensor([0.5, 0.9, 1.1, 2.0, 2.5], dtype=torch.float64)
ENDS = torch.tensor([0.0, 1.0], dtype=torch.float64)
ADAPTIVE = {"method": "dopri5", "rtol": 1e-6, "atol": 1e-6}


def pull(t, y):
    return torch.sin(3.0 * y) * (1.0 + t) - y


def solved(by, **arguments):
    """(states, the evaluations' times, warnings)."""
    seen, given = [], {"y0": Y0, "t": TIMES, **arguments}

    def func(t, y):
        seen.append(float(t))
        return pull(t, y)

    with warnings.catch_warnings(record=True) as told, torch.no_grad():
        warnings.simplefilter("always")
        states = by(func, given.pop("y0"), given.pop("t"), **given)
    return states, seen, told


# Options without effect

FIXED_STEPS = {"step_size": 0.1, "grid_constructor": lambda func, y0, t: t, "interp": "cubic", "perturb": True}
TUNING = {"first_step": 0.01, "min_step": 1e-6, "safety": 0.8, "ifactor": 5.0, "dfactor": 0.3, "dtype": torch.float32}
OTHERS = {"max_num_steps": 5, "max_step": 0.1, "step_t": torch.ones(1), "jump_t": torch.ones(1)}


@pytest.mark.parametrize("name", FIXED_STEPS)
def test_options_of_fixed_steps_with_an_adaptive_method(name):
    """torchdiffeq looks at none of them and warns."""
    for by in (odeint, torchdiffeq.odeint):
        plain, _, _ = solved(by, **ADAPTIVE)
        states, _, told = solved(by, **ADAPTIVE, options={name: FIXED_STEPS[name]})
        assert torch.equal(states, plain) and [warning.category for warning in told] == [UserWarning] and name in str(told[0].message)


@pytest.mark.parametrize("name", [*TUNING, *OTHERS])
def test_options_of_adaptive_methods_with_fixed_steps(name):
    """torchdiffeq looks at none of them and warns."""
    for by in (odeint, torchdiffeq.odeint):
        plain, _, _ = solved(by, method="rk4")
        states, _, told = solved(by, method="rk4", options={name: {**TUNING, **OTHERS}[name]})
        assert torch.equal(states, plain) and [warning.category for warning in told] == [UserWarning] and name in str(told[0].message)


@pytest.mark.parametrize("name", TUNING)
def test_options_that_tune_the_choice_of_steps(name):
    """Followed by torchdiffeq; either way the result is as exact as the tolerances say."""
    plain, _, _ = solved(odeint, **ADAPTIVE)
    states, _, told = solved(odeint, **ADAPTIVE, options={name: TUNING[name]})
    expected, _, _ = solved(torchdiffeq.odeint, **ADAPTIVE, options={name: TUNING[name]})
    exact, _, _ = solved(odeint, method="dopri8", rtol=1e-11, atol=1e-11)
    assert torch.equal(states, plain) and len(told) == 1
    assert str(told[0].message) == f"options without effect on the method 'dopri5', whose steps follow rtol and atol alone: {name}"
    assert told[0].filename == __file__
    torch.testing.assert_close(states, exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-4)


def test_states_within_a_step_are_not_interpolated():
    arguments = {"method": "midpoint", "t": TIMES}
    plain, _, _ = solved(odeint, **arguments, options={"step_size": 0.1, "interp": "linear"})
    states, _, told = solved(odeint, **arguments, options={"step_size": 0.1, "interp": "cubic"})
    assert torch.equal(states, plain) and len(told) == 1
    assert "steps are given by t, step_size or grid_constructor, and split at every time of t: interp" in str(told[0].message)


DEFAULTS = {
    "dopri5": [{"first_step": None, "min_step": 0.0, "safety": 0.9}, {"dtype": torch.float64, "max_step": math.inf, "jump_t": None}],
    "rk4": [{"interp": "linear", "perturb": False, "grid_constructor": None, "step_size": None}, {"norm": torch.max}],
}


@pytest.mark.parametrize(("method", "options"), [(method, options) for method in DEFAULTS for options in DEFAULTS[method]])
def test_defaults_are_no_options(method, options):
    states, _, told = solved(odeint, method=method, options=options)
    assert not told and torch.equal(states, solved(odeint, method=method)[0])


# Options that are followed


@pytest.mark.parametrize("method", ["euler", "midpoint", "rk4"])
@pytest.mark.parametrize("backwards", [False, True])
def test_a_grid_of_ones_own(backwards, method):
    """Through all times, so that torchdiffeq does not interpolate."""
    times = TIMES.flip(0) if backwards else TIMES

    def constructor(func, y0, t):
        halves = 0.5 * (t[1:] + t[:-1])
        return torch.stack([t, torch.cat([halves, halves[-1:]])], 1).flatten()[:-1]

    options = {"grid_constructor": constructor}
    states, seen, told = solved(odeint, t=times, method=method, options=options)
    expected, others, _ = solved(torchdiffeq.odeint, t=times, method=method, options=options)
    torch.testing.assert_close(states, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(seen, others, rtol=1e-12, atol=1e-12)
    assert not told


def test_a_grid_is_made_of_what_was_given_and_split_at_every_time():
    given = []

    def constructor(func, y0, t):
        given.append((func(t[0], y0), y0, t))
        return torch.tensor([0.0, 0.4, 0.8, 1.0])

    times = torch.tensor([0.0, 0.25, 1.0])
    found = odeint(lambda t, y: 2.0 * t.expand(1), torch.zeros(1), times, method="midpoint", options={"grid_constructor": constructor})
    torch.testing.assert_close(found[:, 0], torch.tensor([0.0, 0.0625, 1.0]))
    assert len(given) == 1 and torch.equal(given[0][0], torch.zeros(1)) and given[0][2] is times


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_node_that_rounding_moved_off_a_time_is_that_time(dtype):
    times, grid = torch.linspace(0.0, 1.0, 11, dtype=dtype), torch.linspace(0.0, 1.0, 101, dtype=torch.float64)
    _, seen, _ = solved(odeint, t=times, method="euler", options={"grid_constructor": lambda func, y0, t: grid})
    assert len(seen) == 100


def test_a_grid_of_parts_and_of_an_adjoint():
    options = {"grid_constructor": lambda func, y0, t: torch.linspace(0.0, 1.0, 9, dtype=torch.float64)}
    whole = odeint(pull, Y0, ENDS, method="rk4", options=options)
    assert torch.equal(odeint_adjoint(pull, Y0, ENDS, method="rk4", options=options), whole)
    parts = odeint(lambda t, y: (pull(t, y[0]), y[1]), (Y0, Y0[0]), ENDS, method="rk4", options=options)
    torch.testing.assert_close(parts[0], whole)
    assert odeint(pull, Y0, ENDS[:1], method="rk4", options=options).shape == (1, 3, 4)


def test_the_last_step_ends_at_the_last_time():
    """torchdiffeq's goes beyond it and is interpolated: no fewer evaluations, and more often than not a larger error."""
    errors = []
    for method in ("dopri5", "bosh3"):
        for tolerance in (1e-3, 1e-5):
            for times in (ENDS, TIMES, TIMES.flip(0)):
                arguments = {"t": times, "method": method, "rtol": tolerance, "atol": tolerance}
                exact, _, _ = solved(odeint, t=times, method="dopri8", rtol=1e-12, atol=1e-12)
                (states, seen, _), (expected, others, _) = solved(odeint, **arguments), solved(torchdiffeq.odeint, **arguments)
                low, high = sorted((float(times[0]), float(times[-1])))
                assert low == min(seen) and high == max(seen)
                assert min(others) < low or max(others) > high
                assert len(seen) <= len(others)
                errors.append([float((end[-1] - exact[-1]).abs().max()) for end in (states, expected)])
    ratios = sorted(theirs / ours for ours, theirs in errors)
    assert ratios[len(ratios) // 2] > 1.2 and ratios[-1] > 25.0


# What is refused

REFUSED = [
    ("dopri5", {"norm": torch.max}, "must not hold 'norm' for the method 'dopri5': it would change results"),
    ("dopri5", {"max_step": 0.1, "step_t": torch.ones(2)}, "must not hold 'max_step', 'step_t' for the method 'dopri5'"),
    ("dopri5", {"jump_t": torch.ones(1)}, "must not hold 'jump_t'"),
    ("dopri5", {"first_stepp": 0.1}, "options must be among step_size, .*, got 'first_stepp'"),
    ("dopri5", {"max_num_steps": 0}, r"options\['max_num_steps'\] must be at least 1, got 0"),
    ("rk4", {"perturb": True}, "must not hold 'perturb' for the method 'rk4'"),
    ("rk4", {"interp": "quintic"}, r"options\['interp'\] must be one of linear, cubic, got 'quintic'"),
    ("rk4", {"step_size": 0.1, "grid_constructor": lambda func, y0, t: t}, "must hold 'step_size' or 'grid_constructor', not both"),
    ("rk4", {"grid_constructor": lambda func, y0, t: t[:-1]}, r"must run from t\[0\] = 0.5 to t\[-1\] = 2.5, got 0.5 to 2.0"),
    ("rk4", {"grid_constructor": lambda func, y0, t: t[[0, 2, 1, 4]]}, r"the grid of options\['grid_constructor'\] must be strictly incr"),
]


@pytest.mark.parametrize(("method", "options", "message"), REFUSED)
def test_options_that_are_refused(method, options, message):
    with pytest.raises(ValueError, match=message):
        odeint(pull, Y0, TIMES, method=method, options=options)


@pytest.mark.parametrize("value", [3, lambda func, y0, t: t.tolist()])
def test_what_is_no_grid(value):
    with pytest.raises(TypeError, match="grid_constructor"):
        odeint(pull, Y0, TIMES, method="rk4", options={"grid_constructor": value})


# An adjoint's arguments


class Rotation(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(-1.0, 1.0, 16, dtype=torch.float64).reshape(4, 4))
        self.still = torch.nn.Parameter(torch.zeros(2), requires_grad=False)

    def forward(self, t, y):
        return torch.tanh(y @ self.weight) * torch.cos(t)


def grown(**arguments):
    """(gradients, warnings)."""
    func, start = Rotation(), Y0.clone().requires_grad_()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        given = {name: value(func) if callable(value) else value for name, value in arguments.items()}
        states = odeint_adjoint(func, start, TIMES, rtol=1e-6, atol=1e-6, **given)
    return torch.autograd.grad(states.square().sum(), [start, func.weight]), told


ADJOINT = {
    "adjoint_rtol": 1e-3,
    "adjoint_atol": torch.tensor(1e-3),
    "adjoint_method": "rk4",
    "adjoint_options": {"norm": "seminorm"},
    "adjoint_params": lambda func: (),
}


@pytest.mark.parametrize("names", [[name] for name in ADJOINT] + [list(ADJOINT)], ids=len)
def test_arguments_of_an_adjoint_have_no_effect(names):
    """Gradients are those of odeint: of the steps that were taken."""
    found, told = grown(**{name: ADJOINT[name] for name in names})
    assert len(told) == 1 and told[0].category is UserWarning and told[0].filename == __file__
    reason = "gradients are those of the steps taken, for all that requires one, and nothing is solved backwards"
    assert str(told[0].message) == f"without effect on odeint_adjoint: {', '.join(names)}; {reason}"
    func, start = Rotation(), Y0.clone().requires_grad_()
    direct = torch.autograd.grad(odeint(func, start, TIMES, rtol=1e-6, atol=1e-6).square().sum(), [start, func.weight])
    for ours, expected in zip(found, direct, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "arguments",
    [
        {name: None for name in ADJOINT},
        {"adjoint_rtol": 1e-6, "adjoint_atol": torch.tensor(1e-6, dtype=torch.float64), "adjoint_method": "dopri5", "adjoint_options": {}},
        {"method": "rk4", "adjoint_method": "rk4", "options": {"step_size": 0.1}, "adjoint_options": {"step_size": 0.1}},
        {"adjoint_params": lambda func: func.parameters()},
        {"adjoint_params": lambda func: (func.weight,)},
    ],
)
def test_an_adjoint_of_torchdiffeqs_defaults_says_nothing(arguments):
    assert not grown(**arguments)[1]


def test_options_are_read_where_an_adjoint_is_called():
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        odeint_adjoint(pull, Y0, ENDS, method="dopri5", options={"first_step": 0.1})
    assert [warning.filename for warning in told] == [__file__]
