"""Small things about solves and guidance that users depend on and no other test looks at."""

from typing import NamedTuple

import numpy as np
import pytest
import torch

import fm_fast as fm
from fm_fast._philox import INDEX_LIMIT
from fm_fast._solver.estimator import Estimator
from fm_fast._solver.probes import make_probes

ZERO = torch.zeros(2, 3, dtype=torch.float64)


def wall(x, t):
    """dx/dt = 100 (1.004 - x), infinite where x > 1.005, which the solution from 1 never reaches: x = 1.004 - 0.004 exp(-100 t)."""
    return torch.where(x > 1.005, torch.inf, 100.0 * (1.004 - x))


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("method", ["dopri5", "bosh3"])
def test_a_guess_of_the_first_step_that_meets_infinity_is_only_a_guess(method, per_sample):
    """The trial step moves x by a hundredth, into the wall."""
    x0 = torch.ones(1, 3, dtype=torch.float64)
    found = fm.sample(wall, x0, method=method, per_sample=per_sample, rtol=1e-7, atol=1e-7)
    exact = 1.004 - 0.004 * torch.exp(torch.tensor(-100.0, dtype=torch.float64))
    torch.testing.assert_close(found.x, exact.expand(1, 3), rtol=0, atol=1e-6)


def test_an_empty_batch_costs_no_evaluation():
    for per_sample in (False, True):
        found = fm.sample(lambda x, t: x, ZERO[:0], method="dopri5", per_sample=per_sample, save=[0.5])
        assert found.nfe == 0 and found.x.shape == (0, 3) and found.saved.shape == (1, 0, 3)
    assert found.nfe_of_each.shape == (0,) and found.nfe_of_each.dtype == torch.int64


class Pose(NamedTuple):
    speed: torch.Tensor
    name: str


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("kind", [Pose, lambda *parts: parts, lambda *parts: list(parts)], ids=["named tuple", "tuple", "list"])
def test_conditions_keep_their_kind_when_samples_leave_the_batch(kind, guided):
    """The model of a batch that shrinks is given what it is given in a whole one: x' = speed x."""
    speed, x0, kinds = torch.tensor([0.0, 0.0, 0.0, 20.0], dtype=torch.float64), torch.ones(4, 2, dtype=torch.float64), set()
    cond = {"pose": kind(speed, "gripper"), "y": torch.ones(4)}

    def model(x, t, pose, y):
        kinds.add((len(x), type(pose)))
        return x * pose[0][:, None]

    guidance = fm.Guidance(1.5, {"y": 0}) if guided else None
    found = fm.sample(model, x0, cond=cond, guidance=guidance, method="dopri5", per_sample="shrink", rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.x, x0 * speed.exp()[:, None], rtol=1e-6, atol=0)
    assert {size for size, _ in kinds} >= ({2, 8} if guided else {1, 4})  # some have left
    assert {each for _, each in kinds} == {type(cond["pose"])}


def test_a_null_number_is_the_one_that_was_given():
    """Not its nearest float32, which is another class from 2^24 on, and another number at 0.1."""
    seen = []

    def model(x, t, label, scale):
        seen.append((label.tolist(), scale.tolist()))
        return x[..., :] * 0

    cond = {"label": torch.tensor([5, 6]), "scale": torch.tensor([0.5, 0.6], dtype=torch.float64)}
    guidance = fm.Guidance(2.0, {"label": 2**24 + 1, "scale": 0.1})
    fm.sample(model, ZERO, cond=cond, guidance=guidance, method="euler", steps=1)
    assert seen[0] == ([5, 6, 2**24 + 1, 2**24 + 1], [0.5, 0.6, 0.1, 0.1])


def test_the_order_of_shared_names_makes_no_other_guidance():
    one, other = (fm.Guidance(2.0, {"y": 0}, shared=names) for names in (("a", "b"), ("b", "a")))
    assert one == other and one != fm.Guidance(2.0, {"y": 0}, shared=("a",))


@pytest.mark.parametrize("mode", ["loop", "batched", "auto"])
def test_an_exact_divergence_in_low_precision_is_summed_in_float64(mode):
    """256 + 1 is 256 in bfloat16."""
    diagonal = torch.tensor([256.0, 1.0, 0.0], dtype=torch.bfloat16)
    x = torch.ones(2, 3, dtype=torch.bfloat16)
    found = fm.divergence(lambda x, t: x * diagonal, x, 0.5, kind="exact", mode=mode)
    assert found.div.tolist() == [257.0, 257.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("direction", ["sample", "encode"])
def test_states_on_the_way_of_each_sample_in_low_precision(direction, dtype):
    """x' = speed x, of a float32 state."""
    speed, x0 = torch.tensor([0.0, 1.0, -2.0]), torch.ones(3, 2, dtype=dtype)
    found = getattr(fm, direction)(lambda x, t: speed[:, None] * x, x0, method="dopri5", per_sample=True, save=[0.25, 0.5])
    start = 0.0 if direction == "sample" else 1.0
    for time, state in zip(found.saved_t, found.saved, strict=True):
        exact = (speed * (time - start)).exp()[:, None].expand(3, 2)
        torch.testing.assert_close(state.float(), exact, rtol=1e-4 if dtype == torch.float32 else 1e-2, atol=0)


def test_a_condition_of_another_size_than_the_batch_is_the_same_in_both_halves():
    """It belongs to no sample, also without being named as shared; and it cannot be replaced."""
    features, seen = torch.ones(5, 2), []

    def model(x, t, y, features):
        seen.append(features)
        return x * 0

    cond, options = {"y": torch.ones(2), "features": features}, {"method": "euler", "steps": 1}
    fm.sample(model, ZERO, cond=cond, guidance=fm.Guidance(2.0, {"y": -1.0}), **options)
    assert all(each is features for each in seen)
    with pytest.raises(ValueError, match=r"guidance.null\['features'\]: only conditions that are tensors with one entry a sample"):
        fm.sample(model, ZERO, cond=cond, guidance=fm.Guidance(2.0, {"features": 0.0}), **options)


def test_an_equal_null_of_what_is_no_tensor_is_no_replacement():
    guidance, seen = fm.Guidance(2.0, {"y": -1.0, "size": [8, 8]}), []

    def model(x, t, y, size):
        seen.append(size)
        return x * 0

    fm.sample(model, ZERO, cond={"y": torch.ones(2), "size": [8, 8]}, guidance=guidance, method="euler", steps=1)
    assert seen == [[8, 8]]


def test_guidance_with_scales_may_be_made_under_vmap():
    """Where its values cannot be looked at: x' = (1 + scale (2 - 1)) x by one step of Euler."""
    scales = torch.tensor([[0.5, 1.0], [2.0, 3.0]], dtype=torch.float64)

    def solve(scale):
        guidance = fm.Guidance(scale, {"y": 1.0})
        return fm.sample(
            lambda x, t, y: x * y[:, None], torch.ones_like(ZERO), cond={"y": torch.full((2,), 2.0)}, guidance=guidance, method="euler",
            steps=1,
        ).x  # fmt: skip

    torch.testing.assert_close(torch.func.vmap(solve)(scales), (2.0 + scales)[..., None].expand(2, 2, 3))


@pytest.mark.parametrize("per_sample", [False, True])
def test_max_steps_is_the_number_of_steps_that_may_be_tried(per_sample):
    """Standing still, every step counts: the number that the solve takes is enough, and one less is not."""
    options = {"method": "dopri5", "per_sample": per_sample, "rtol": 1e-6, "atol": 1e-6}
    counts = [fm.sample(lambda x, t: x * 0, ZERO, **options).nfe]
    steps = (counts[0] - 2) // 6  # two evaluations before the first step, six for each
    assert fm.sample(lambda x, t: x * 0, ZERO, max_steps=steps, **options).nfe == counts[0]
    with pytest.raises(RuntimeError, match=f"max_steps={steps - 1}"):
        fm.sample(lambda x, t: x * 0, ZERO, max_steps=steps - 1, **options)


def test_a_step_cut_at_a_wanted_time_does_not_shorten_the_next():
    """dopri8 ends its steps at such times: each wanted time costs one more step, of 13 evaluations."""
    options = {"method": "dopri8", "rtol": 1e-6, "atol": 1e-6}
    once, twice = (
        fm.sample(lambda x, t: 2.0 * torch.cos(3.0 * x), ZERO + 1.0, save=save, **options).nfe for save in ([0.5], [0.5, 0.5001])
    )
    assert twice == once + 13


def test_draws_of_probes_do_not_run_out_unnoticed():
    """Beyond 2^24 the numbers of the draws would repeat."""
    key, probes = torch.zeros(3, dtype=torch.int64), make_probes("rademacher", 2, 1, (1, 3), torch.device("cpu"))
    estimator = Estimator(probes, key, 1, "loop", None, False, "reference")
    network, x = (lambda x: x * torch.arange(3.0)), torch.ones(1, 3)
    estimator.add(estimator.record(network, x), INDEX_LIMIT - 2, 0.0, 1.0)
    assert estimator.sums[0].tolist() == [3.0]  # a diagonal Jacobian's trace is exact with signs
    with pytest.raises(ValueError, match=f"probes x evaluations must stay below {INDEX_LIMIT}"):
        estimator.add(estimator.record(network, x), INDEX_LIMIT - 1, 0.0, 1.0)


class Scaled(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, x, t, y=None, more=None):
        return -self.scale * x * (1.0 if y is None else y[:, None]) * (1.0 if more is None else more["z"][0])


@pytest.mark.parametrize("guided", [False, True])
def test_likelihoods_of_conditions_that_were_made_in_inference_mode(guided):
    """Autograd refuses to keep them, so copies go to the model."""
    x, y, z, model = torch.randn(4, 2), torch.rand(4), torch.tensor(0.5), Scaled()

    def found(x, y, z, scale):
        cond, guidance = {"y": y, "more": {"z": (z,)}}, fm.Guidance(scale, {"y": 0.0}) if guided else None
        settings = {"cond": cond, "guidance": guidance, "kind": "exact"}
        log_prob = fm.sample_with_log_prob(model, x, steps=3, **settings).logp
        return fm.log_likelihood(model, x, steps=3, **settings).logp, log_prob, fm.divergence(model, x, 0.5, **settings).div

    scale = torch.full((4,), 2.0)
    expected = found(x, y, z, scale)
    with torch.inference_mode():
        made = found(*(value.clone() for value in (x, y, z, scale)))
    for one, other in zip(made, expected, strict=True):
        torch.testing.assert_close(one, other)


class Through(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)

    def forward(self, x, t):
        return self.layer(x)


def test_a_model_that_was_made_in_inference_mode_is_refused_and_left_as_it_was():
    with torch.inference_mode():
        model = Through()
        for call in (
            lambda: fm.log_likelihood(model, torch.randn(4, 2), steps=2),
            lambda: fm.divergence(model, torch.randn(4, 2), 0.5),
            lambda: fm.log_likelihood(model, torch.randn(4, 2), steps=2, create_graph=True),
        ):
            with pytest.raises(
                RuntimeError, match=r"model must hold no tensors that were made in inference mode, .* make or load it outside"
            ):
                call()
        assert all(p.requires_grad for p in model.parameters())
        assert fm.sample(model, torch.randn(4, 2), steps=2).x.shape == (4, 2)


class Informed(torch.nn.Module):
    """With a part that no gradient goes through."""

    def __init__(self):
        super().__init__()
        with torch.inference_mode():
            self.encoder = torch.nn.Linear(2, 2)

    def forward(self, x, t):
        with torch.no_grad():
            shift = self.encoder(torch.ones(2))
        return -x + shift.clone()


def test_a_part_of_inference_mode_that_no_gradient_goes_through_may_stay():
    assert torch.equal(fm.divergence(Informed(), torch.randn(3, 2), 0.5, kind="exact").div, torch.full((3,), -2.0))


def test_conditions_that_a_model_writes_into_are_the_callers_own():
    seen = []

    def model(x, t, seen):
        seen.append(float(t[0]))
        return -x

    fm.log_likelihood(model, torch.randn(3, 2), cond={"seen": seen}, steps=2)
    assert len(seen) > 0


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.2, 0.6)])
def test_the_divergence_of_guidance_at_many_times(interval):
    """Under vmap over a scalar time, whose value nobody can look at."""
    x, y = torch.randn(4, 2, dtype=torch.float64), torch.rand(4, dtype=torch.float64)
    guidance, times = fm.Guidance(2.0, {"y": 0.0}, interval=interval), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)

    def divergence(t):
        return fm.divergence(lambda x, t, y: torch.sin(x) * (y + t)[:, None], x, t, cond={"y": y}, guidance=guidance, kind="exact").div

    torch.testing.assert_close(torch.func.vmap(divergence)(times), torch.stack([divergence(t) for t in times]))


def test_the_ends_of_a_rounded_grid_are_its_ends():
    x0, model = torch.ones(1, 2), lambda x, t: -x
    rounded = torch.linspace(0.1, 0.9, 5)
    for grid in (rounded, rounded.numpy(), rounded.tolist(), rounded.double()):
        assert torch.equal(fm.sample(model, x0, grid=grid, t0=0.1, t1=0.9).x, fm.sample(model, x0, grid=grid).x)
    with pytest.raises(ValueError, match="t0 and t1 must be left out or equal the ends of grid"):
        fm.sample(model, x0, grid=torch.linspace(0.1, 0.9, 5), t0=0.1, t1=0.90001)


@pytest.mark.parametrize(("ends", "time"), [((0.0, 0.5), 0.500015), ((0.3, 1.0), 0.299985)])
def test_a_time_to_save_outside_of_the_solve_is_refused_however_near(ends, time):
    x0, (t0, t1) = torch.ones(1, 2), ends
    with pytest.raises(ValueError, match="save must lie inside the solve"):
        fm.sample(lambda x, t: -x, x0, steps=4, t0=t0, t1=t1, save=[time])
    # The path's own margins, and rounding, are forgiven.
    assert fm.sample(lambda x, t: -x, x0, path="vp", steps=4, save=[0.0, 1.0]).saved.shape == (2, 1, 2)
    for times in (torch.tensor([0.7]), torch.tensor([0.7]).double(), np.cumsum(np.full(7, 0.1))[-1:]):
        assert fm.sample(lambda x, t: -x, x0, steps=4, t1=0.7, save=times).saved.shape == (1, 1, 2)
    assert fm.sample(lambda x, t: -x, x0, steps=4, t1=0.3, save=torch.linspace(0, 0.3, 4).double()).saved_t[-1] == 0.3
