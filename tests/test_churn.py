"""Stochastic sampling against a loop in NumPy's float64 with the noise contract's numbers, and against distributions in closed form."""

import itertools

import numpy as np
import oracle
import pytest
import torch
from sampling_helpers import ONE_STEP, network, noise64, schedule, velocity_of
from torch.func import vmap

import fm_fast as fm

X0 = noise64(3, 2, 4)
SEED, STEP = 5, 7
NOISE = {"seed": SEED, "step": STEP}


def by_hand(velocity, x, nodes, churn, path, method):
    """Back by churn times the step, but not before t = 0, then a step of the method; velocity(x, t), or one a step."""
    velocities = velocity if isinstance(velocity, list) else [velocity] * (len(nodes) - 1)
    for n, (t, end) in enumerate(itertools.pairwise(nodes)):
        begin = max(t - churn * (end - t), 0.0)
        (a, s, *_), (a_before, s_before, *_) = schedule(path, t), schedule(path, begin)
        if a > 0:
            z = torch.from_numpy(oracle.normal(tuple(x.shape), SEED, STEP, "bridge", index=n))
            ratio = a_before / a
            x = ratio * x + max(s_before**2 - (ratio * s) ** 2, 0.0) ** 0.5 * z
        else:
            begin = t
        x = ONE_STEP[method](velocities[n], x, begin, end - begin)
    return x


@pytest.mark.parametrize("churn", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("method", ["euler", "midpoint", "rk4"])
@pytest.mark.parametrize("path", ["ot", "vp", "cosine"])
def test_the_solve_is_the_loops(path, method, churn, backend):
    nodes = [0.0, 0.1, 0.4, 0.5, 0.9] if path != "vp" else [0.0, 0.3, 0.5, 0.9]
    found = fm.sample(network, X0, path=path, method=method, grid=nodes, t1=0.9, churn=churn, backend=backend, **NOISE)
    expected = by_hand(network, X0, nodes, churn, path, method)
    torch.testing.assert_close(found.x, expected, rtol=1e-5, atol=1e-5)  # the normals are float32's
    assert found.nfe == (len(nodes) - 1) * {"euler": 1, "midpoint": 2, "rk4": 4}[method]


@pytest.mark.parametrize("objective", ["noise", "data"])
def test_other_objectives(objective, backend):
    nodes = [0.2, 0.3, 0.6, 0.8]
    options = {"path": "cosine", "objective": objective, "method": "midpoint", "grid": nodes, "t0": 0.2, "t1": 0.8}
    found = fm.sample(network, X0, churn=0.4, backend=backend, **options, **NOISE)
    expected = by_hand(lambda x, t: velocity_of("cosine", objective, network(x, t), x, t), X0, nodes, 0.4, "cosine", "midpoint")
    torch.testing.assert_close(found.x, expected, rtol=1e-5, atol=1e-5)


def test_without_churn_it_is_the_ode(backend):
    plain = fm.sample(network, X0, steps=4, backend=backend)
    assert torch.equal(fm.sample(network, X0, steps=4, churn=0, backend=backend).x, plain.x)
    assert not torch.allclose(fm.sample(network, X0, steps=4, churn=0.1, backend=backend, **NOISE).x, plain.x, rtol=1e-2)


@pytest.mark.parametrize("path", ["ot", "vp", fm.VE(0.01, 20.0), "cosine"], ids=str)
def test_it_keeps_the_distribution_and_forgets_what_went_wrong(path):
    """Data N(0.5, 0.3^2): the exact flow of noise that is half as wide stays too narrow, and the stochastic one does not."""
    data = fm.testing.GaussianToGaussian(torch.full((1,), 0.5), torch.full((1, 1), 0.09), path=path)
    noise = fm.paths.prior_scale(path) * fm.noise((4000, 1), seed=1, step=0)
    options = {"path": path, "steps": 100, "method": "midpoint", **NOISE}
    right, narrow, wrong = (
        fm.sample(data, start, churn=churn, **options).x for start, churn in ((noise, 0.5), (noise / 2, 0.5), (noise / 2, 1e-9))
    )
    for x in (right, narrow):
        assert float(x.mean()) == pytest.approx(0.5, abs=0.02) and float(x.std()) == pytest.approx(0.3, abs=0.015)
    assert float(wrong.std()) == pytest.approx(0.15, abs=0.01)
    # The ODE's samples are a function of the noise; these have forgotten it.
    assert abs(float(torch.corrcoef(torch.cat([noise, right], 1).T)[0, 1])) < 0.5


def test_the_same_ids_draw_the_same_noise_in_any_batch(backend):
    x0 = fm.noise((6, 5), seed=0, step=0)
    options = {"steps": 4, "churn": 0.5, "backend": backend, **NOISE}
    whole = fm.sample(network, x0, **options).x
    parts = [fm.sample(network, x0[ids], sample_ids=ids, **options).x for ids in (torch.tensor([4, 1, 3]), torch.tensor([0, 2, 5]))]
    assert torch.equal(torch.cat(parts)[[3, 1, 4, 2, 0, 5]], whole)
    torch.manual_seed(0)
    one, other = (fm.sample(network, x0, steps=4, churn=0.5).x for _ in range(2))
    torch.manual_seed(0)
    assert torch.equal(fm.sample(network, x0, steps=4, churn=0.5).x, one) and not torch.equal(one, other)


@pytest.mark.parametrize("method", ["euler", "midpoint"])
@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.3, 0.8)])
def test_guidance(interval, method, backend):
    y = torch.tensor([[0.5], [1.0], [-1.0]], dtype=torch.float64)[..., None]

    def model(x, t, y):
        return network(x, t) * y

    guidance = fm.Guidance(2.0, {"y": 0.0}, interval)
    found = fm.sample(model, X0, cond={"y": y}, guidance=guidance, method=method, steps=4, churn=0.5, backend=backend, **NOISE)
    each = fm.Guidance(torch.full((3,), 2.0, dtype=torch.float64), {"y": 0.0}, interval)
    mixed = fm.sample(model, X0, cond={"y": y}, guidance=each, method=method, steps=4, churn=0.5, backend=backend, **NOISE)
    torch.testing.assert_close(found.x, mixed.x, rtol=1e-12, atol=1e-12)
    guided = [interval[0] <= middle <= interval[1] for middle in (0.125, 0.375, 0.625, 0.875)]
    velocities = [lambda x, t, scale=scale: scale * network(x, t) * y for scale in (2.0 if here else 1.0 for here in guided)]
    expected = by_hand(velocities, X0, [0.0, 0.25, 0.5, 0.75, 1.0], 0.5, "ot", method)
    torch.testing.assert_close(found.x, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["euler", "midpoint"])
@pytest.mark.parametrize("field", [lambda x, t: x, lambda x, t: x.flip(0)], ids=["its input", "a view of it"])
def test_a_model_may_return_its_input(field, method, backend):
    found = fm.sample(field, X0, method=method, steps=4, churn=0.5, backend=backend, **NOISE).x
    copied = fm.sample(lambda x, t: field(x, t).clone(), X0, method=method, steps=4, churn=0.5, backend=backend, **NOISE).x
    assert torch.equal(found, copied)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_images_in_any_layout_and_saved_states(dtype, backend):
    x0 = fm.noise((2, 3, 4, 4), seed=0, step=0)
    options = {"method": "midpoint", "steps": 3, "churn": 0.5, "dtype": dtype, "save": "steps", "backend": backend, **NOISE}
    plain = fm.sample(lambda x, t: torch.tanh(x), x0, **options)
    last = fm.sample(lambda x, t: torch.tanh(x), x0.to(memory_format=torch.channels_last), **options)
    torch.testing.assert_close(last.saved, plain.saved, rtol=1e-5, atol=1e-5)
    assert plain.saved.shape == (4, 2, 3, 4, 4) and torch.equal(plain.saved[-1], plain.x) and plain.x.dtype == torch.float32


@pytest.mark.parametrize("grad", ["direct", "checkpoint"])
def test_gradients(grad):
    def solved(x, factor):
        return fm.sample(lambda y, t: torch.tanh(factor * y), x, method="midpoint", steps=3, churn=0.5, grad=grad, **NOISE).x

    factor = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(solved, (X0.clone().requires_grad_(), factor))
    with torch.no_grad():
        torch.testing.assert_close(solved(X0, factor), fm.sample(lambda y, t: torch.tanh(0.7 * y), X0, steps=3, churn=0.5, **NOISE).x)


def test_under_vmap():
    scales = torch.tensor([0.5, 1.5], dtype=torch.float64)

    def solved(scale):
        return fm.sample(lambda y, t: torch.tanh(scale * y), X0, steps=3, churn=0.5, **NOISE).x

    torch.testing.assert_close(vmap(solved)(scales), torch.stack([solved(scale) for scale in scales]), rtol=1e-6, atol=1e-6)


class Learned(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.power = torch.nn.Parameter(torch.ones((), dtype=torch.float64))

    def alpha(self, t):
        return t**self.power

    def d_alpha(self, t):
        return self.power * t ** (self.power - 1)

    def sigma(self, t):
        return 1 - t

    def d_sigma(self, t):
        return -torch.ones_like(t)


@pytest.mark.parametrize(
    ("changed", "kind", "message"),
    [
        ({"churn": -0.1}, ValueError, "churn must not be negative, got -0.1"),
        ({"churn": "much"}, TypeError, "churn must be a number, got str"),
        ({"method": "ab2"}, ValueError, "churn must be 0 for methods other than fixed-step Runge-Kutta ones, got 0.5 for 'ab2'"),
        ({"method": "dopri5", "steps": None}, ValueError, "churn must be 0 for methods other than fixed-step Runge-Kutta ones"),
        (
            {"churn": 0.0},
            ValueError,
            "seed needs churn > 0, without which nothing is drawn on the way, got 5",
        ),
        ({"churn": 0.0, "seed": None}, ValueError, "step needs churn > 0"),
        ({"churn": 0.0, "seed": None, "step": None, "sample_ids": 3}, ValueError, "sample_ids needs churn > 0"),
        ({"seed": -1}, ValueError, "seed must lie in"),
        (
            {"path": Learned(), "objective": "noise", "grad": "direct", "t0": 0.1},
            ValueError,
            "churn must be 0 where gradients of the path's own",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_refused(changed, kind, message):
    with pytest.raises(kind, match=message):
        fm.sample(network, X0, **{"steps": 3, "churn": 0.5, **NOISE, **changed})


def test_paths_of_ones_own_take_numbers():
    found = fm.sample(network, X0, path=Learned(), steps=3, churn=0.5, **NOISE).x
    torch.testing.assert_close(found, fm.sample(network, X0, path="ot", steps=3, churn=0.5, **NOISE).x, rtol=1e-9, atol=1e-9)
    assert np.isfinite(found.numpy()).all()


def test_a_path_is_not_asked_before_its_own_beginning():
    class Limited(fm.OT):
        t_min, starts_at_noise = 0.2, False

        def alpha(self, t):
            assert float(t.min()) >= 0.2
            return t

    assert fm.sample(network, X0, path=Limited(), steps=3, t0=0.2, churn=2.5, seed=5, step=7).x.isfinite().all()


@pytest.mark.parametrize("name", ["seed", "step", "sample_ids"])
def test_a_zero_given_in_vain_is_refused_too(name):
    with pytest.raises(ValueError, match=f"{name} needs churn > 0"):
        fm.sample(network, X0, steps=3, churn=0.0, **{name: 0})


def test_more_steps_than_the_noise_has_numbers_for_are_refused(monkeypatch):
    monkeypatch.setattr("fm_fast._solver.churn.INDEX_LIMIT", 3)
    with pytest.raises(ValueError, match="steps must be at most 3 with churn, got 4"):
        fm.sample(network, X0, steps=4, churn=0.5, seed=5, step=7)
    assert fm.sample(network, X0, steps=3, churn=0.5, seed=5, step=7).nfe == 6
