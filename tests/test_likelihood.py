"""fm.log_likelihood and fm.sample_with_log_prob against loops written out by hand with exact divergences; counts, options, modes."""

import math

import pytest
import torch
from likelihood_cases import points, velocity
from sampling_helpers import FIXED, ONE_STEP, solve
from torch import nn

import fm_fast as fm

pytestmark = pytest.mark.usefixtures("poisoned_outputs")


def trace(x, t):
    jacobian = torch.func.vmap(torch.func.jacrev(lambda y: velocity(y[None], t)[0]))(x)
    return jacobian.reshape(len(x), 6, 6).diagonal(dim1=1, dim2=2).sum(1)


def augmented(state, t):
    """d/dt of (x, integral of the divergence) as one vector."""
    return torch.cat([velocity(state[:, :6], t), trace(state[:, :6], t)[:, None]], dim=1)


def log_normal(x):
    return -0.5 * x.square().flatten(1).sum(1) - 0.5 * x[0].numel() * math.log(2 * math.pi)


@pytest.mark.parametrize("method", FIXED)
def test_the_log_density_is_the_solver_applied_to_the_augmented_state(method, backend):
    """All stages and both unknowns by hand; ours skips the divergences of weight zero and must agree to rounding."""
    nodes = [0.0, 0.1, 0.3, 0.45, 0.7, 0.8, 1.0]
    x1 = points(4, 6)
    found = fm.log_likelihood(velocity, x1, method=method, grid=nodes, kind="exact", backend=backend)
    end = solve(method, augmented, torch.cat([x1, torch.zeros(4, 1, dtype=torch.float64)], 1), nodes[::-1])
    torch.testing.assert_close(found.x0, end[:, :6], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.logp, log_normal(end[:, :6]) + end[:, 6], rtol=1e-12, atol=1e-11)
    assert torch.equal(found.std_err, torch.zeros(4, dtype=torch.float64)) and found.disc_err is None

    s = fm.sample_with_log_prob(velocity, x1, method=method, grid=nodes, kind="exact", backend=backend)
    end = solve(method, augmented, torch.cat([x1, torch.zeros(4, 1, dtype=torch.float64)], 1), nodes)
    torch.testing.assert_close(s.x, end[:, :6], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(s.logp, log_normal(x1) - end[:, 6], rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize(
    ("method", "evaluations", "divergences"),
    [("euler", 10, 10), ("midpoint", 20, 10), ("heun2", 20, 20), ("ralston", 20, 20), ("rk4", 40, 40), ("ab2", 11, 11), ("ab3", 14, 14)],
)
def test_evaluations_and_products_are_counted_and_none_is_wasted(method, evaluations, divergences):
    """The model's calls and the backward passes through it, by hooks. AB3's Kutta steps and AB2's midpoint step start them."""
    calls, products = [], []

    def model(x, t):
        calls.append(t)
        out = velocity(x, t)
        if out.requires_grad:
            out.register_hook(lambda g: products.append(1))
        return out

    found = fm.log_likelihood(model, points(3, 6), method=method, steps=10, probes=3, kind="rademacher", mode="loop", seed=0)
    assert (found.nfe, len(calls)) == (evaluations, evaluations)
    assert (found.nvjp, len(products)) == (3 * divergences, 3 * divergences)


def test_fixed_steps_draw_new_probes_at_every_evaluation_by_index():
    """log p by hand: euler, two probes, evaluation n draws with index 2 n."""
    x, total = points(3, 6), 0.0
    found = fm.log_likelihood(velocity, x, method="euler", steps=5, probes=2, kind="rademacher", seed=4, sample_ids=7)
    for n in range(5):
        t = torch.full((3,), 1 - n / 5, dtype=torch.float64)
        z = [fm.noise((3, 6), seed=4, step=0, stream="probe", index=2 * n + q, sample_ids=7, dtype=torch.float64) for q in range(2)]
        products = [torch.autograd.functional.vjp(lambda y, t=t: velocity(y, t), x, row)[1] for row in z]
        total = total - sum((row * g).sum(1) for row, g in zip(z, products, strict=True)) / 2 / 5
        x = x - velocity(x, t) / 5
    torch.testing.assert_close(found.logp, log_normal(x) + total, rtol=1e-11, atol=1e-11)


def test_adaptive_methods_hold_their_probes(backend):
    drawn = []

    def model(x, t):
        out = velocity(x, t)
        out.register_hook(lambda g: drawn.append(g.clone()))
        return out

    found = fm.log_likelihood(model, points(3, 6), method="dopri5", probes=2, kind="rademacher", mode="loop", seed=0, backend=backend)
    assert found.nfe * 2 == found.nvjp == len(drawn) > 20
    assert all(torch.equal(z, drawn[i % 2]) for i, z in enumerate(drawn))
    assert found.std_err is not None and bool((found.std_err > 0).all())


@pytest.mark.parametrize(("method", "tolerance", "error"), [("dopri5", 1e-8, 1e-6), ("bosh3", 1e-5, 1e-3)])
def test_adaptive_log_densities_agree_with_many_fixed_steps(method, tolerance, error):
    x1 = points(3, 6)
    adaptive = fm.log_likelihood(velocity, x1, method=method, kind="exact", rtol=tolerance, atol=tolerance)
    fixed = fm.log_likelihood(velocity, x1, method="rk4", steps=60, kind="exact")
    torch.testing.assert_close(adaptive.logp, fixed.logp, rtol=0, atol=error)
    forward = fm.sample_with_log_prob(velocity, fixed.x0, method=method, kind="exact", rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(forward.logp, fixed.logp, rtol=0, atol=error)


@pytest.mark.parametrize("kind", ["rademacher", "gaussian", "hadamard", "coloured"])
def test_kinds_modes_and_backends_agree(kind):
    x1 = points(2, 1, 2, 3)
    arguments = {"steps": 4, "kind": kind, "probes": 4 if kind != "coloured" else 2, "replicates": 2, "seed": 5}
    first = fm.log_likelihood(velocity, x1, mode="loop", **arguments)
    for other in ({"mode": "batched"}, {"mode": "auto"}, {"backend": "reference"}):
        second = fm.log_likelihood(velocity, x1, **other, **arguments)
        torch.testing.assert_close(first.logp, second.logp, rtol=0, atol=1e-5 if kind == "gaussian" else 1e-11)
        torch.testing.assert_close(first.std_err, second.std_err, rtol=0, atol=1e-5 if kind == "gaussian" else 1e-11)


def test_the_same_seed_repeats_bit_for_bit_and_samples_are_independent():
    x1 = points(5, 6, dtype=torch.float32)
    first, again = (fm.log_likelihood(velocity, x1, steps=5, kind="rademacher", seed=3) for _ in range(2))
    assert torch.equal(first.logp, again.logp)
    assert not torch.equal(first.logp, fm.log_likelihood(velocity, x1, steps=5, kind="rademacher", seed=4).logp)
    part = fm.log_likelihood(velocity, x1[2:4], steps=5, kind="rademacher", seed=3, sample_ids=2)
    torch.testing.assert_close(part.logp, first.logp[2:4], rtol=1e-6, atol=1e-5)


def test_seeds_from_torch_obey_manual_seed():
    torch.manual_seed(1)
    first = fm.log_likelihood(velocity, points(3, 6), steps=2, kind="rademacher").logp
    second = fm.log_likelihood(velocity, points(3, 6), steps=2, kind="rademacher").logp
    torch.manual_seed(1)
    assert torch.equal(first, fm.log_likelihood(velocity, points(3, 6), steps=2, kind="rademacher").logp)
    assert not torch.equal(first, second)


def test_low_precision_models_keep_a_float32_state():
    """bfloat16 inputs and outputs, but the state and the sums are not rounded to it."""
    x1 = points(64, 6, dtype=torch.float32)
    found = fm.log_likelihood(lambda x, t: velocity(x.float(), t).to(torch.bfloat16), x1, steps=50, kind="exact", dtype=torch.bfloat16)
    exact = fm.log_likelihood(velocity, x1.double(), method="rk4", steps=30, kind="exact").logp
    assert found.x0.dtype == torch.float32 and found.logp.dtype == torch.float64
    assert float((found.logp - exact).abs().mean()) < 0.05


def test_the_prior_is_the_paths_or_your_own():
    x1 = points(3, 6)
    still = lambda x, t: 0 * x  # noqa: E731
    torch.testing.assert_close(fm.log_likelihood(still, x1, steps=1, kind="exact").logp, log_normal(x1))
    scale = fm.log_likelihood(still, x1, steps=1, kind="exact", path=fm.VE(sigma_max=7.0)).logp
    torch.testing.assert_close(scale, log_normal(x1 / 7) - 6 * math.log(7))
    own = fm.log_likelihood(still, x1, steps=1, kind="exact", prior=lambda x: x[:, 0]).logp
    torch.testing.assert_close(own, x1[:, 0])
    with pytest.raises(ValueError, match=r"prior must return a tensor of shape \[3\]"):
        fm.log_likelihood(still, x1, steps=1, kind="exact", prior=lambda x: x)


def test_conditions_and_guidance_reach_the_model():
    x1, shift = points(3, 6), torch.tensor([[0.1], [0.2], [0.3]], dtype=torch.float64)

    def model(x, t, shift):
        return velocity(x, t) * (1 + shift)

    def mixed(x, t):
        return velocity(x, t) + 2.0 * (model(x, t, shift) - velocity(x, t))

    guidance = fm.Guidance(2.0, {"shift": 0.0})
    found = fm.log_likelihood(model, x1, steps=5, cond={"shift": shift}, guidance=guidance, kind="exact")
    torch.testing.assert_close(found.logp, fm.log_likelihood(mixed, x1, steps=5, kind="exact").logp, rtol=1e-12, atol=1e-12)
    partly, no_prior = fm.Guidance(2.0, {"shift": 0.0}, interval=(0.0, 0.5)), lambda x: x.new_zeros(len(x))
    found = fm.log_likelihood(model, x1, steps=4, cond={"shift": shift}, guidance=partly, kind="exact", prior=no_prior)
    late = fm.log_likelihood(lambda x, t: model(x, t, shift), x1, steps=2, t0=0.5, kind="exact", prior=no_prior)
    early = fm.log_likelihood(mixed, late.x0, steps=2, t1=0.5, kind="exact", prior=no_prior)
    torch.testing.assert_close(found.logp, late.logp + early.logp, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["exact", "rademacher"])
def test_create_graph_differentiates_log_densities(kind):
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def estimate(x, factor):
        model = lambda y, t: velocity(y, t) * factor  # noqa: E731
        return fm.log_likelihood(model, x, steps=3, kind=kind, probes=2, seed=1, create_graph=True).logp

    assert torch.autograd.gradcheck(estimate, (points(2, 6).requires_grad_(), scale))


def test_without_create_graph_nothing_is_recorded_and_parameters_get_no_gradient():
    model = nn.Linear(6, 6).double()
    found = fm.log_likelihood(lambda x, t: model(x), points(2, 6).requires_grad_(), steps=2, seed=0)
    assert not found.logp.requires_grad and not found.x0.requires_grad and model.weight.grad is None


def test_models_trained_on_other_objectives_have_the_same_likelihood():
    """The exact outputs for Gaussian data under VP, typed in from the closed form."""
    path, spread = fm.VP(), 0.6
    x1 = points(4, 6) * spread

    def outputs(objective):
        def model(x, t):
            a, s, da, ds = (f(t)[:, None] for f in (path.alpha, path.sigma, path.d_alpha, path.d_sigma))
            variance = (a * spread) ** 2 + s**2
            source = s * x / variance
            return {
                "velocity": (da * a * spread**2 + ds * s) / variance * x,
                "noise": source,
                "score": -source / s,
                "scoreflow": -source / s,
                "data": a * spread**2 * x / variance,
            }[objective]

        return model

    logp = {
        name: fm.log_likelihood(outputs(name), x1, path=path, objective=name, method="rk4", steps=40, kind="exact").logp
        for name in ("velocity", "noise", "score", "scoreflow", "data")
    }
    for value in logp.values():
        torch.testing.assert_close(value, logp["velocity"], rtol=1e-9, atol=1e-9)
    exact = log_normal(x1 / spread) - 6 * math.log(spread)
    assert float((logp["velocity"] - exact).abs().max()) < 2e-2  # VP ends before t = 1 and begins near, not at, N(0, I)


def test_every_one_step_method_is_covered():
    assert set(ONE_STEP) | {"ab2", "ab3"} == set(fm.solvers.METHODS)


@pytest.mark.parametrize("objective", ["velocity", "noise"])
def test_gradients_through_adaptive_solves_are_those_of_fine_fixed_steps(objective):
    """The step sizes depend on the state, so times carry gradients too: they must reach the path's factors or nothing cancels."""
    arguments = {"path": "vp", "objective": objective, "t1": 0.95, "kind": "exact"}

    def slope(**solver):
        scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        model = lambda x, t: velocity(x, t) * scale  # noqa: E731
        logp = fm.log_likelihood(model, points(3, 6), create_graph=True, **solver, **arguments).logp.sum()
        x = fm.sample(model, points(3, 6), path="vp", objective=objective, t1=0.95, grad="direct", **solver).x.sum()
        return [float(torch.autograd.grad(value, scale)[0]) for value in (logp, x)]

    adaptive, fixed = slope(method="dopri5", rtol=1e-7, atol=1e-7), slope(method="rk4", steps=100)
    assert adaptive == pytest.approx(fixed, rel=2e-4, abs=2e-4)


def test_without_create_graph_the_prior_is_not_differentiated_either():
    noise = points(3, 6).requires_grad_()
    assert not fm.sample_with_log_prob(velocity, noise, steps=2, seed=0).logp.requires_grad
    weight = torch.ones(6, dtype=torch.float64, requires_grad=True)
    assert not fm.log_likelihood(velocity, noise, steps=2, seed=0, prior=lambda x: x @ weight).logp.requires_grad


@pytest.mark.parametrize("inference_input", [True, False])
def test_inference_mode_will_do(inference_input):
    x1 = points(3, 6)
    expected = fm.log_likelihood(velocity, x1, steps=3, kind="exact").logp
    with torch.inference_mode():
        given = x1.clone() if inference_input else x1
        assert torch.equal(fm.log_likelihood(velocity, given, steps=3, kind="exact").logp, expected)
        assert torch.equal(fm.divergence(velocity, given, 0.5, kind="exact").div, fm.divergence(velocity, x1, 0.5, kind="exact").div)


class Unbatchable(torch.autograd.Function):
    """Twice its input, by a backward that reads a number and so cannot run on a batch of gradients."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2 + 0 * float(grad.sum())


def test_models_that_cannot_be_batched_go_one_by_one_unless_batches_were_asked_for():
    model = lambda x, t: Unbatchable.apply(x)  # noqa: E731
    d = fm.divergence(model, points(3, 6), 0.5, probes=4, kind="rademacher", seed=0)
    torch.testing.assert_close(d.div, torch.full((3,), 12.0, dtype=torch.float64))
    with pytest.raises(RuntimeError):
        fm.divergence(model, points(3, 6), 0.5, probes=4, kind="rademacher", seed=0, mode="batched")


@pytest.mark.parametrize(
    "prior", [None, lambda x: torch.distributions.Normal(0.0, 1.0).log_prob(x).flatten(1).sum(1)], ids=["path's", "own"]
)
@pytest.mark.parametrize(("dtype", "path", "scale"), [(torch.bfloat16, "ot", 1.0), (torch.float16, fm.VE(0.01, 300.0), 300.0)], ids=str)
def test_noise_of_16_bits_has_the_density_of_its_values(dtype, path, scale, prior):
    """Its squares in 16 bits would lose digits, or overflow."""
    noise = (scale * fm.noise((4, 3, 8, 8), seed=0, step=0)).to(dtype)
    arguments = {"steps": 4, "seed": 0, "kind": "rademacher", "dtype": torch.float32, "path": path, "prior": prior}
    found, wide = (fm.sample_with_log_prob(lambda x, t: -0.5 * x, x0, **arguments) for x0 in (noise, noise.float()))
    assert torch.equal(found.x, wide.x)
    torch.testing.assert_close(found.logp, wide.logp, rtol=1e-12, atol=0.0)


def test_one_sample_alone_takes_the_steps_of_a_whole_batch():
    """Of the state's and the integral's errors the larger counts, in each sample's own steps too."""
    options = {"method": "dopri5", "rtol": 1e-3, "atol": 1e-3, "kind": "exact"}
    x1, field = points(1, 2), lambda x, t: torch.tanh(3 * x) * (1 + t[:, None])
    together, alone = (fm.log_likelihood(field, x1, per_sample=each, **options) for each in (False, True))
    torch.testing.assert_close(alone.x0, together.x0, rtol=0.0, atol=1e-10)
    torch.testing.assert_close(alone.logp, together.logp, rtol=0.0, atol=1e-10)
