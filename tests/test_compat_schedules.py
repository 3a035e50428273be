"""Inverses of flow_matching's schedulers, and models sampled on another schedule than theirs: against closed forms and the package."""

import itertools
import math

import pytest
import torch

import fm_fast as fm
from fm_fast.compat.flow_matching.path import scheduler as schedulers
from fm_fast.compat.flow_matching.solver import ODESolver
from fm_fast.testing import GaussianToGaussian

SCHEDULERS = {
    "CondOT": lambda module: module.CondOTScheduler(),
    "Cosine": lambda module: module.CosineScheduler(),
    "VP": lambda module: module.VPScheduler(),
    "LinearVP": lambda module: module.LinearVPScheduler(),
    "cubic": lambda module: module.PolynomialConvexScheduler(3.0),
    "root": lambda module: module.PolynomialConvexScheduler(0.5),
}
CONVEX = ["CondOT", "cubic", "root"]
PAIRS = list(itertools.product(SCHEDULERS, SCHEDULERS))
ACCURACY = {torch.float64: 1e-14, torch.float32: 3e-7}
MEAN = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
COVARIANCE = torch.tensor([[1.3, 0.4, 0.0], [0.4, 0.7, -0.2], [0.0, -0.2, 0.3]], dtype=torch.float64)


def scheduler(name, module=schedulers):
    return SCHEDULERS[name](module)


def theirs():
    return pytest.importorskip("flow_matching.path.scheduler", exc_type=ImportError)


def field(name):
    """The velocity of normal data on a schedule, known in closed form."""
    return GaussianToGaussian(MEAN, COVARIANCE, scheduler(name).path)


def transformed(original, new, module=schedulers):
    known = field(original)
    return module.ScheduleTransformedModel(lambda x, t: known(x, t), scheduler(original, module), scheduler(new, module))


def states(count=8, dtype=torch.float64):
    return fm.noise((count, 3), seed=1, step=0, dtype=torch.float64).to(dtype)


def number(value, dtype=torch.float64):
    return torch.tensor(value, dtype=dtype)


# Inverses


@pytest.mark.parametrize("dtype", ACCURACY, ids=str)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_round_trips(name, dtype):
    t = torch.cat([torch.tensor([1e-4, 1e-3]), torch.linspace(0.01, 0.99, 99), torch.tensor([0.999, 0.9999])]).to(dtype)
    at = scheduler(name)(t)
    found = scheduler(name).snr_inverse(at.alpha_t / at.sigma_t)
    assert found.dtype == dtype
    torch.testing.assert_close(found, t, rtol=0.0, atol=ACCURACY[dtype])


@pytest.mark.parametrize("dtype", ACCURACY, ids=str)
@pytest.mark.parametrize("name", CONVEX)
def test_round_trips_of_kappa(name, dtype):
    t = torch.linspace(0.0, 1.0, 101, dtype=dtype).reshape(101, 1)
    convex = scheduler(name)
    assert isinstance(convex, schedulers.ConvexScheduler)
    found = convex.kappa_inverse(kappa=convex(t).alpha_t)
    assert found.dtype == dtype
    torch.testing.assert_close(found, t, rtol=0.0, atol=ACCURACY[dtype])


@pytest.mark.parametrize("dtype", ACCURACY, ids=str)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_inverses_at_the_ends(name, dtype):
    first, last = scheduler(name).snr_inverse(torch.tensor([0.0, math.inf], dtype=dtype)).tolist()
    assert last == 1.0 and first == (-math.inf if name == "VP" else 0.0)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_inverses_of_flow_matching(name):
    ratios = torch.logspace(-3, 3, 31, dtype=torch.float64)
    other = scheduler(name, theirs())
    torch.testing.assert_close(scheduler(name).snr_inverse(ratios), other.snr_inverse(ratios), rtol=1e-9, atol=1e-9)
    if name in CONVEX:
        kappa = torch.linspace(0.0, 1.0, 11, dtype=torch.float64)
        torch.testing.assert_close(scheduler(name).kappa_inverse(kappa), other.kappa_inverse(kappa))


def test_the_inverse_of_a_constant_beta():
    constant, t = schedulers.VPScheduler(2.0, 2.0), torch.linspace(0.0, 0.99, 12, dtype=torch.float64)
    at = constant(t)
    torch.testing.assert_close(constant.snr_inverse(at.alpha_t / at.sigma_t), t, rtol=0.0, atol=1e-14)
    assert (constant.beta_min, constant.beta_max) == (2.0, 2.0) and schedulers.PolynomialConvexScheduler(2).n == 2


class Smooth(schedulers.ConvexScheduler):
    """alpha = (1 - cos pi t) / 2, of which only this and its inverse are known."""

    def __call__(self, t):
        alpha, slope = 0.5 - 0.5 * torch.cos(math.pi * t), 0.5 * math.pi * torch.sin(math.pi * t)
        return schedulers.SchedulerOutput(alpha, 1.0 - alpha, slope, -slope)

    def kappa_inverse(self, kappa):
        return torch.acos(1.0 - 2.0 * kappa) / math.pi


def test_schedulers_of_ones_own():
    t = torch.linspace(0.0, 1.0, 11, dtype=torch.float64)
    at = Smooth()(t)
    torch.testing.assert_close(Smooth().snr_inverse(at.alpha_t / at.sigma_t), t)
    model = schedulers.ScheduleTransformedModel(field("CondOT"), schedulers.CondOTScheduler(), Smooth())
    back = schedulers.ScheduleTransformedModel(model, Smooth(), schedulers.CondOTScheduler())
    for r in (0.0, 0.3, 0.999, 1.0):
        accuracy = 1e-3 if r in (0.0, 1.0) else 1e-9  # where the schedule stands still, and a little inside decides
        torch.testing.assert_close(back(states(), number(r)), field("CondOT")(states(), r), rtol=0.0, atol=accuracy)


def test_what_a_scheduler_of_ones_own_lacks_is_named():
    class Own(schedulers.ConvexScheduler):
        pass

    assert isinstance(Own(), schedulers.Scheduler)
    for call, message in [
        (lambda: schedulers.Scheduler().snr_inverse(torch.ones(2)), "Scheduler must have a snr_inverse of its own"),
        (lambda: Own().kappa_inverse(torch.ones(2)), "Own must have a kappa_inverse of its own"),
        (lambda: Own().snr_inverse(torch.ones(2)), "Own must have a kappa_inverse of its own"),
    ]:
        with pytest.raises(NotImplementedError, match=message):
            call()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_wrong_ratios(name):
    inverse = scheduler(name).snr_inverse
    with pytest.raises(TypeError, match=r"snr must be a torch\.Tensor, got float"):
        inverse(0.5)
    with pytest.raises(TypeError, match=r"snr must be float64, .* got torch\.int64"):
        inverse(torch.ones(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"snr must not be negative, got values from -1\.0 to 2\.0"):
        inverse(torch.tensor([2.0, -1.0]))


@pytest.mark.parametrize("name", CONVEX)
def test_wrong_kappas(name):
    with pytest.raises(ValueError, match=r"kappa must lie in \[0, 1\], got values from 0\.5 to 1\.5"):
        scheduler(name).kappa_inverse(torch.tensor([0.5, 1.5]))


# Models on another schedule


@pytest.mark.parametrize(("original", "new"), PAIRS)
def test_velocities_on_another_schedule(original, new):
    model, expected = transformed(original, new), field(new)
    # From where the new schedule has as much data as VP begins with.
    for r in (0.2, 0.35, 0.5, 0.8, 0.95, 0.99):
        torch.testing.assert_close(model(states(), number(r)), expected(states(), r), rtol=0.0, atol=1e-9)


@pytest.mark.parametrize(("original", "new"), PAIRS)
def test_the_velocities_of_flow_matching(original, new):
    model, other = transformed(original, new), transformed(original, new, theirs())
    for r in (0.2, 0.5, 0.9):
        torch.testing.assert_close(model(x=states(), t=number(r)), other(x=states(), t=number(r)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", ACCURACY, ids=str)
@pytest.mark.parametrize(("original", "new"), PAIRS)
def test_velocities_are_finite_at_the_ends(original, new, dtype):
    model = transformed(original, new)
    for r in (0.0, 1e-6, 0.99999, 1.0):
        assert bool(model(states(dtype=dtype), number(r, dtype)).isfinite().all()), r


SMOOTH_ENDS = [pair for pair in PAIRS if not {"VP", "LinearVP", "root"} & set(pair) and pair[0] != "cubic"]


@pytest.mark.parametrize(("original", "new"), SMOOTH_ENDS)
def test_velocities_at_the_ends(original, new):
    """Between schedules that divide by nothing there, they are those of the closed form."""
    for dtype, accuracy in ((torch.float64, 1e-9), (torch.float32, 2e-6)):
        for r in (0.0, 1.0):
            found = transformed(original, new)(states(dtype=dtype), number(r, dtype))
            torch.testing.assert_close(found.double(), field(new)(states(), r), rtol=0.0, atol=accuracy)


@pytest.mark.parametrize(
    ("original", "new"), [("CondOT", "Cosine"), ("Cosine", "CondOT"), ("VP", "Cosine"), ("cubic", "VP"), ("CondOT", "VP")]
)
def test_float32_keeps_its_digits_near_the_data(original, new):
    for r in (0.9, 0.99, 0.999):
        time = number(r, torch.float32)
        found = transformed(original, new)(states(dtype=torch.float32), time)
        torch.testing.assert_close(found.double(), field(new)(states(dtype=torch.float32).double(), time), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("original", "accuracy"), [("VP", 1e-3), ("LinearVP", 1e-3), ("cubic", 1e-3), ("root", 1e-3)])
def test_a_little_inside_is_near_the_end(original, accuracy):
    """Where the model's own schedule has no finite factors; VP, which begins with data, has no such velocity at the noise."""
    for r in (0.0, 1.0)[original == "VP" :]:
        torch.testing.assert_close(
            transformed(original, "CondOT")(states(), number(r)), field("CondOT")(states(), r), rtol=0.0, atol=accuracy
        )


class Recorded(torch.nn.Module):
    """What a model is called with."""

    def forward(self, x, t, **extras):
        self.x, self.t, self.extras = x, t, extras
        return torch.zeros_like(x)


def test_the_model_is_asked_at_times_of_its_own():
    inner = Recorded()
    model = schedulers.ScheduleTransformedModel(inner, schedulers.VPScheduler(), schedulers.CondOTScheduler())
    assert model.model is inner and list(model.children()) == [inner]
    for r, expected in ((0.0, 0.0), (0.005, 0.0), (1.0, 1.0)):
        model(states(dtype=torch.float32), number(r, torch.float32), label=3)
        assert inner.t.shape == () and inner.t.dtype == inner.x.dtype == torch.float32 and inner.extras == {"label": 3}
        assert 0.0 <= float(inner.t) <= 1.0 and float(inner.t) == pytest.approx(expected, abs=1e-6)
    model(states(), number([[0.0], [0.5]] * 4))
    assert inner.t.shape == (8, 1) and inner.t[0] == 0.0 and 0.74 < inner.t[1] < 0.75


def test_a_time_for_each_sample():
    model, x = transformed("CondOT", "Cosine"), states(3)
    times = number([0.0, 0.4, 1.0])
    found = model(x, times)
    for row, r in enumerate(times):
        torch.testing.assert_close(found[row], model(x, r)[row], rtol=0.0, atol=1e-13)
    assert model(states(0), times[:0]).shape == (0, 3)


def test_times_beyond_the_ends_count_as_the_ends():
    for original, new in (("CondOT", "LinearVP"), ("VP", "Cosine")):
        model = transformed(original, new)
        for beyond, end in ((-0.1, 0.0), (1.1, 1.0)):
            assert torch.equal(model(states(), number(beyond)), model(states(), number(end)))


def test_16_bit_states():
    x = states(dtype=torch.bfloat16)
    found = transformed("CondOT", "VP")(x, number(0.7, torch.bfloat16))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), field("VP")(x.double(), float(number(0.7, torch.bfloat16))), rtol=0.05, atol=0.05)
    assert bool(transformed("VP", "CondOT")(x, number(1.0, torch.bfloat16)).isfinite().all())


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
@pytest.mark.parametrize(
    ("original", "new"), [("CondOT", "Cosine"), ("CondOT", "VP"), ("VP", "CondOT"), ("cubic", "LinearVP"), ("VP", "Cosine")]
)
def test_samples_on_another_schedule(original, new, method):
    """Both methods evaluate the velocity at both ends."""
    x_0 = states(64, torch.float32)
    step_size = None if method == "dopri5" else 0.01
    found = ODESolver(transformed(original, new)).sample(x_0, step_size, method=method)
    torch.testing.assert_close(found, field(new).flow(x_0, 0.0, 1.0), rtol=0.0, atol=3e-3)
    if method == "rk4":
        torch.testing.assert_close(fm.sample(transformed(original, new), x_0, method="rk4_38", steps=100).x, found, rtol=0.0, atol=1e-5)


def test_likelihoods_on_another_schedule():
    x_1 = field("Cosine").sample(16, seed=3)

    def log_p0(x):
        return torch.distributions.Normal(0.0, 1.0).log_prob(x).sum(1)

    solver = ODESolver(transformed("CondOT", "Cosine"))
    _, log_p = solver.compute_likelihood(x_1, log_p0, 0.02, method="rk4", exact_divergence=True)
    torch.testing.assert_close(log_p, field("Cosine").log_prob(x_1), rtol=0.0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"original_scheduler": lambda t: t}, TypeError, "original_scheduler must have a snr_inverse to call, got function"),
        ({"original_scheduler": schedulers.VPScheduler}, TypeError, "original_scheduler must be callable, got <class"),
        ({"new_scheduler": "cosine"}, TypeError, "new_scheduler must be callable, got str"),
        ({"velocity_model": None}, TypeError, "velocity_model must be callable, got NoneType"),
        ({"x": states()[0, 0]}, ValueError, "x must have a batch dimension"),
        ({"x": [1.0]}, TypeError, r"x must be a torch\.Tensor, got list"),
        ({"t": 0.5}, TypeError, r"t must be a torch\.Tensor, got float"),
        ({"t": torch.tensor(1)}, TypeError, r"t must be float64, .* got torch\.int64"),
        ({"t": torch.ones(3)}, ValueError, r"t must be a scalar tensor or have shape \[8\], got \(3,\) for x of \(8, 3\)"),
        ({"t": torch.ones(8, 1, 1)}, ValueError, r"t must be a scalar tensor or have shape \[8\], got \(8, 1, 1\)"),
        ({"t": torch.tensor(0.5, device="meta")}, ValueError, "t must be on the device of x, cpu, got meta"),
        (
            {"velocity_model": lambda x, t: x[:, :1]},
            ValueError,
            r"velocity_model must return the shape of its input, \(8, 3\), got \(8, 1\)",
        ),
    ],
)
def test_wrong_arguments(change, kind, message):
    given = {
        "velocity_model": Recorded(),
        "original_scheduler": schedulers.CondOTScheduler(),
        "new_scheduler": schedulers.CosineScheduler(),
        "x": states(),
        "t": number(0.5),
        **change,
    }
    with pytest.raises(kind, match=message):
        point = given.pop("x"), given.pop("t")
        schedulers.ScheduleTransformedModel(**given)(*point)
