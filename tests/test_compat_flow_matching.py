"""flow_matching's names: its paths, solver and likelihoods against closed forms, and against the package where it is installed."""

import math

import pytest
import torch
from torch import nn

import fm_fast as fm
from fm_fast.compat.flow_matching import path as paths
from fm_fast.compat.flow_matching.path import scheduler as schedulers
from fm_fast.compat.flow_matching.solver import ODESolver, Solver
from fm_fast.compat.flow_matching.utils import ModelWrapper, expand_tensor_like, gradient, unsqueeze_to_match

SCHEDULERS = {
    "CondOTScheduler": (lambda t: t, lambda t: 1 - t),
    "CosineScheduler": (lambda t: torch.sin(math.pi / 2 * t), lambda t: torch.cos(math.pi / 2 * t)),
    "VPScheduler": (
        lambda t: torch.exp(-0.25 * 19.9 * (1 - t) ** 2 - 0.05 * (1 - t)),
        lambda t: torch.sqrt(1 - torch.exp(-0.5 * 19.9 * (1 - t) ** 2 - 0.1 * (1 - t))),
    ),
    "LinearVPScheduler": (lambda t: t, lambda t: torch.sqrt(1 - t**2)),
    "PolynomialConvexScheduler": (lambda t: t**3, lambda t: 1 - t**3),
}
SHAPE = (5, 3, 4, 4)


def scheduler(module, name):
    return getattr(module, name)(3.0) if name.startswith("Polynomial") else getattr(module, name)()


def ends(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x_0, x_1 = (torch.randn(SHAPE, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    return x_0, x_1, torch.linspace(0.1, 0.9, 5, dtype=dtype)


def theirs(name):
    return pytest.importorskip(f"flow_matching.{name}", exc_type=ImportError)


# Paths


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedules_and_their_derivatives(name):
    alpha, sigma = SCHEDULERS[name]
    t = torch.linspace(0.05, 0.95, 7, dtype=torch.float64, requires_grad=True)
    at = scheduler(schedulers, name)(t.detach())
    torch.testing.assert_close(at.alpha_t, alpha(t).detach())
    torch.testing.assert_close(at.sigma_t, sigma(t).detach())
    (expected,) = torch.autograd.grad(alpha(t).sum(), t)
    torch.testing.assert_close(at.d_alpha_t, expected)
    (expected,) = torch.autograd.grad(sigma(t).sum(), t)
    torch.testing.assert_close(at.d_sigma_t, expected)
    assert scheduler(schedulers, name)(t.detach().float()).d_sigma_t.dtype == torch.float32


@pytest.mark.parametrize("name", SCHEDULERS)
def test_whole_numbers_as_times(name):
    """Are times of torch's default dtype: values cut to whole numbers would be wrong ones."""
    whole, plan = torch.tensor([0, 1]), scheduler(schedulers, name)
    found, expected = plan(whole), plan(whole.float())
    for part in ("alpha_t", "sigma_t", "d_alpha_t", "d_sigma_t"):
        assert torch.equal(getattr(found, part), getattr(expected, part)) and getattr(found, part).dtype == torch.float32
    x = ends(torch.float32)[0]
    path = paths.AffineProbPath(plan)
    torch.testing.assert_close(path.velocity_to_target(x, x, torch.tensor(0)), path.velocity_to_target(x, x, torch.tensor(0.0)))
    with pytest.raises(TypeError, match=r"t must be a torch\.Tensor, got float"):
        plan(0.5)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_points_and_velocities(name):
    x_0, x_1, t = ends()
    path = paths.CondOTProbPath() if name == "CondOTScheduler" else paths.AffineProbPath(scheduler(schedulers, name))
    found = path.sample(x_0, x_1, t)
    assert found.x_0 is x_0 and found.x_1 is x_1 and found.t is t

    def point(times):
        return sum(f(times).reshape(-1, 1, 1, 1) * x for f, x in zip(SCHEDULERS[name], (x_1, x_0), strict=True))

    expected, velocity = torch.func.jvp(point, (t,), (torch.ones_like(t),))
    torch.testing.assert_close(found.x_t, expected)
    torch.testing.assert_close(found.dx_t, velocity)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_results_have_the_dtype_of_the_data(name, dtype):
    x_0, x_1, t = ends(dtype)
    path = paths.AffineProbPath(scheduler(schedulers, name))
    found = path.sample(x_0, x_1, t.float())
    assert found.x_t.dtype == found.dx_t.dtype == dtype
    cond = paths.CondOTProbPath().sample(x_0, x_1, t.float())
    assert cond.x_t.dtype == cond.dx_t.dtype == dtype
    assert path.target_to_velocity(x_1, found.x_t, t.float()).dtype == dtype


@pytest.mark.parametrize("name", SCHEDULERS)
def test_conversions(name):
    x_0, x_1, t = ends()
    path = paths.AffineProbPath(scheduler(schedulers, name))
    found = path.sample(x_0, x_1, t)
    x_t, velocity = found.x_t, found.dx_t
    for times in (t, t.reshape(-1, 1, 1, 1)):
        torch.testing.assert_close(path.target_to_velocity(x_1, x_t, times), velocity)
        torch.testing.assert_close(path.epsilon_to_velocity(x_0, x_t, times), velocity)
        torch.testing.assert_close(path.velocity_to_target(velocity, x_t, times), x_1)
        torch.testing.assert_close(path.velocity_to_epsilon(velocity, x_t, times), x_0)
        torch.testing.assert_close(path.epsilon_to_target(x_0, x_t, times), x_1)
        torch.testing.assert_close(path.target_to_epsilon(x_1, x_t, times), x_0)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_paths_of_flow_matching(name):
    x_0, x_1, t = ends()
    module = theirs("path")
    other = module.AffineProbPath(scheduler(module.scheduler, name))
    path = paths.AffineProbPath(scheduler(schedulers, name))
    found, expected = path.sample(x_0, x_1, t), other.sample(x_0=x_0, x_1=x_1, t=t)
    torch.testing.assert_close(found.x_t, expected.x_t)
    torch.testing.assert_close(found.dx_t, expected.dx_t)
    spread = t.reshape(-1, 1, 1, 1).expand(SHAPE)
    for call in (
        "target_to_velocity",
        "epsilon_to_velocity",
        "velocity_to_target",
        "velocity_to_epsilon",
        "epsilon_to_target",
        "target_to_epsilon",
    ):
        torch.testing.assert_close(getattr(path, call)(x_1, x_0, spread), getattr(other, call)(x_1, x_0, spread))


def test_a_scheduler_of_ones_own_and_the_path_of_a_scheduler():
    def straight(t):
        return schedulers.SchedulerOutput(t, 1 - t, torch.ones_like(t), -torch.ones_like(t))

    x_0, x_1, t = ends()
    torch.testing.assert_close(paths.AffineProbPath(straight).sample(x_0, x_1, t).x_t, paths.CondOTProbPath().sample(x_0, x_1, t).x_t)
    s = fm.sample_path(x_1, x0=x_0, t=t, path=schedulers.VPScheduler().path)
    torch.testing.assert_close(s.x_t, paths.AffineProbPath(schedulers.VPScheduler()).sample(x_0, x_1, t).x_t)


WRONG = [
    (lambda x_0, x_1, t: (x_0[:4], x_1, t), ValueError, "x_0 must have the shape of x_1, "),
    (lambda x_0, x_1, t: (x_0, x_1, t[:3]), ValueError, r"^t must have shape \[5\], got \(3,\)"),
    (lambda x_0, x_1, t: (x_0, x_1, t[:, None]), ValueError, r"^t must have shape \[5\], got \(5, 1\)"),
    (lambda x_0, x_1, t: (x_0, x_1, t[0]), ValueError, r"t must have shape \[5\], got \(\)"),
    (lambda x_0, x_1, t: (x_0, x_1, 0.5), TypeError, "t must be a torch.Tensor, got float"),
    (lambda x_0, x_1, t: (x_0, x_1, 2 * t), ValueError, r"t must lie in \[0, 1\]"),
]


@pytest.mark.parametrize(("given", "kind", "message"), WRONG)
@pytest.mark.parametrize("path", [paths.CondOTProbPath(), paths.AffineProbPath(schedulers.VPScheduler())])
def test_wrong_ends(path, given, kind, message):
    with pytest.raises(kind, match=message):
        path.sample(*given(*ends()))


# Solver


class Field(nn.Module):
    """The velocity -rate t x, whose flow is known."""

    def __init__(self):
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def forward(self, x, t, scale=1.0):
        assert t.dim() == 0 and t.dtype == x.dtype
        return -self.rate.to(x.dtype) * t * x * scale


def state(x, begin, end, rate=0.7):
    return x * math.exp(-rate * (end**2 - begin**2) / 2)


@pytest.mark.parametrize(("method", "step_size"), [("euler", 1e-3), ("midpoint", 0.01), ("rk4", 0.05), ("heun3", 0.05), ("dopri5", None)])
def test_samples(method, step_size):
    x_0, _, _ = ends()
    found = ODESolver(Field()).sample(x_0, step_size, method=method)
    assert not found.requires_grad
    torch.testing.assert_close(found, state(x_0, 0.0, 1.0), rtol=1e-3, atol=1e-3)
    scaled = ODESolver(Field()).sample(x_0, step_size, method=method, scale=2.0)
    torch.testing.assert_close(scaled, state(x_0, 0.0, 1.0, 1.4), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", ["midpoint", "dopri5"])
@pytest.mark.parametrize("step_size", [None, 0.05])
@pytest.mark.filterwarnings("ignore:step_size has no effect")
def test_states_on_the_way_in_both_directions(step_size, method):
    x_0, _, _ = ends()
    for grid in (torch.linspace(0.2, 0.8, 31), torch.linspace(0.8, 0.2, 31)):
        found = ODESolver(Field()).sample(x_0, step_size, method=method, time_grid=grid, return_intermediates=True)
        assert found.shape == (31, *SHAPE)
        for t, x in zip(grid.tolist(), found, strict=True):
            torch.testing.assert_close(x, state(x_0, float(grid[0]), t), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["euler", "midpoint", "rk4", "dopri5"])
@pytest.mark.parametrize("grid", [[0.0, 1.0], [0.0, 0.3, 1.0], [1.0, 0.2]])
@pytest.mark.filterwarnings("ignore:step_size")
def test_the_samples_of_flow_matching(grid, method):
    x_0, _, _ = ends()
    arguments = {"step_size": 0.1, "method": method, "time_grid": torch.tensor(grid, dtype=torch.float64), "return_intermediates": True}
    expected = theirs("solver").ODESolver(Field()).sample(x_0, **arguments)
    found = ODESolver(Field()).sample(x_0, **arguments)
    error = 1e-3 if method == "dopri5" else 1e-5  # whose last step goes beyond the end there
    torch.testing.assert_close(found, expected, rtol=error, atol=error)


def test_gradients_where_asked_for():
    x_0, _, _ = ends()
    model = Field()
    ODESolver(model).sample(x_0, 0.02, method="midpoint", enable_grad=True).sum().backward()
    torch.testing.assert_close(model.rate.grad, -0.5 * state(x_0, 0.0, 1.0).sum().detach(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(("method", "step_size"), [("midpoint", 0.02), ("rk4", 0.1), ("dopri5", None)])
def test_likelihoods(method, step_size, exact):
    """The divergence of this field is the same for every probe of signs."""
    _, x_1, _ = ends()

    def log_p0(x):
        return torch.distributions.Normal(0.0, 1.0).log_prob(x).flatten(1).sum(1)

    x_0, log_p = ODESolver(Field()).compute_likelihood(x_1, log_p0, step_size, method=method, exact_divergence=exact)
    expected = state(x_1, 1.0, 0.0)
    torch.testing.assert_close(x_0, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(log_p, log_p0(expected) + 48 * 0.35, rtol=1e-3, atol=1e-3)
    assert not log_p.requires_grad


@pytest.mark.parametrize("method", ["euler", "dopri5"])
def test_settings_in_tensors_of_one_number(method):
    step = None if method == "dopri5" else 0.1
    given = {name: torch.tensor(1e-4, dtype=torch.float64) for name in ("rtol", "atol")}
    of_numbers = {name: 1e-4 for name in given}
    x = solve(method=method, step_size=step if step is None else torch.tensor(step, dtype=torch.float64), **given)
    assert torch.equal(x, solve(method=method, step_size=step, **of_numbers))
    likelihoods = []
    for settings in (given, of_numbers):
        torch.manual_seed(0)
        likelihoods.append(likelihood(method=method, step_size=step, **settings)[1])
    assert torch.equal(*likelihoods)


def test_the_times_of_likelihoods_have_the_dtype_of_the_state():
    """As those of samples: a 16-bit network takes no others."""
    seen = set()

    def velocity(x, t):
        seen.add((x.dtype, t.dtype))
        return -x

    _, x_1, _ = ends(torch.bfloat16)
    ODESolver(velocity).compute_likelihood(x_1, lambda x: x.flatten(1).sum(1), 0.25)
    ODESolver(velocity).sample(x_1, 0.25)
    assert seen == {(torch.bfloat16, torch.bfloat16)}


def test_steps_that_end_at_the_rounded_times_of_the_grid_are_not_split():
    """float32 times differ from the ends of steps by their rounding, which made two steps of nearly each."""
    for count in (101, 1001):
        for times in (torch.linspace(0, 1, count), torch.linspace(0, 1, count).double(), 0.1 + torch.linspace(0, 1, count)):
            calls = []
            ODESolver(lambda x, t, calls=calls: calls.append(0) or -x).sample(
                torch.ones(1, 1), 1 / (count - 1), time_grid=times, return_intermediates=True
            )
            assert len(calls) == count - 1


def test_likelihoods_can_be_differentiated():
    _, x_1, _ = ends()
    model = Field()
    solver = ODESolver(model)
    _, log_p = solver.compute_likelihood(x_1, lambda x: -x.square().flatten(1).sum(1), 0.02, method="midpoint", enable_grad=True)
    log_p.sum().backward()
    expected = 5 * 48 * 0.5 - (state(x_1, 1.0, 0.0) ** 2).sum()
    torch.testing.assert_close(model.rate.grad, expected, rtol=1e-3, atol=1e-3)


def test_wrappers():
    class TimeFirst(ModelWrapper):
        def forward(self, x, t, **extras):
            return self.model(t, x)

    x, t = torch.ones(3, 2, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)
    assert torch.equal(TimeFirst(lambda t, x: x - t)(x, t), x - 0.5)
    assert torch.equal(ModelWrapper(Field())(x, t, scale=2.0), Field()(x, t, 2.0))


def test_a_solver_is_a_module_and_a_scheduler_may_have_no_path():
    class Own(schedulers.Scheduler):
        def __init__(self):
            super().__init__()

        def __call__(self, t):
            return schedulers.CondOTScheduler()(t)

    solver = ODESolver(Field()).eval()
    assert [name for name, _ in solver.named_parameters()] == ["velocity_model.rate"]
    x_0, x_1, t = ends()
    torch.testing.assert_close(paths.AffineProbPath(Own()).sample(x_0, x_1, t).x_t, paths.CondOTProbPath().sample(x_0, x_1, t).x_t)
    with pytest.raises(NotImplementedError, match="Scheduler must have a path or a __call__ of its own"):
        schedulers.Scheduler()(t)


def test_paths_and_solvers_have_a_base():
    assert isinstance(paths.CondOTProbPath(), paths.ProbPath) and isinstance(ODESolver(Field()), Solver)
    for base in (paths.ProbPath, Solver):
        with pytest.raises(TypeError, match="abstract"):
            base()

    class Still(paths.ProbPath):
        def sample(self, x_0, x_1, t):
            self.assert_sample_shape(x_0, x_1, t)
            return paths.PathSample(x_t=x_0, dx_t=0.0 * x_0, x_1=x_1, x_0=x_0, t=t)

    class Doubling(Solver):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

        def sample(self, x_0):
            return self.scale * x_0

    x_0, x_1, t = ends()
    assert Still().sample(x_0, x_1, t).x_t is x_0 and torch.equal(Doubling().sample(x_0), 2.0 * x_0)
    for wrong in (t[0], t[:3], t[:, None]):
        with pytest.raises(ValueError, match=r"t must have shape \[5\]"):
            Still().sample(x_0, x_1, wrong)


def test_helpers_of_flow_matching():
    utils = theirs("utils")
    x, _, t = ends()
    for how in ("suffix", "prefix"):
        assert torch.equal(unsqueeze_to_match(t, x, how), utils.unsqueeze_to_match(t, x, how))
    assert torch.equal(unsqueeze_to_match(x, t), x)
    assert torch.equal(expand_tensor_like(t, x), utils.expand_tensor_like(t, x))
    expand_tensor_like(t, before := t.clone()).zero_()
    assert torch.equal(t, before), "the result is the caller's"
    for seeds in (None, 3.0 * x):
        grown = []
        for by in (gradient, utils.gradient):
            leaf = x.clone().requires_grad_()
            once = by(torch.sin(leaf), leaf, seeds, create_graph=True)
            grown += [once, by(once, leaf)]
        assert torch.equal(grown[0], grown[2]) and torch.equal(grown[1], grown[3])
    with pytest.raises(ValueError, match=r"input_tensor must have shape \[5\], got \(4,\)"):
        expand_tensor_like(t[:4], x)
    with pytest.raises(ValueError, match="how must be one of prefix, suffix, got 'middle'"):
        unsqueeze_to_match(t, x, "middle")


def solve(**changed):
    x_0, _, _ = ends()
    return ODESolver(Field()).sample(**{"x_init": x_0, "step_size": 0.1, **changed})


def likelihood(**changed):
    _, x_1, _ = ends()
    return ODESolver(Field()).compute_likelihood(**{"x_1": x_1, "log_p0": lambda x: x.flatten(1).sum(1), "step_size": 0.1, **changed})


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: ODESolver(3), TypeError, "velocity_model must be callable"),
        (
            lambda: solve(step_size=None),
            ValueError,
            "step_size must be given for the fixed-step method 'euler', or time_grid hold every step",
        ),
        (lambda: solve(step_size=-0.1), ValueError, "step_size must be positive, got -0.1"),
        (lambda: solve(time_grid=[0.0, 1.0]), TypeError, "time_grid must be a torch.Tensor, got list"),
        (lambda: solve(time_grid=torch.zeros(2)), ValueError, "time_grid must be strictly increasing or strictly decreasing"),
        (lambda: solve(method="explicit_adams"), ValueError, "method must be one of"),
        (lambda: solve(method="dopri5", step_size=None, rtol=-1.0), ValueError, "rtol must be positive"),
        (lambda: solve(steps=3), TypeError, "unexpected keyword argument 'steps'"),
        (lambda: likelihood(time_grid=torch.tensor([0.0, 1.0])), ValueError, "time_grid must run from 1 to 0, got 0.0 to 1.0"),
        (lambda: likelihood(return_intermediates=True), ValueError, "return_intermediates must be False"),
        (lambda: likelihood(step_size=None), ValueError, "step_size must be given"),
        (lambda: likelihood(log_p0=lambda x: x), ValueError, r"log_p0 must return a tensor of shape \[5\], one log-density a sample"),
        (lambda: likelihood(log_p0=3.0), TypeError, r"log_p0 must be callable as log_p0\(x\), returning log-densities \[B\], got float"),
    ],
)
def test_wrong_arguments(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def test_a_step_size_of_an_adaptive_method_is_told():
    with pytest.warns(UserWarning, match="step_size has no effect on the adaptive method 'dopri5'"):
        solve(method="dopri5")


def test_schedules_of_float32_times_keep_their_digits():
    t = torch.tensor([0.999, 0.9999])
    torch.testing.assert_close(schedulers.CosineScheduler()(t).sigma_t.double(), torch.cos(math.pi / 2 * t.double()), rtol=1e-7, atol=0.0)


def test_points_between_16_bit_ends_are_rounded_once():
    x_0, x_1, _ = ends(torch.bfloat16)
    t = torch.linspace(0.1234, 0.987, 5)
    weight = t.double().reshape(-1, 1, 1, 1)
    expected = (weight * x_1.double() + (1 - weight) * x_0.double()).bfloat16()
    found = paths.CondOTProbPath().sample(x_0, x_1, t).x_t
    assert float((found != expected).double().mean()) < 0.01  # float32 between the two roundings decides a tie now and then


def test_times_that_require_a_gradient():
    """Learned ones, as far as no gradient is recorded."""
    solver, x = ODESolver(lambda x, t: -t * x), torch.ones(3, 2)
    times = torch.tensor([0.0, 0.5, 1.0], requires_grad=True)
    found = solver.sample(x, None, "midpoint", time_grid=times)
    assert torch.equal(found, solver.sample(x, None, "midpoint", time_grid=times.detach()))

    def log_p0(x):
        return -x.square().sum(1)

    _, log_p = solver.compute_likelihood(x, log_p0, None, "midpoint", time_grid=times.flip(0), exact_divergence=True)
    assert log_p.shape == (3,)
    for solve in (
        lambda: solver.sample(x, None, "midpoint", time_grid=times, enable_grad=True),
        lambda: solver.compute_likelihood(x, log_p0, None, "midpoint", time_grid=times.flip(0), enable_grad=True),
    ):
        with pytest.raises(ValueError, match="time_grid must not require a gradient"):
            solve()
