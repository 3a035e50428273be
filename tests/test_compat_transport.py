"""fm_fast.compat.transport against SiT's formulas, written out here in float64, torchdiffeq's solves, and closed forms."""

import itertools
import math
from typing import Any

import pytest
import torch
import torchdiffeq
from torch import Tensor

from fm_fast.compat.transport import ModelType, PathType, Sampler, Transport, WeightType, create_transport
from fm_fast.compat.transport.path import GVPCPlan, ICPlan, VPCPlan

PATHS, PREDICTIONS, WEIGHTS = ["Linear", "GVP", "VP"], ["velocity", "noise", "score"], [None, "velocity", "likelihood"]
FORMS = ["constant", "SBDM", "sigma", "linear", "decreasing", "inccreasing-decreasing"]
CASES = [(path, what, weight) for path, what, weight in itertools.product(PATHS, PREDICTIONS, WEIGHTS) if what != "velocity" or not weight]
DEVIATION = 0.5  # of the Gaussian data


def values(path: str, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """alpha, sigma and their derivatives, float64: appendix B of the SiT paper, and equation 18 of ours for VP."""
    t = t.double()
    if path == "Linear":
        return t, 1 - t, torch.ones_like(t), -torch.ones_like(t)
    if path == "GVP":
        angle = math.pi / 2 * t
        return angle.sin(), angle.cos(), math.pi / 2 * angle.cos(), -math.pi / 2 * angle.sin()
    exponent, slope = -0.25 * (1 - t) ** 2 * 19.9 - 0.5 * (1 - t) * 0.1, 0.5 * (1 - t) * 19.9 + 0.5 * 0.1
    alpha, sigma = exponent.exp(), (-torch.expm1(2 * exponent)).sqrt()
    return alpha, sigma, alpha * slope, -(alpha**2) * slope / sigma


def own_diffusion(path: str, t: Tensor) -> Tensor:
    a, s, da, ds = values(path, t)
    return 0.5 * (0.1 + (1 - t.double()) * 19.9) if path == "VP" else s * (da / a * s - ds)


class Exact:
    """What a perfect model of data N(0, DEVIATION^2) predicts, on a path; linear in x."""

    def __init__(self, path: str, prediction: str) -> None:
        self.path, self.prediction = path, prediction
        self.calls: list[tuple[Tensor, Tensor, dict[str, Any]]] = []

    def __call__(self, x: Tensor, t: Tensor, **given: Any) -> Tensor:
        self.calls.append((x.clone(), t.clone(), given))
        return (self.slope(t).reshape(-1, *[1] * (x.dim() - 1)) * x).to(x.dtype)

    def slope(self, t: Tensor) -> Tensor:
        return self.slopes(t)[self.prediction]

    def slopes(self, t: Tensor) -> dict[str, Tensor]:
        a, s, da, ds = values(self.path, t)
        variance = a**2 * DEVIATION**2 + s**2
        return {"velocity": (a * da * DEVIATION**2 + s * ds) / variance, "noise": s / variance, "score": -1 / variance}


def noise(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize(("path", "prediction", "weight"), CASES)
def test_training_losses(path: str, prediction: str, weight: str | None) -> None:
    """Against the formulas of the loss, from the noise that x_t holds."""
    x1, model = DEVIATION * noise(64, 3, 4, 4, dtype=torch.float64), Exact(path, prediction)
    # far enough from t = 1 to divide x0 out of x_t
    found = create_transport(path, prediction, weight, train_eps=0.05).training_losses(model, x1, {"y": 3})
    ((x_t, t, given),) = model.calls
    a, s, da, ds = (part.reshape(-1, 1, 1, 1) for part in values(path, t))
    x0 = (x_t - a * x1) / s.clamp_min(1e-3)
    pred, w = found["pred"], own_diffusion(path, t).reshape(-1, 1, 1, 1)
    scale = {None: 1.0, "velocity": (w / s) ** 2, "likelihood": w / s**2}[weight]
    error = {"velocity": pred - (da * x1 + ds * x0), "noise": pred - x0, "score": pred * s + x0}[prediction]
    kept = s.flatten() > 0.02
    torch.testing.assert_close(found["loss"][kept], (scale * error**2).mean((1, 2, 3))[kept], rtol=1e-6, atol=0.0)
    assert given == {"y": 3} and pred.shape == x1.shape and int(kept.sum()) > 50
    assert abs(float(x0[kept].std()) - 1.0) < 0.05


def test_training_losses_are_repeatable_differentiable_and_of_other_noise_each_time() -> None:
    x1, scale = noise(16, 8), torch.ones((), requires_grad=True)
    transport = create_transport()

    def losses(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return transport.training_losses(lambda x, t: scale * x, x1)["loss"]

    assert torch.equal(losses(0), losses(0)) and not torch.equal(losses(0), losses(1))
    torch.manual_seed(0)
    first, second = (transport.training_losses(lambda x, t: x, x1)["pred"] for _ in range(2))
    assert not torch.equal(first, second)
    losses(0).mean().backward()
    assert scale.grad is not None and float(scale.grad.abs()) > 0.0


@pytest.mark.parametrize(("prediction", "low", "high"), [("velocity", 0.0, 1.0), ("noise", 0.25, 0.75)])
def test_times_of_training(prediction: str, low: float, high: float) -> None:
    """Between the margins, evenly; a velocity has none."""
    model = Exact("Linear", prediction)
    create_transport("Linear", prediction, train_eps=0.25).training_losses(model, noise(4000, 2))
    t = model.calls[0][1]
    assert t.dtype == torch.float32 and low <= float(t.min()) < low + 0.01 and high - 0.01 < float(t.max()) <= high
    assert abs(float(t.mean()) - 0.5) < 4 * (high - low) / math.sqrt(12 * 4000)


@pytest.mark.parametrize("path", PATHS)
def test_sample_and_plan_for_losses_of_ones_own(path: str) -> None:
    transport, x1 = create_transport(path), noise(32, 3, 2, dtype=torch.float64)
    t, x0, same = transport.sample(x1)
    t, x_t, u_t = transport.path_sampler.plan(t, x0, x1)
    a, s, da, ds = (part.reshape(-1, 1, 1) for part in values(path, t))
    assert same is x1 and t.shape == (32,) and not torch.equal(x0, transport.sample(x1)[1])
    torch.testing.assert_close(x_t, a * x1 + s * x0)
    torch.testing.assert_close(u_t, da * x1 + ds * x0)


@pytest.mark.parametrize(("path", "plan"), [("Linear", ICPlan()), ("GVP", GVPCPlan()), ("VP", VPCPlan())])
def test_values_of_the_paths(path: str, plan: ICPlan) -> None:
    t, x = torch.linspace(0.05, 0.95, 19, dtype=torch.float64), noise(19, 2, 3, dtype=torch.float64)
    a, s, da, ds = values(path, t)
    for found, expected in zip((*plan.compute_alpha_t(t), *plan.compute_sigma_t(t)), (a, da, s, ds), strict=True):
        torch.testing.assert_close(found, expected)
    drift, diffusion = plan.compute_drift(x, t)
    torch.testing.assert_close(drift, -(da / a).reshape(-1, 1, 1) * x)
    torch.testing.assert_close(diffusion, own_diffusion(path, t).reshape(-1, 1, 1))
    for form in FORMS:
        torch.testing.assert_close(plan.compute_diffusion(x, t, form, 0.7), forms(path, t, 0.7)[form].reshape(-1, 1, 1))
    slopes = {name: slope.reshape(-1, 1, 1) * x for name, slope in Exact(path, "velocity").slopes(t).items()}
    torch.testing.assert_close(plan.get_score_from_velocity(slopes["velocity"], x, t), slopes["score"])
    torch.testing.assert_close(plan.get_noise_from_velocity(slopes["velocity"], x, t), slopes["noise"])
    torch.testing.assert_close(plan.get_velocity_from_score(slopes["score"], x, t), slopes["velocity"])


def forms(path: str, t: Tensor, norm: float) -> dict[str, Tensor]:
    t = t.double()
    return {
        "constant": torch.full_like(t, norm),
        "SBDM": norm * own_diffusion(path, t),
        "sigma": norm * values(path, t)[1],
        "linear": norm * (1 - t),
        "decreasing": 0.25 * (norm * torch.cos(math.pi * t) + 1) ** 2,
        "inccreasing-decreasing": norm * torch.sin(math.pi * t) ** 2,
    }


@pytest.mark.parametrize("method", ["euler", "midpoint", "rk4", "dopri5"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("path", "prediction"), [*itertools.product(PATHS, PREDICTIONS)])
def test_ode_against_torchdiffeq(path: str, prediction: str, reverse: bool, method: str) -> None:
    """The same states at the same times, for the velocity that the prediction amounts to."""
    transport, x = create_transport(path, prediction, sample_eps=1e-2), noise(5, 3, dtype=torch.float64)
    tolerances = {"rtol": 1e-9, "atol": 1e-9}
    solve = Sampler(transport).sample_ode(sampling_method=method, num_steps=9, reverse=reverse, **tolerances)
    states = solve(x, Exact(path, prediction), y=None)
    low, high = (0.0, 0.99) if path == "VP" else (0.0, 1.0) if prediction == "velocity" else (0.01, 0.99)
    low, high = (1 - low, 1 - high) if reverse else (low, high)
    exact, times = Exact(path, "velocity"), torch.linspace(low, high, 9, dtype=torch.float64)
    if path == "VP" and reverse:
        times[0] = 1 - 1e-5  # where VP ends in fm_fast
    end = 1 - 1e-5 if path == "VP" else 2.0  # torchdiffeq's last step goes past the last time, where VP has no values
    expected = torchdiffeq.odeint(lambda t, y: exact(y, t.reshape(1).clamp(max=end)), x, times, method=method, **tolerances)
    assert states.shape == (9, 5, 3)
    torch.testing.assert_close(states, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", ["dopri5", "midpoint"])
@pytest.mark.parametrize(("path", "prediction"), [*itertools.product(PATHS, PREDICTIONS)])
def test_likelihood_of_gaussian_data(path: str, prediction: str, method: str) -> None:
    """In closed form, for a perfect model: random signs find a diagonal Jacobian's trace exactly."""
    x = DEVIATION * noise(6, 4, dtype=torch.float64)
    solve = Sampler(create_transport(path, prediction)).sample_ode_likelihood(sampling_method=method, num_steps=400, rtol=1e-7, atol=1e-7)
    logp, z = solve(x, Exact(path, prediction))
    exact = torch.distributions.Normal(0.0, DEVIATION).log_prob(x.double()).sum(1)
    # The margins at the ends are not integrated over, nor does VP's noise reach all the way.
    torch.testing.assert_close(logp, exact, rtol=0.0, atol=0.02)
    torch.testing.assert_close(z, x / DEVIATION, rtol=1e-2, atol=1e-2)


def test_log_density_of_the_prior() -> None:
    z = noise(3, 2, 5)
    torch.testing.assert_close(create_transport().prior_logp(z), torch.distributions.Normal(0.0, 1.0).log_prob(z).sum((1, 2)))


@pytest.mark.parametrize("path", PATHS)
def test_drift_and_score_of_every_prediction(path: str) -> None:
    x, t = noise(7, 2, dtype=torch.float64), torch.linspace(0.1, 0.9, 7, dtype=torch.float64)
    slopes = Exact(path, "velocity").slopes(t)
    for prediction in PREDICTIONS:
        transport, model = create_transport(path, prediction), Exact(path, prediction)
        torch.testing.assert_close(transport.get_drift()(x, t, model), slopes["velocity"].reshape(-1, 1) * x)
        torch.testing.assert_close(transport.get_score()(x, t, model), slopes["score"].reshape(-1, 1) * x)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("path", "prediction"), [("Linear", "velocity"), ("GVP", "noise"), ("VP", "score")])
@pytest.mark.parametrize(("method", "last"), [("Euler", "Mean"), ("Heun", "Tweedie"), ("Euler", "Euler"), ("Heun", None)])
def test_sde_step_by_step(path: str, prediction: str, form: str, method: str, last: str | None) -> None:
    """The states of a walk of one's own with the same random numbers of torch's generator."""
    transport, x = create_transport(path, prediction, sample_eps=0.02), noise(5, 3, dtype=torch.float64)
    size = 0.04 if last else 0.0
    walk = Sampler(transport).sample_sde(
        sampling_method=method, diffusion_form=form, diffusion_norm=0.7, last_step=last, last_step_size=0.04, num_steps=11
    )
    torch.manual_seed(5)
    states = walk(x, Exact(path, prediction), y=2)

    low = 0.02 if path != "VP" and (prediction != "velocity" or form == "SBDM") else 0.0
    high = 1.0 - (size or 0.02)
    model, times = Exact(path, "velocity"), torch.linspace(low, high, 11, dtype=torch.float64)
    dt = (high - low) / 10

    def at(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        t = t.float().double()  # models get float32 times
        slopes = model.slopes(t)
        return slopes["velocity"], slopes["score"], forms(path, t, 0.7)[form]

    torch.manual_seed(5)
    expected = []
    for t in times[:-1]:
        kick = torch.randn_like(x) * math.sqrt(2 * dt * float(at(t)[2]))
        drifts = [velocity + w * score for velocity, score, w in (at(t), at(t.float() + torch.tensor(dt).float()))]
        if method == "Euler":
            x = x + dt * drifts[0] * x + kick
        else:
            moved = x + kick
            first = drifts[0] * moved
            x = moved + 0.5 * dt * (first + drifts[1] * (moved + dt * first))
        expected.append(x)
    velocity, score, w = at(times[-1])
    a, s, _, _ = values(path, times[-1])
    expected.append(
        {None: x, "Mean": x + size * (velocity + w * score) * x, "Euler": x + size * velocity * x, "Tweedie": (1 + s**2 * score) / a * x}[
            last
        ]
    )
    assert len(states) == 11
    for found, wanted in zip(states, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("form", ["sigma", "SBDM", "linear"])
def test_sde_keeps_the_distribution(form: str) -> None:
    torch.manual_seed(0)
    walk = Sampler(create_transport(sample_eps=1e-3)).sample_sde(diffusion_form=form, num_steps=250)
    end = walk(torch.randn(20_000, 1), Exact("Linear", "velocity"))[-1]
    assert abs(float(end.std()) / DEVIATION - 1.0) < 0.03 and abs(float(end.mean())) < 0.02


def test_conditions_reach_the_model() -> None:
    x, labels, sampler = noise(4, 3), torch.arange(4), Sampler(create_transport())
    for solve in (sampler.sample_ode(sampling_method="euler", num_steps=3), sampler.sample_sde(diffusion_form="sigma", num_steps=3)):
        model = Exact("Linear", "velocity")
        solve(x, model, y=labels, scale=1.5)
        assert len(model.calls) > 1 and all(given["y"] is labels and given["scale"] == 1.5 for _, _, given in model.calls)
        assert all(t.shape == (4,) and t.dtype == torch.float32 for _, t, _ in model.calls)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype: torch.dtype) -> None:
    transport, x = create_transport(), noise(8, 4).to(dtype)
    sampler, model = Sampler(transport), Exact("Linear", "velocity")
    loss = transport.training_losses(model, x)["loss"]
    assert loss.dtype == torch.float32 and bool(loss.isfinite().all())
    assert sampler.sample_ode(sampling_method="heun2", num_steps=5)(x, model).dtype == dtype
    states = sampler.sample_sde(diffusion_form="sigma", num_steps=5)(x, model)
    assert all(state.dtype == dtype and bool(state.isfinite().all()) for state in states)


def test_attributes() -> None:
    transport = create_transport("VP", "score", "likelihood", train_eps=0.1)
    assert (transport.model_type, transport.loss_type) == (ModelType.SCORE, WeightType.LIKELIHOOD)
    assert (transport.train_eps, transport.sample_eps) == (0.1, 1e-3)
    margins = {(path, what): (t.train_eps, t.sample_eps) for path in PATHS for what in PREDICTIONS for t in [create_transport(path, what)]}
    assert margins["Linear", "velocity"] == margins["GVP", "velocity"] == (0.0, 0.0)
    assert margins["VP", "velocity"] == margins["VP", "noise"] == (1e-5, 1e-3)
    assert margins["Linear", "noise"] == margins["GVP", "score"] == (1e-3, 1e-3)


A_LIST: Any = [1.0]
REFUSED = [
    (lambda: create_transport("linear"), ValueError, "path_type must be one of Linear, GVP, VP, got 'linear'"),
    (lambda: create_transport(prediction="x1"), ValueError, "prediction must be one of noise, score, velocity, got 'x1'"),
    (lambda: create_transport("GVP", "noise", "snr"), ValueError, "loss_weight must be one of None, velocity, likelihood, got 'snr'"),
    (lambda: create_transport(loss_weight="likelihood"), ValueError, "loss_weight must be None for prediction='velocity'"),
    (lambda: create_transport(train_eps=-1e-3), ValueError, r"train_eps must be a number in \[0, 0.5\), got -0.001"),
    (lambda: create_transport(sample_eps=0.5), ValueError, r"sample_eps must be a number in \[0, 0.5\), got 0.5"),
    (lambda: create_transport().training_losses(torch.add, A_LIST), TypeError, "x1 must be a torch.Tensor, got list"),
    (lambda: create_transport().training_losses(torch.add, noise(2, 2), A_LIST), TypeError, "model_kwargs must be a mapping .* got list"),
    (lambda: create_transport().training_losses(lambda x, t: x[:1], noise(2, 2)), ValueError, "model must return the shape of its input"),
    (lambda: Sampler(create_transport()).sample_ode(sampling_method="Euler"), ValueError, "method must be one of euler"),
    (lambda: Sampler(create_transport()).sample_ode(num_steps=1), ValueError, "num_steps must be a whole number of at least 2, got 1"),
    (lambda: Sampler(create_transport()).sample_sde(sampling_method="euler"), ValueError, "sampling_method must be one of Euler, Heun"),
    (
        lambda: Sampler(create_transport()).sample_sde(diffusion_form="increasing"),
        ValueError,
        "diffusion_form must be one of SBDM, constant",
    ),
    (lambda: Sampler(create_transport()).sample_sde(last_step="mean"), ValueError, "last_step must be one of None, Mean"),
    (lambda: Sampler(create_transport()).sample_sde(last_step_size=2), ValueError, "last_step_size must be a number"),
    (lambda: Sampler(create_transport()).sample_sde(diffusion_norm=-1.0), ValueError, "diffusion_norm must not be negative for"),
    (lambda: Sampler(create_transport()).sample_sde(diffusion_norm=math.nan), ValueError, "diffusion_norm must be finite"),
    (lambda: Sampler(create_transport()).sample_sde(num_steps=1), ValueError, "num_steps must be a whole number of at least 2, got 1"),
    (lambda: Sampler(create_transport()).sample_ode(rtol=-1.0), ValueError, "rtol must be positive"),
    (lambda: Sampler(create_transport()).sample_sde(), ValueError, "sample_eps must be above 0 for diffusion_form='SBDM'"),
    (lambda: ICPlan().compute_diffusion(noise(2, 2), torch.rand(2), "Sigma"), ValueError, "form must be one of SBDM, constant"),
]


@pytest.mark.parametrize(("call", "error", "message"), REFUSED)
def test_refusals(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_made_of_its_parts() -> None:
    made = Transport(model_type=ModelType.NOISE, path_type=PathType.GVP, loss_type=WeightType.NONE, train_eps=0.0, sample_eps=0.1)
    assert isinstance(made.path_sampler, GVPCPlan) and made.check_interval(0.0, 0.1, eval=True) == (0.1, 0.9)


INTERVALS = {
    # path, prediction, options: the ends, of train_eps 0.1 and sample_eps 0.2
    ("Linear", "velocity"): [({}, (0, 1)), ({"eval": True}, (0, 1)), ({"sde": True, "diffusion_form": "sigma"}, (0, 0.9))],
    ("GVP", "velocity"): [({"sde": True}, (0.1, 0.9)), ({"sde": True, "eval": True, "last_step_size": 0.04}, (0.2, 0.96))],
    ("Linear", "noise"): [({}, (0.1, 0.9)), ({"eval": True, "reverse": True}, (0.8, 0.2)), ({"last_step_size": 0.04}, (0.1, 0.9))],
    ("VP", "velocity"): [({}, (0, 0.9)), ({"eval": True}, (0, 0.8)), ({"sde": True, "last_step_size": 0.04}, (0, 0.96))],
    ("VP", "score"): [({"eval": True, "reverse": True}, (1, 0.2)), ({"sde": True}, (0, 0.9))],
}


@pytest.mark.parametrize("kind", INTERVALS, ids=str)
def test_intervals(kind: tuple[str, str]) -> None:
    for options, expected in INTERVALS[kind]:
        assert create_transport(*kind).check_interval(0.1, 0.2, **options) == pytest.approx(expected)


@pytest.mark.parametrize("method", ["Euler", "Heun"])
@pytest.mark.parametrize(("path", "prediction"), [*itertools.product(PATHS, PREDICTIONS)])
def test_sde_up_to_the_ends(path: str, prediction: str, method: str) -> None:
    """Without a last step and without margins: the model is asked where what it says counts for something finite."""
    transport, model = create_transport(path, prediction, sample_eps=0.0), Exact(path, prediction)
    form = "sigma" if path == "Linear" else "inccreasing-decreasing"
    torch.manual_seed(0)
    walk = Sampler(transport).sample_sde(sampling_method=method, diffusion_form=form, last_step=None, num_steps=100)
    end = walk(torch.randn(2000, 2, dtype=torch.float64), model)[-1]
    assert abs(float(end.std()) / DEVIATION - 1.0) < 0.1
    times = torch.cat([t for _, t, _ in model.calls])
    assert float(times.min()) >= (0.0 if prediction == "velocity" or path == "VP" else 1e-5) and float(times.max()) <= 1 - 1e-5


def test_the_diffusion_of_vp_at_its_end() -> None:
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(
        VPCPlan().compute_drift(torch.ones(2, 1, dtype=torch.float64), ends)[1], torch.tensor([[10.0], [0.05]]).double()
    )
    torch.testing.assert_close(VPCPlan(0.2, 4.0).own_diffusion(ends), torch.tensor([2.0, 0.1]).double())


@pytest.mark.parametrize("output", [lambda x, t: x.mean(1, keepdim=True), lambda x, t: (x, t), lambda x, t: x[:1]])
def test_outputs_of_another_shape(output: Any) -> None:
    sampler, x = Sampler(create_transport()), noise(4, 3)
    for solve in (sampler.sample_sde(diffusion_form="sigma", num_steps=3), sampler.sample_ode(num_steps=3)):
        with pytest.raises((TypeError, ValueError), match="model must return"):
            solve(x, output)
    with pytest.raises((TypeError, ValueError), match="model must return"):
        create_transport().get_drift()(x, torch.rand(4), output)
    with pytest.raises((TypeError, ValueError), match="model must return"):
        create_transport().training_losses(output, x)


def test_a_model_that_writes_to_its_input_is_refused() -> None:
    x = noise(4, 3)
    before = x.clone()
    with pytest.raises(RuntimeError, match="model must leave its input x as it is"):
        Sampler(create_transport()).sample_sde(diffusion_form="sigma", num_steps=3)(x, lambda x, t: x.mul_(2.0))
    assert torch.equal(x, before)


def test_gradients_of_an_ode_where_they_are_recorded() -> None:
    """As odeint has them."""
    scale, x = torch.tensor(0.5, requires_grad=True), noise(4, 3)
    solve = Sampler(create_transport()).sample_ode(sampling_method="rk4", num_steps=20)
    states = solve(x, lambda x, t: scale * x)
    (found,) = torch.autograd.grad(states[-1].sum(), scale)
    torch.testing.assert_close(found, (math.exp(0.5) * x).sum(), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert not solve(x, lambda x, t: scale * x).requires_grad


def test_drifts_in_other_solvers() -> None:
    """Whose steps go beyond the end, and whose times are rounded."""
    for prediction in PREDICTIONS:
        transport, model = create_transport("GVP", prediction), Exact("GVP", prediction)
        drift, times = Sampler(transport).drift, torch.linspace(0.001, 1.0, 5)

        def clamped(x: Tensor, t: Tensor, model: Exact = model) -> Tensor:
            return model(x, t.clamp(1e-5, 1 - 1e-5))

        x = noise(4, 3, dtype=torch.float64)
        states = torchdiffeq.odeint(lambda t, y, drift=drift, f=clamped: drift(y, t.expand(4), f), x, times.double(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(states[-1], DEVIATION * x, rtol=1e-2, atol=1e-2)


def test_one_number_a_sample() -> None:
    x = noise(5, dtype=torch.float64)
    logp, _ = Sampler(create_transport()).sample_ode_likelihood(rtol=1e-6, atol=1e-6)(DEVIATION * x, Exact("Linear", "velocity"))
    exact = torch.distributions.Normal(0.0, DEVIATION).log_prob(DEVIATION * x)
    torch.testing.assert_close(logp, exact, rtol=0.0, atol=1e-3)
    assert create_transport().prior_logp(torch.zeros(0, 3)).shape == (0,)


def test_noise_does_not_depend_on_the_layout() -> None:
    x, walk = noise(2, 3, 4, 4), Sampler(create_transport()).sample_sde(diffusion_form="sigma", num_steps=4)
    ends = []
    for given in (x, x.to(memory_format=torch.channels_last)):
        torch.manual_seed(0)
        ends.append(walk(given, Exact("Linear", "velocity"))[-1])
    torch.testing.assert_close(*ends)


def test_times_of_16_bit_data_are_not_drawn_in_16_bits() -> None:
    t, _, _ = create_transport().sample(torch.zeros(50_000, 1, dtype=torch.bfloat16))
    assert t.dtype == torch.bfloat16 and int((t == 0).sum()) == 0


@pytest.mark.parametrize("form", ["SBDM", "sigma"])
def test_numbers_may_come_as_tensors(form: str) -> None:
    ends = []
    for make in (float, torch.tensor):
        transport = create_transport("Linear", "noise", "likelihood", make(1e-3), make(2e-3))
        assert (transport.train_eps, transport.sample_eps) == (pytest.approx(1e-3), pytest.approx(2e-3))
        walk = Sampler(transport).sample_sde(diffusion_form=form, diffusion_norm=make(3), last_step_size=make(0.05), num_steps=5)
        torch.manual_seed(0)
        ends.append(walk(noise(4, 3), Exact("Linear", "noise"))[-1])
    torch.testing.assert_close(*ends)


def test_the_form_that_scripts_offer_is_the_one_that_their_module_misspells() -> None:
    t = torch.linspace(0.0, 1.0, 5, dtype=torch.float64)
    found, expected = (ICPlan().diffusion(t, f"{word}-decreasing", 2.0) for word in ("increasing", "inccreasing"))
    assert torch.equal(found, expected)
    torch.testing.assert_close(found, 2.0 * torch.tensor([0.0, 0.5, 1.0, 0.5, 0.0], dtype=torch.float64))
    walk = Sampler(create_transport()).sample_sde(diffusion_form="increasing-decreasing", num_steps=3)
    assert len(walk(noise(2, 3), Exact("Linear", "velocity"))) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_times_and_noise_of_a_subclass(prediction: str, dtype: torch.dtype) -> None:
    """Which draws as it likes, and are the ones that the loss is computed with."""
    x0, x1, times = noise(4, 3, seed=1).to(dtype), noise(4, 3).to(dtype), torch.tensor([0.25, 0.5, 0.5, 0.75]).to(dtype)
    asked = []

    class Chosen(Transport):
        def sample(self, x1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return times, x0, x1

    def model(x: Tensor, t: Tensor) -> Tensor:
        asked.append((x, t))
        return torch.zeros_like(x)

    kinds = {"model_type": ModelType(prediction), "path_type": PathType.LINEAR, "loss_type": WeightType.NONE}
    losses = Chosen(**kinds, train_eps=0.0, sample_eps=0.0).training_losses(model, x1)["loss"]
    column = times[:, None].float()
    torch.testing.assert_close(asked[0][0].float(), column * x1.float() + (1 - column) * x0.float(), rtol=1e-2, atol=1e-2)
    assert torch.equal(asked[0][1], times.float())
    wanted = x1.float() - x0.float() if prediction == "velocity" else x0.float()
    torch.testing.assert_close(losses.float(), wanted.square().mean(1), rtol=1e-2, atol=1e-2)
