"""odeint with torchdiffeq's arguments: its numbers, its evaluations, exact solutions, and words for what is not covered."""

import math

import pytest
import torch
import torchdiffeq

from fm_fast.compat.torchdiffeq import odeint, odeint_adjoint

Y0 = torch.linspace(-1.0, 1.0, 12, dtype=torch.float64).reshape(3, 4)
TIMES = torch.tensor([0.5, 0.9, 1.1, 2.0, 2.5], dtype=torch.float64)
FIXED = ["euler", "midpoint", "heun2", "heun3", "rk4"]
SAME_STEPS = ["dopri5", "bosh3"]


def pull(t, y):
    return torch.sin(3.0 * y) * (1.0 + t) - y


class Counted:
    def __init__(self):
        self.calls = 0

    def __call__(self, t, y):
        self.calls += 1
        assert t.dim() == 0 and t.dtype == y.dtype
        return pull(t, y)


def both(t, **arguments):
    """(ours, theirs), each with its evaluations."""
    ours, theirs = Counted(), Counted()
    with torch.no_grad():
        found = odeint(ours, Y0, t, **arguments), torchdiffeq.odeint(theirs, Y0, t, **arguments)
    return (found[0], ours.calls), (found[1], theirs.calls)


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("method", FIXED)
@pytest.mark.parametrize("options", [None, {"step_size": 0.1}])
def test_fixed_steps(options, method, backwards):
    times = TIMES.flip(0) if backwards else TIMES
    (found, calls), (expected, others) = both(times, method=method, options=options)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert calls == others


def test_a_step_is_split_at_a_time_inside_it():
    found = odeint(
        lambda t, y: 2.0 * t.expand(1), torch.zeros(1), torch.tensor([0.0, 0.25, 1.0]), method="midpoint", options={"step_size": 0.4}
    )
    torch.testing.assert_close(found[:, 0], torch.tensor([0.0, 0.0625, 1.0]))


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("method", SAME_STEPS)
def test_adaptive_steps(method, backwards):
    """torchdiffeq's last step goes beyond the end."""
    times = TIMES.flip(0) if backwards else TIMES
    (found, calls), (expected, others) = both(times, method=method, rtol=1e-6, atol=1e-6)
    assert others - 8 <= calls <= others + 8
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found[1:], odeint(pull, Y0, times, method="dopri8", rtol=1e-11, atol=1e-11)[1:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", [None, "dopri5", "tsit5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun"])
def test_an_exact_solution(method):
    found = odeint(lambda t, y: -t * y, Y0, TIMES, method=method, rtol=1e-6, atol=1e-6)
    exact = Y0 * torch.exp(0.5 * (TIMES[0] ** 2 - TIMES**2))[:, None, None]
    error = 1e-2 if method == "fehlberg2" else 1e-4
    torch.testing.assert_close(found, exact, rtol=error, atol=error)
    assert torch.equal(found[0], Y0)


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (2, 3, 4, 4)], ids=str)
def test_shapes(shape, method):
    start = torch.ones(shape, dtype=torch.float64)
    with torch.no_grad():
        found = odeint(lambda t, y: -y, start, torch.linspace(0.0, 1.0, 21), method=method)
    assert found.shape == (21, *shape)
    torch.testing.assert_close(found[-1], math.exp(-1.0) * start, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_sixteen_bits_keep_what_small_steps_add(method):
    seen = set()

    def slow(t, y):
        seen.add((t.dtype, y.dtype))
        return torch.ones_like(y)

    found = odeint(slow, torch.ones(4, dtype=torch.bfloat16), torch.linspace(0.0, 1.0, 1001), method=method, rtol=1e-3, atol=1e-3)
    assert seen == {(torch.bfloat16, torch.bfloat16)} and found.dtype == torch.bfloat16
    torch.testing.assert_close(found[-1].float(), torch.full((4,), 2.0), rtol=0.01, atol=0.0)


@pytest.mark.parametrize("method", ["midpoint", "dopri5"])
def test_gradients(method):
    grown = []
    for solver in (odeint, torchdiffeq.odeint):
        start, rate = Y0.clone().requires_grad_(), torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        states = solver(lambda t, y, rate=rate: -rate * t * y, start, TIMES, method=method, rtol=1e-8, atol=1e-8)
        states.square().sum().backward()
        grown.append((start.grad, rate.grad))
    for ours, theirs in zip(*grown, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


class Rotation(torch.nn.Module):
    """A field with a parameter and an activation to keep; counts its evaluations."""

    def __init__(self):
        super().__init__()
        self.weight, self.calls = torch.nn.Parameter(torch.linspace(-1.0, 1.0, 16, dtype=torch.float64).reshape(4, 4)), 0

    def forward(self, t, y):
        self.calls += 1
        return torch.tanh(y @ self.weight) * torch.cos(t)


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
@pytest.mark.parametrize("several", [False, True])
def test_gradients_of_an_adjoint(method, several):
    """Those of odeint, by evaluating again and without the activations; and torchdiffeq's, up to what its own solve back is off."""
    grown, kept, calls = [], [], []
    for solver in (odeint, odeint_adjoint, torchdiffeq.odeint_adjoint):
        func, start, sizes = Rotation(), Y0.clone().requires_grad_(), []
        field = func if not several else PairOf(func)
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x):
            states = solver(field, (start, start[0]) if several else start, TIMES, method=method, rtol=1e-9, atol=1e-9)
        calls.append([func.calls])
        sum(state.square().sum() for state in (states if several else [states])).backward()
        calls[-1].append(func.calls)
        grown.append((start.grad, func.weight.grad))
        kept.append(sum(sizes))
    torch.testing.assert_close(grown[1], grown[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grown[1], grown[2], rtol=1e-2 if method == "rk4" else 1e-6, atol=1e-3 if method == "rk4" else 1e-6)
    evaluations = calls[0][0]
    assert calls[0] == [evaluations, evaluations] and calls[1][0] == evaluations < calls[1][1] <= 2 * evaluations
    inputs = evaluations * (1 + Y0.numel() + several * Y0[0].numel())
    assert kept[1] <= inputs < kept[0]


class PairOf(torch.nn.Module):
    def __init__(self, field):
        super().__init__()
        self.field = field

    def forward(self, t, y):
        slopes = self.field(t, torch.cat([y[0], y[1][None]]))
        return slopes[:-1], slopes[-1]


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_a_field_of_an_adjoint_may_write_into_its_time(method):
    rate, grown = torch.tensor(0.7, dtype=torch.float64, requires_grad=True), []
    for solver, field in ((odeint_adjoint, lambda t, y: -rate * t.mul_(2.0) * y), (odeint, lambda t, y: -rate * (2.0 * t) * y)):
        states = solver(field, Y0, TIMES, method=method)
        grown.append(torch.autograd.grad(states.square().sum(), rate)[0])
    torch.testing.assert_close(grown[0], grown[1], rtol=1e-9, atol=1e-9)


def test_an_adjoint_records_nothing_without_gradients():
    func = Rotation()
    with torch.no_grad():
        found = odeint_adjoint(func, Y0, TIMES, method="rk4", adjoint_params=tuple(func.parameters()), adjoint_rtol=None)
        assert torch.equal(found, odeint(Rotation(), Y0, TIMES, method="rk4")) and not found.requires_grad


def test_what_an_adjoint_has_not():
    with pytest.raises(TypeError, match="unexpected keyword argument 'adjoint_tolerance'"):
        odeint_adjoint(pull, Y0, TIMES, adjoint_tolerance=None)
    with pytest.raises(ValueError, match="func must have none of torchdiffeq's callbacks"):
        odeint_adjoint(WithCallback(), Y0, TIMES)


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_one_time_alone(method):
    single = torch.tensor([0.5])
    assert torch.equal(odeint(pull, Y0, single, method=method), torchdiffeq.odeint(pull, Y0, single, method=method))
    odeint(pull, before := Y0.clone(), single, method=method).zero_()
    assert torch.equal(before, Y0)
    with pytest.raises(ValueError, match="options must be among"):
        odeint(pull, Y0, single, method=method, options={"bogus": 1})
    found = odeint(pull, (Y0, Y0[0]), single, method=method)
    assert torch.equal(found[0], Y0[None]) and torch.equal(found[1], Y0[:1])


def test_numbers_may_come_as_tensors():
    small = torch.tensor(1e-5)
    with torch.no_grad():
        assert torch.equal(odeint(pull, Y0, TIMES, rtol=small, atol=small), odeint(pull, Y0, TIMES, rtol=small.item(), atol=small.item()))
        steps = [odeint(pull, Y0, TIMES, method="rk4", options={"step_size": size}) for size in (torch.tensor(0.25), 0.25)]
    assert torch.equal(*steps)


def test_nothing_is_recorded_without_gradients():
    with torch.no_grad():
        assert not odeint(pull, Y0.clone().requires_grad_(), TIMES, method="rk4").requires_grad


def test_a_field_may_keep_and_change_what_it_is_given():
    for method in ("euler", "rk4", "dopri5"):
        seen, expected = [], []

        def field(t, y, seen=seen):
            seen.append(y)
            return y.mul_(-1.0).clone()

        def plain(t, y, expected=expected):
            expected.append(-y)
            return -y

        with torch.no_grad():
            found, wanted = odeint(field, Y0, TIMES, method=method), odeint(plain, Y0, TIMES, method=method)
        assert torch.equal(found, wanted) and torch.equal(torch.stack(seen), torch.stack(expected))


def test_under_transforms():
    times = torch.linspace(0.0, 1.0, 21, dtype=torch.float64)

    def end(y, method="rk4"):
        return odeint(lambda t, y: -(y**2), y, times, method=method)[-1]

    start = torch.tensor([1.0, 2.0], dtype=torch.float64)
    torch.testing.assert_close(torch.func.jacrev(end)(start), torch.diag(1.0 / (1.0 + start) ** 2), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.func.vmap(end)(start[:, None]), (start / (1.0 + start))[:, None], rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match=r"method must be a fixed-step one under torch\.func"):
        torch.func.jacrev(lambda y: end(y, "dopri5"))(start)


def test_max_num_steps_holds_for_each_interval_on_average():
    times, field = torch.linspace(0.0, 5.0, 50, dtype=torch.float64), lambda t, y: y * torch.cos(20.0 * t)
    found = odeint(field, Y0, times, rtol=1e-6, atol=1e-6, options={"max_num_steps": 8})
    torch.testing.assert_close(found[-1], Y0 * math.exp(math.sin(100.0) / 20.0), rtol=1e-4, atol=1e-4)


def test_fixed_steps_look_at_no_tolerance():
    assert torch.equal(odeint(pull, Y0, TIMES, method="euler", rtol=0.0), odeint(pull, Y0, TIMES, method="euler"))


PARTS = (Y0, torch.tensor([0.5, -2.0], dtype=torch.float64), torch.tensor(3.0, dtype=torch.float64))


def pull_each(t, parts):
    """Parts that need steps of different lengths, one of which is driven by another."""
    y, pair, number = parts
    return pull(t, y), torch.sin(8.0 * pair) + y.mean(), -number * t


def solved_in_parts(by, times, method, tolerance):
    """(states, evaluations)."""
    calls = 0

    def func(t, parts):
        nonlocal calls
        calls += 1
        return pull_each(t, parts)

    with torch.no_grad():
        return by(func, PARTS, times, method=method, rtol=tolerance, atol=tolerance), calls


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("method", [*FIXED, *SAME_STEPS])
def test_a_state_of_several_tensors(method, backwards):
    """As of one: equal with fixed steps; adaptive ones are the same but for the last."""
    times = TIMES.flip(0) if backwards else TIMES
    found, calls = solved_in_parts(odeint, times, method, 1e-6)
    expected, others = solved_in_parts(torchdiffeq.odeint, times, method, 1e-6)
    precise, _ = solved_in_parts(odeint, times, "dopri8", 1e-11)
    assert [tuple(part.shape) for part in found] == [(5, 3, 4), (5, 2), (5,)]
    assert abs(calls - others) <= (0 if method in FIXED else 8)
    error = 1e-12 if method in FIXED else 2e-3
    for ours, theirs, exact in zip(found, expected, precise, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=error, atol=error)
        if method in SAME_STEPS:
            torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_gradients_of_a_state_of_several_tensors(method):
    def gradients(by):
        start = [part.clone().requires_grad_() for part in PARTS]
        ends = by(pull_each, tuple(start), TIMES, method=method, rtol=1e-9, atol=1e-11)
        return torch.autograd.grad(sum((part[-1] ** 2).sum() for part in ends), start)

    for ours, theirs in zip(gradients(odeint), gradients(torchdiffeq.odeint), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("method", ["midpoint", "bosh3"])
def test_parts_of_16_bits(method):
    parts = (Y0.bfloat16(), Y0[0].bfloat16())
    with torch.no_grad():
        found = odeint(lambda t, y: (-y[0], y[1]), parts, TIMES, method=method, rtol=1e-4, atol=1e-4, options=None)
    assert [part.dtype for part in found] == [torch.bfloat16] * 2
    torch.testing.assert_close(found[1][-1].double(), Y0[0] * math.exp(2.0), rtol=0.3 if method == "midpoint" else 0.02, atol=0.02)


class WithCallback(torch.nn.Module):
    def forward(self, t, y):
        return -y

    def callback_step(self, t, y, dt):
        raise AssertionError


def test_a_tolerance_for_each_part_that_is_the_same_for_all():
    """As SiT gives them."""
    for y0, func, tolerances in ((Y0, pull, [1e-4]), ((Y0, Y0[0]), lambda t, y: (pull(t, y[0]), -y[1]), [1e-4, 1e-4])):
        found, expected = (odeint(func, y0, TIMES, rtol=given, atol=given) for given in (tolerances, 1e-4))
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_a_func_that_writes_to_its_input_is_told_by_its_own_names(method):
    with pytest.raises(RuntimeError, match=r"func must leave its input y as it is, .* give it y\.clone\(\)"):
        odeint(lambda t, y: y.mul_(-1.0), Y0.clone(), TIMES, method=method)


def test_an_adaptive_method_under_a_transform_is_refused_by_its_name():
    with pytest.raises(ValueError, match=r"got 'dopri5'$"):
        torch.func.jacrev(lambda y: odeint(pull, y, TIMES))(Y0)


@pytest.mark.parametrize("options", [None, {"step_size": 0.01}])
@pytest.mark.parametrize("method", ["euler", "rk4"])
def test_rounded_times_cost_no_evaluations(method, options):
    (_, calls), (_, others) = both(torch.linspace(0, 1, 101), method=method, options=options)
    assert calls == others


@pytest.mark.parametrize(
    "options", [None, {"step_size": 0.1}, {"grid_constructor": lambda func, y0, t: 1.0 * t}], ids=["none", "step_size", "grid_constructor"]
)
def test_times_that_require_a_gradient(options):
    """Learned ones, as far as no gradient is recorded."""
    times = TIMES.clone().requires_grad_()
    with torch.no_grad():
        for single in (times, times[:1]):
            found = odeint(pull, Y0, single, method="rk4", options=options)
            assert torch.equal(found, odeint(pull, Y0, single.detach(), method="rk4", options=options)) and not found.requires_grad
    for by in (odeint, odeint_adjoint):
        with pytest.raises(ValueError, match=r"t must not require a gradient, .* use t\.detach\(\)"):
            by(pull, Y0, times, method="rk4", options=options)


WRONG = [
    ({"y0": ()}, ValueError, "y0 must hold at least one tensor, got an empty tuple"),
    ({"y0": (Y0, 1.0)}, TypeError, r"y0\[1\] must be a torch.Tensor, got float"),
    (
        {"y0": (Y0, Y0.float())},
        ValueError,
        r"y0\[1\] must have elements, of torch.float64 on cpu as y0\[0\] is, got .* torch.float32 on cpu",
    ),
    ({"y0": (Y0, Y0[:0])}, ValueError, r"y0\[1\] must have elements, .* got \(0, 4\) of torch.float64"),
    ({"y0": (Y0, Y0[0]), "func": lambda t, y: y[0]}, ValueError, r"func must return a tuple of tensors of the shapes .* got Tensor"),
    ({"y0": (Y0, Y0[0]), "func": lambda t, y: y[::-1]}, ValueError, r"shapes \[\(3, 4\), \(4,\)\], got \[\(4,\), \(3, 4\)\]"),
    (
        {"y0": (Y0, Y0[0]), "func": lambda t, y: (y[0], y[1].long()), "method": "euler"},
        TypeError,
        r"func must return floating tensors on cpu, got torch.int64 on cpu for y\[1\]",
    ),
    ({"y0": (Y0, Y0[0]), "rtol": (1e-3, 1e-4)}, TypeError, "rtol must be one number: tolerances of each part .* not covered, got tuple"),
    ({"y0": Y0.long()}, TypeError, "y0 must be float64, float32, bfloat16 or float16, got torch.int64"),
    ({"t": [0.0, 1.0]}, TypeError, "t must be a torch.Tensor, got list"),
    ({"t": torch.zeros(0)}, ValueError, r"t must hold two or more times in one dimension, got shape \(0,\)"),
    ({"t": torch.zeros(1), "method": "rk3"}, ValueError, "method must be one of"),
    ({"rtol": torch.tensor([1e-3, 1e-4])}, TypeError, "rtol must be one number: tolerances of .* are not covered, got Tensor"),
    ({"method": ""}, ValueError, "method must be one of euler, .*, got ''"),
    ({"y0": torch.tensor(1.0), "func": lambda t, y: 1.0}, TypeError, "func must return a torch.Tensor, got float"),
    ({"func": lambda t, y: y[0]}, ValueError, r"func must return the shape of its input, \(3, 4\), got \(4,\)"),
    ({"t": torch.tensor([0.0, 1.0, 1.0])}, ValueError, "t must be strictly increasing or strictly decreasing"),
    ({"t": torch.tensor([0.0, math.nan])}, ValueError, "t must be strictly increasing or strictly decreasing"),
    ({"method": "implicit_adams"}, ValueError, "method must be one of euler, midpoint, .*, got 'implicit_adams'"),
    ({"method": "rk4", "options": {"step_size": 0.0}}, ValueError, "step_size must be positive, got 0.0"),
    ({"options": {"max_num_steps": 3}, "func": lambda t, y: torch.sin(300 * y)}, RuntimeError, "dopri5 did not reach the end"),
    ({"rtol": 0.0}, ValueError, "rtol must be positive"),
    ({"func": lambda t, y: y[0], "method": "euler"}, ValueError, r"func must return the shape of its input, \(3, 4\), got \(4,\)"),
    ({"event_fn": lambda t, y: y.sum()}, ValueError, "event_fn must be None: events are not covered"),
    ({"func": WithCallback()}, ValueError, "func must have none of torchdiffeq's callbacks, which are not covered, got callback_step"),
]


@pytest.mark.parametrize(("changed", "kind", "message"), WRONG)
def test_what_is_wrong_or_not_covered(changed, kind, message):
    given = {"func": pull, "y0": Y0, "t": TIMES, **changed}
    with torch.no_grad(), pytest.raises(kind, match=message):
        odeint(given.pop("func"), given.pop("y0"), given.pop("t"), **given)
