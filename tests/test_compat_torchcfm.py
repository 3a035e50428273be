"""Matchers with torchcfm's arguments: closed forms, its numbers from its seeds, and what is finite where its are not."""

import importlib
import math
import sys
import types
from types import SimpleNamespace

import pytest
import torch

from fm_fast.compat import torchcfm as ours
from fm_fast.compat.torchcfm.optimal_transport import wasserstein
from fm_fast.compat.torchdiffeq import odeint

MATCHERS = [
    "ConditionalFlowMatcher",
    "TargetConditionalFlowMatcher",
    "VariancePreservingConditionalFlowMatcher",
    "ExactOptimalTransportConditionalFlowMatcher",
    "SchrodingerBridgeConditionalFlowMatcher",
]
PAIRED = MATCHERS[3:]
ORDER = torch.tensor([5, 0, 7, 2, 1, 6, 4, 3])  # x1[i] lies next to x0[ORDER[i]]


def pair(dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    x1 = torch.randn(8, 3, 4, 4, generator=generator, dtype=torch.float64)
    near = x1 + 0.01 * torch.randn(8, 3, 4, 4, generator=generator, dtype=torch.float64)
    return near[ORDER.argsort()].to(dtype), x1.to(dtype)


def seeded(draw, *arguments, **more):
    with torch.random.fork_rng():
        torch.manual_seed(11)
        return draw(*arguments, **more)


def theirs():
    return pytest.importorskip("torchcfm.conditional_flow_matching", exc_type=ImportError)


def closed_form(name, sigma, x0, x1, t, epsilon):
    """(x_t, u_t) of the path's definition and its derivative."""
    t = t.reshape(-1, 1, 1, 1)
    if name == "TargetConditionalFlowMatcher":
        return t * x1 + (1 - (1 - sigma) * t) * epsilon, x1 - (1 - sigma) * epsilon
    if name == "VariancePreservingConditionalFlowMatcher":
        c, s = torch.cos(math.pi * t / 2), torch.sin(math.pi * t / 2)
        return s * x1 + c * x0 + sigma * epsilon, math.pi / 2 * (c * x1 - s * x0)
    mean = t * x1 + (1 - t) * x0
    if name == "SchrodingerBridgeConditionalFlowMatcher":
        root = torch.sqrt(t * (1 - t))
        return mean + sigma * root * epsilon, x1 - x0 + sigma * (1 - 2 * t) / (2 * root) * epsilon
    return mean + sigma * epsilon, x1 - x0


def test_the_plan_is_torchcfms():
    x0, x1 = pair()
    plan = pytest.importorskip("torchcfm.optimal_transport", exc_type=ImportError).OTPlanSampler("exact").get_map(x0, x1)
    torch.testing.assert_close(ours.OTPlanSampler("exact").get_map(x0, x1), plan, rtol=1e-12, atol=1e-12)


def test_every_pair_once_with_its_labels():
    x0, x1 = pair()
    paired = ours.OTPlanSampler().sample_plan_with_labels(x0, x1, ORDER.argsort(), 10 * torch.arange(8))
    assert torch.equal(paired[0], x0[ORDER]) and torch.equal(paired[1], x1)
    assert paired[2].tolist() == list(range(8)) and paired[3].tolist() == [10 * i for i in range(8)]
    assert ours.OTPlanSampler().sample_plan_with_labels(x0, x1)[2:] == (None, None)


def test_pairs_drawn_with_replacement():
    x0, x1 = pair()
    paired = [seeded(ours.OTPlanSampler().sample_plan, x0, x1, replace=True) for _ in range(2)]
    assert torch.equal(paired[0][0], paired[1][0]) and torch.equal(paired[0][1], paired[1][1]), "torch's generator draws them"
    place = torch.cdist(paired[0][1].flatten(1), x1.flatten(1)).argmin(1)
    assert torch.equal(paired[0][0], x0[ORDER[place]]) and len(place.unique()) < 8


def test_draws_from_a_plan():
    """As programs index what belongs to the samples: every pair once, or with replacement, from torch's generator."""
    x0, x1 = pair()
    sampler = ours.OTPlanSampler("exact")
    plan = sampler.get_map(x0, x1)
    i, j = sampler.sample_map(plan, len(x0), replace=False)
    assert sorted(j) == list(range(8)) and torch.equal(x0[i], x0[ORDER[j]]), "arrays that index tensors"
    i, j = seeded(sampler.sample_map, plan, 8)
    assert len(set(j)) < 8 and i.tolist() == ORDER[j].tolist()
    assert j.tolist() == seeded(sampler.sample_map, torch.from_numpy(plan), batch_size=8, replace=True)[1].tolist()


def test_draws_from_any_plan_follow_its_weights():
    """Of torchcfm's entropic plans too, also between batches of different sizes."""
    plan = torch.tensor([[0.0, 3.0, 0.0], [1.0, 0.0, 4.0]]).numpy()
    i, j = seeded(ours.OTPlanSampler().sample_map, plan, 8000)
    shares = torch.zeros(2, 3).index_put_((torch.as_tensor(i), torch.as_tensor(j)), torch.tensor(1 / 8000), accumulate=True)
    torch.testing.assert_close(shares, torch.from_numpy(plan / plan.sum()), rtol=0, atol=0.02)


@pytest.mark.parametrize(
    ("plan", "size", "message"),
    [
        (torch.eye(3), 4, "batch_size must be at most 3 with replace=False, the pairs of pi, got 4"),
        (torch.eye(3), 0, "batch_size must be at least 1, got 0"),
        (torch.ones(3), 1, r"pi must be a plan \[N, M\], got shape \(3,\)"),
        (torch.zeros(2, 2), 1, "pi must be finite, not negative, and positive somewhere"),
        (-torch.eye(2), 1, "pi must be finite, not negative"),
        (torch.full((2, 2), math.nan), 1, "pi must be finite"),
    ],
)
def test_what_is_no_plan_to_draw_from(plan, size, message):
    with pytest.raises(ValueError, match=message):
        ours.OTPlanSampler().sample_map(plan.numpy(), size, replace=False)


class Costly(ours.OTPlanSampler):
    """Of a cost of its own, as programs write it: the distance in one coordinate alone."""

    def get_map(self, x0, x1):
        weights = torch.full((len(x0),), 1 / len(x0)).numpy()
        costs = (x0[:, None, 0] - x1[None, :, 0]).abs()
        return self.ot_fn(weights, weights, (costs / costs.max() if self.normalize_cost else costs).numpy())


@pytest.mark.parametrize("name", PAIRED)
@pytest.mark.parametrize("settings", [{}, {"normalize_cost": True}], ids=str)
def test_a_plan_of_a_subclass_is_what_pairs_are_drawn_from(name, settings):
    x0 = torch.stack([torch.arange(8.0), torch.arange(8.0).flip(0) * 100.0], 1)
    x1 = x0.flip(0) * torch.tensor([1.0, -1.0])
    labels = torch.arange(8)
    sampler = Costly("exact", **settings)
    for replace in (None, True, False):
        one, other = seeded(sampler.sample_plan, x0, x1, replace=replace)
        assert torch.equal(one[:, 0], other[:, 0]) and (len(one.unique(dim=0)) == 8) == (replace is False)
        same, _, y0, y1 = seeded(sampler.sample_plan_with_labels, x0, x1, labels, labels, replace=replace)
        assert torch.equal(same, one) and torch.equal(y0, 7 - y1)
    matcher = getattr(ours, name)(0.5)
    matcher.ot_sampler = sampler
    half = torch.full((8,), 0.5)
    assert not matcher.sample_location_and_conditional_flow(x0, x1, half)[2][:, 0].any()
    _, _, ut, y0, y1 = matcher.guided_sample_location_and_conditional_flow(x0, x1, labels, labels, half)
    assert not ut[:, 0].any() and torch.equal(y0, 7 - y1)


def test_draws_of_a_subclass_are_used_between_batches_of_different_sizes():
    class First(ours.OTPlanSampler):
        def get_map(self, x0, x1):
            return torch.full((len(x0), len(x1)), 1.0).numpy()

        def sample_map(self, pi, batch_size, replace=True):
            return torch.arange(batch_size).numpy(), torch.full((batch_size,), pi.shape[1] - 1).numpy()

    x0, x1 = torch.randn(4, 2), torch.randn(6, 2)
    one, other, y0, y1 = First().sample_plan_with_labels(x0, x1, torch.arange(4), torch.arange(6))
    assert torch.equal(one, x0) and torch.equal(other, x1[-1:].expand(4, 2)) and y0.tolist() == [0, 1, 2, 3] and y1.tolist() == [5] * 4


def test_the_plan_of_any_costs():
    torch.manual_seed(0)
    costs, weights = torch.rand(12, 12).numpy(), torch.full((12,), 1 / 12).numpy()
    other = pytest.importorskip("torchcfm.optimal_transport", exc_type=ImportError).OTPlanSampler("exact").ot_fn
    torch.testing.assert_close(
        ours.OTPlanSampler().ot_fn(weights, weights, costs), other(weights.astype(float), weights.astype(float), costs)
    )
    for a, b, m in ((weights, weights[:6], costs[:, :6]), (2 * weights, weights, costs), (weights, weights, costs[0])):
        with pytest.raises(ValueError, match=r"a and b must be B equal weights of sum 1 and M costs \[B, B\], got \(12,\)"):
            ours.OTPlanSampler().ot_fn(a, b, m)
    with pytest.raises(ValueError, match="M must be finite"):
        ours.OTPlanSampler().ot_fn(weights, weights, costs * math.inf)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("shape", [(40, 3), (200, 2, 2, 2), (1, 5)], ids=str)
def test_the_distance_of_torchcfm(shape, power):
    other = pytest.importorskip("torchcfm.optimal_transport", exc_type=ImportError)
    generator = torch.Generator().manual_seed(1)
    x0, x1 = (torch.randn(shape, generator=generator) for _ in range(2))
    found = wasserstein(x0, x1 + 1.0, "exact", power=power)
    assert type(found) is float and found == pytest.approx(other.wasserstein(x0, x1 + 1.0, power=power), rel=1e-5)
    assert wasserstein(x0 + 100.0, x1 + 101.0, power=power) == pytest.approx(found, rel=1e-4)


@pytest.mark.parametrize("power", [1, 2])
def test_the_distance_of_samples_moved_and_shuffled(power):
    """By little enough that each is nearest to itself: the length of the move."""
    x = torch.arange(30.0).reshape(15, 2).requires_grad_()
    assert wasserstein(x[torch.randperm(15)] + torch.tensor([0.3, 0.4]), x, power=power) == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(3, 2), torch.ones(3, 2), "sinkhorn"), "method must be one of None, exact, got 'sinkhorn'"),
        ((torch.ones(3, 2), torch.ones(3, 2), None, 0.05, 3), "power must be one of 1, 2, got 3"),
        ((torch.ones(3, 2), torch.ones(4, 2)), "x0 must have the shape of x1"),
        ((torch.ones(0, 2), torch.ones(0, 2)), "x0 and x1 must hold at least one sample"),
        ((torch.full((3, 2), math.nan), torch.ones(3, 2), None, 0.05, 1), "x0 and x1 must be finite"),
        ((torch.full((3, 2), math.inf), torch.ones(3, 2)), "x0 and x1 must be finite"),
    ],
)
def test_what_has_no_distance(arguments, message):
    with pytest.raises(ValueError, match=message):
        wasserstein(*arguments)


@pytest.mark.parametrize("name", PAIRED)
def test_the_sampler_of_a_matcher(name):
    """As programs call it, on torchcfm's matchers too: there by draws from the plan."""
    x0, x1 = pair()
    labels = torch.arange(8)
    for module in (ours, theirs()):
        sampler = getattr(module, name)(0.5).ot_sampler
        for one, other in (sampler.sample_plan(x0, x1), sampler.sample_plan_with_labels(x0, x1, labels, 10 * labels)[:2]):
            assert float((one - other).abs().max()) < 0.1, "pairs lie next to each other"
        y0, y1 = sampler.sample_plan_with_labels(x0, x1, labels, 10 * labels)[2:]
        assert torch.equal(y0, ORDER[y1 // 10])
    found = getattr(ours, name)(0.5).ot_sampler.sample_plan(x0, x1)
    assert torch.equal(found[0], x0[ORDER]) and torch.equal(found[1], x1)
    found[1].zero_()
    assert bool(x1.any()), "a caller may write to what it is given"


@pytest.mark.parametrize("name", PAIRED)
def test_a_sampler_of_ones_own(name):
    class Backwards:
        def sample_plan(self, x0, x1):
            return x0.flip(0), x1

        def sample_plan_with_labels(self, x0, x1, y0=None, y1=None):
            return x0.flip(0), x1, y0.flip(0), y1

    x0, x1 = pair()
    matcher = getattr(ours, name)(0.5)
    matcher.ot_sampler = Backwards()
    _, _, ut, y0, _ = matcher.guided_sample_location_and_conditional_flow(x0, x1, torch.arange(8), torch.arange(8), torch.full((8,), 0.5))
    torch.testing.assert_close(ut, x1 - x0.flip(0))
    assert y0.tolist() == list(range(8))[::-1]
    torch.testing.assert_close(matcher.sample_location_and_conditional_flow(x0, x1, torch.full((8,), 0.5))[2], x1 - x0.flip(0))


def test_a_sampler_of_torchcfm_in_a_matchers_place():
    x0, x1 = pair()
    matcher = ours.ExactOptimalTransportConditionalFlowMatcher(0.0)
    matcher.ot_sampler = pytest.importorskip("torchcfm.optimal_transport", exc_type=ImportError).OTPlanSampler("sinkhorn", reg=1.0)
    _, xt, ut = matcher.sample_location_and_conditional_flow(x0, x1)
    assert xt.shape == ut.shape == x1.shape and bool(ut.isfinite().all())


SETTINGS = [{"reg": 2.0}, {"reg_m": 3.0}, {"normalize_cost": True}, {"num_threads": 2}, {"num_threads": "max"}, {"warn": False}]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_settings_that_change_no_exact_plan(setting):
    """Here and in torchcfm."""
    x0, x1 = pair()
    plan = ours.OTPlanSampler("exact").get_map(x0, x1)
    assert (ours.OTPlanSampler("exact", **setting).get_map(x0, x1) == plan).all()
    other = pytest.importorskip("torchcfm.optimal_transport", exc_type=ImportError).OTPlanSampler("exact", **setting)
    torch.testing.assert_close(other.get_map(x0, x1), plan, rtol=1e-12, atol=1e-12)


def test_a_sampler_of_other_plans_is_refused():
    with pytest.raises(ValueError, match="method must be one of exact, got 'sinkhorn'"):
        ours.OTPlanSampler("sinkhorn")
    x0, x1 = pair()
    with pytest.raises(ValueError, match="x0 must have the shape of x1"):
        ours.OTPlanSampler().sample_plan(x0[:5], x1)
    with pytest.raises(ValueError, match=r"y0 must have a label for each of the 8 samples, got shape \(3,\)"):
        ours.OTPlanSampler().sample_plan_with_labels(x0, x1, torch.arange(3))


@pytest.mark.parametrize("sigma", [0.0, 0.3])
@pytest.mark.parametrize("name", MATCHERS)
def test_closed_forms(name, sigma):
    x0, x1 = pair()
    sigma = sigma or (1.0 if name == MATCHERS[-1] else 0.0)
    matcher = getattr(ours, name)(sigma)
    t, xt, ut, epsilon = seeded(matcher.sample_location_and_conditional_flow, x0, x1, return_noise=True)
    assert t.shape == (8,) and t.dtype == x0.dtype and t.min() >= 0.0 and t.max() < 1.0
    paired = x0[ORDER] if name in PAIRED else x0
    error = 1e-5 if name == MATCHERS[-1] else 1e-12  # TINY in the quotient
    for found, expected in zip((xt, ut), closed_form(name, sigma, paired, x1, t, epsilon), strict=True):
        torch.testing.assert_close(found, expected, rtol=error, atol=error)
    if sigma == 0.0:
        assert len(seeded(matcher.sample_location_and_conditional_flow, x0, x1)) == 3
        torch.testing.assert_close(seeded(matcher.sample_location_and_conditional_flow, x0, x1)[1], xt)


@pytest.mark.parametrize("return_noise", [False, True])
@pytest.mark.parametrize("sigma", [0.0, 0.5])
@pytest.mark.parametrize("name", MATCHERS[:3])
def test_the_numbers_of_torchcfm(name, sigma, return_noise):
    x0, x1 = pair(torch.float32)
    draws = [
        seeded(getattr(module, name)(sigma).sample_location_and_conditional_flow, x0, x1, return_noise=return_noise)
        for module in (ours, theirs())
    ]
    assert len(draws[0]) == len(draws[1]) == 3 + return_noise
    for found, expected in zip(*draws, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MATCHERS)
def test_a_width_in_a_tensor(name):
    """Of torch's float32: the numbers of the same width as a number, and torchcfm's."""
    x0, x1 = pair(torch.float32)
    width, t = torch.tensor(0.5), torch.linspace(0.1, 0.9, 8)
    matcher, other = getattr(ours, name)(width), getattr(theirs(), name)(width)
    assert type(matcher.sigma) is float
    found = seeded(matcher.sample_location_and_conditional_flow, x0, x1, t=t)
    for one, same in zip(found, seeded(getattr(ours, name)(0.5).sample_location_and_conditional_flow, x0, x1, t=t), strict=True):
        assert torch.equal(one, same)
    noise = torch.ones_like(x0)
    xt = matcher.sample_xt(x0, x1, t, noise)
    torch.testing.assert_close(xt, other.sample_xt(x0, x1, t, noise))
    torch.testing.assert_close(matcher.compute_conditional_flow(x0, x1, t, xt), other.compute_conditional_flow(x0, x1, t, xt))


@pytest.mark.parametrize("name", MATCHERS)
def test_the_parts_of_torchcfm(name):
    x0, x1 = pair()
    t, epsilon = torch.linspace(0.05, 0.95, 8, dtype=torch.float64), torch.ones_like(x0)
    one, other = getattr(ours, name)(0.5), getattr(theirs(), name)(0.5)
    xt = other.sample_xt(x0, x1, t, epsilon)
    torch.testing.assert_close(one.sample_xt(x0, x1, t, epsilon), xt)
    torch.testing.assert_close(one.compute_mu_t(x0, x1, t), other.compute_mu_t(x0, x1, t))
    torch.testing.assert_close(one.compute_conditional_flow(x0, x1, t, xt), other.compute_conditional_flow(x0, x1, t, xt))
    for part in ("compute_sigma_t", "compute_lambda"):
        torch.testing.assert_close(torch.as_tensor(getattr(one, part)(t)), torch.as_tensor(getattr(other, part)(t)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["TargetConditionalFlowMatcher", "SchrodingerBridgeConditionalFlowMatcher"])
def test_velocities_are_finite_in_sixteen_bits_at_both_ends(name, dtype):
    x0, x1 = pair(dtype)
    matcher = getattr(ours, name)(1.0 if name in PAIRED else 0.0)
    for end in (0.0, 1.0):
        _, _, ut = seeded(matcher.sample_location_and_conditional_flow, x0, x1, t=torch.full((8,), end, dtype=dtype))
        assert ut.dtype == dtype and bool(ut.isfinite().all())


def test_no_noise_is_drawn_without_a_width():
    class Silent(ours.ConditionalFlowMatcher):
        def sample_noise_like(self, x):
            raise AssertionError("drawn")

    x0, x1 = pair()
    assert len(Silent().sample_location_and_conditional_flow(x0, x1)) == 3
    with pytest.raises(AssertionError, match="drawn"):
        Silent(0.1).sample_location_and_conditional_flow(x0, x1)


@pytest.mark.parametrize("name", ["TargetConditionalFlowMatcher", "SchrodingerBridgeConditionalFlowMatcher"])
def test_a_subclass_may_change_any_part(name):
    class Halved(getattr(ours, name)):
        def compute_conditional_flow(self, x0, x1, t, xt):
            return 0.5 * super().compute_conditional_flow(x0, x1, t, xt)

    x0, x1 = pair()
    arguments = (x0, x1, torch.full((8,), 0.3, dtype=torch.float64))
    whole = seeded(getattr(ours, name)(0.5).sample_location_and_conditional_flow, *arguments)
    half = seeded(Halved(0.5).sample_location_and_conditional_flow, *arguments)
    torch.testing.assert_close(half[2], 0.5 * whole[2], rtol=1e-6, atol=1e-6)


def test_a_width_of_ones_own_is_drawn_and_a_method_of_the_object_is_called():
    class Narrowing(ours.ConditionalFlowMatcher):
        def compute_sigma_t(self, t):
            return 0.5 * (1.0 - t)

    x0, x1 = pair()
    t, xt, _, epsilon = seeded(Narrowing(0.0).sample_location_and_conditional_flow, x0, x1, return_noise=True)
    torch.testing.assert_close(seeded(Narrowing(0.0).sample_location_and_conditional_flow, x0, x1)[1], xt)
    column = t.reshape(-1, 1, 1, 1)
    torch.testing.assert_close(xt, column * x1 + (1.0 - column) * x0 + 0.5 * (1.0 - column) * epsilon)
    matcher = ours.TargetConditionalFlowMatcher(0.1)
    matcher.compute_conditional_flow = lambda x0, x1, t, xt: torch.zeros_like(xt)
    assert not seeded(matcher.sample_location_and_conditional_flow, x0, x1)[2].any()


@pytest.mark.parametrize("name", MATCHERS)
def test_given_times_stay_as_they_are(name):
    x0, x1 = pair(torch.bfloat16)
    times = torch.linspace(0.99, 1.0, 8)
    t, xt, ut = seeded(getattr(ours, name)(0.5).sample_location_and_conditional_flow, x0, x1, t=times)
    assert torch.equal(t, times) and xt.dtype == ut.dtype == torch.bfloat16 and bool(ut.isfinite().all())


@pytest.mark.parametrize("name", PAIRED)
def test_labels_stay_with_their_samples(name):
    x0, x1 = pair()
    labels = torch.arange(8)
    draw = getattr(ours, name)(0.1).guided_sample_location_and_conditional_flow
    t, xt, ut, y0, y1 = seeded(draw, x0, x1, y0=10 * labels, y1=labels)
    assert torch.equal(y0, 10 * ORDER) and torch.equal(y1, labels)
    for found, expected in zip((t, xt, ut), seeded(getattr(ours, name)(0.1).sample_location_and_conditional_flow, x0, x1), strict=True):
        assert torch.equal(found, expected)
    assert seeded(draw, x0, x1, return_noise=True)[3:5] == (None, None)


WRONG = [
    (lambda x0, x1: ours.ConditionalFlowMatcher(-1.0), ValueError, "sigma must not be negative, got -1.0"),
    (lambda x0, x1: ours.ConditionalFlowMatcher(torch.tensor(-1.0)), ValueError, "sigma must not be negative, got -1.0"),
    (lambda x0, x1: ours.ConditionalFlowMatcher(torch.ones(2)), TypeError, "sigma must be a number, got Tensor"),
    (lambda x0, x1: ours.ConditionalFlowMatcher(torch.ones((), requires_grad=True)), ValueError, "sigma must not require a gradient"),
    (lambda x0, x1: ours.OTPlanSampler("exact", threads=2), TypeError, "unexpected keyword argument 'threads'"),
    (lambda x0, x1: ours.SchrodingerBridgeConditionalFlowMatcher(0.0), ValueError, "sigma must be positive, got 0.0"),
    (
        lambda x0, x1: ours.SchrodingerBridgeConditionalFlowMatcher(1.0, "sinkhorn"),
        ValueError,
        "ot_method must be one of exact, got 'sinkhorn'",
    ),
    (lambda x0, x1: (x0[:, :, :, :1], x1), ValueError, r"x0 must have the shape of x1, \(8, 3, 4, 4\), got \(8, 3, 4, 1\)"),
    (lambda x0, x1: (x0.float(), x1), TypeError, "x0 must have the dtype of x1, torch.float64, got torch.float32"),
    (lambda x0, x1: (x0.long(), x1), TypeError, "x0 must be float64, float32, bfloat16 or float16, got torch.int64"),
    (lambda x0, x1: (x0, x1, torch.full((8,), 1.5)), ValueError, r"t must lie in \[0, 1\]"),
    (lambda x0, x1: (x0, x1, torch.rand(3)), ValueError, r"^t must have shape \[8\], got \(3,\)"),
    (lambda x0, x1: (x0, x1, torch.rand(8, 1)), ValueError, r"^t must have shape \[8\], got \(8, 1\)"),
    (lambda x0, x1: (x0, x1, 0.5), TypeError, "t must be a torch.Tensor, got float"),
]


@pytest.mark.parametrize(("given", "kind", "message"), WRONG)
@pytest.mark.parametrize("name", ["ConditionalFlowMatcher", "ExactOptimalTransportConditionalFlowMatcher"])
def test_wrong_arguments(name, given, kind, message):
    with pytest.raises(kind, match=message):
        getattr(ours, name)().sample_location_and_conditional_flow(*given(*pair()))


def test_a_bridge_is_no_exact_matcher():
    """Which programs tell apart by their classes."""
    bridge = ours.SchrodingerBridgeConditionalFlowMatcher(0.5)
    assert not isinstance(bridge, ours.ExactOptimalTransportConditionalFlowMatcher) and bridge.ot_method == "exact"


def test_a_bridge_of_almost_no_width_warns():
    with pytest.warns(UserWarning, match="sigma = 0.0001 makes the bridge's velocity very large"):
        ours.SchrodingerBridgeConditionalFlowMatcher(1e-4)


def test_a_step_trains_a_network():
    """The loop of torchcfm's readme, with one import changed."""
    torch.manual_seed(0)
    matcher = importlib.import_module("fm_fast.compat.torchcfm").ConditionalFlowMatcher(sigma=0.0)
    model = torch.nn.Linear(3, 2)
    optimiser = torch.optim.Adam(model.parameters(), 0.05)
    losses = []
    for _ in range(200):
        x1 = torch.tensor([2.0, -1.0]) + 0.1 * torch.randn(64, 2)
        t, xt, ut = matcher.sample_location_and_conditional_flow(torch.randn_like(x1), x1)
        loss = torch.mean((model(torch.cat([xt, t[:, None]], 1)) - ut) ** 2)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert sum(losses[-20:]) < 0.5 * sum(losses[:20])


def test_times_of_float64_data_are_torchcfms():
    x0, x1 = pair()
    t, _, _ = seeded(ours.TargetConditionalFlowMatcher(sigma=0.1).sample_location_and_conditional_flow, x0, x1)
    with torch.random.fork_rng():
        torch.manual_seed(11)
        assert torch.equal(t, torch.rand(8).double())
    wanted, _, _ = seeded(theirs().TargetConditionalFlowMatcher(sigma=0.1).sample_location_and_conditional_flow, x0, x1)
    assert torch.equal(t.float(), wanted.float())


def test_a_subclass_that_places_points_itself_gets_its_noise():
    class Blurred(ours.ConditionalFlowMatcher):
        def sample_xt(self, x0, x1, t, epsilon):
            return x0 + 0.1 * epsilon

    x0, x1 = pair()
    draw = Blurred(sigma=0.0).sample_location_and_conditional_flow
    _, xt, _, epsilon = seeded(draw, x0, x1, return_noise=True)
    torch.testing.assert_close(xt, x0 + 0.1 * epsilon)
    assert torch.equal(seeded(draw, x0, x1)[1], xt)


def test_a_model_of_points_and_times_as_a_field(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdyn", types.ModuleType("torchdyn"))  # of which its utilities want a data set
    monkeypatch.setitem(sys.modules, "torchdyn.datasets", SimpleNamespace(generate_moons=None))
    other = pytest.importorskip("torchcfm.utils", exc_type=ImportError)
    model, x = torch.nn.Linear(3, 2), torch.randn(5, 2)
    field = ours.utils.torch_wrapper(model)
    for t in (torch.tensor(0.25), torch.tensor([0.25])):
        assert torch.equal(field(t, x, "more", args=None), other.torch_wrapper(model)(t, x))
    assert torch.equal(field(torch.full((5,), 0.25, dtype=torch.float64), x), field(torch.tensor(0.25), x))
    states = odeint(field, x, torch.linspace(0.0, 1.0, 3), method="dopri5", rtol=1e-4, atol=1e-4)
    assert states.shape == (3, 5, 2) and [name for name, _ in field.named_parameters()] == ["model.weight", "model.bias"]


@pytest.mark.parametrize("name", ["VariancePreserving", "Target", "SchrodingerBridge"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits_of_the_times_round_the_times_alone(name, dtype):
    """Not the sines and roots of them."""
    matcher = getattr(ours, f"{name}ConditionalFlowMatcher")(sigma=0.5)
    x0, x1 = pair(torch.float32)
    times = torch.linspace(0.1, 0.9, len(x0)).to(dtype)
    found = []
    for t in (times, times.double()):
        torch.manual_seed(0)
        found.append(matcher.sample_location_and_conditional_flow(x0, x1, t=t, return_noise=True)[1:3])
    for rounded, exact in zip(*found, strict=True):
        torch.testing.assert_close(rounded, exact, rtol=1e-5, atol=1e-5)
