"""16-bit weights that others write, copies of AdamWEMA together with its model, and the state of torch.optim.AdamW."""

import copy
import pickle

import pytest
import torch
from optimiser_cases import AVERAGES, HALF_TYPES, gradients, half_steps, network

from fm_fast.train.optimiser.adamw_ema import AdamWEMA


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
def test_masters_follow_weights_that_are_loaded(dtype, backend):
    """Before the first step and later; the step then is that of an optimiser that was made with those weights, moments aside."""
    model = network(dtype)
    optimiser = AdamWEMA(model.parameters(), 1e-3, averages=AVERAGES, backend=backend)
    for step in range(3):
        model.load_state_dict({name: torch.full_like(value, 5.0 + step) for name, value in model.state_dict().items()})
        half_steps(model, optimiser, [step])
        for p in model.parameters():
            torch.testing.assert_close(p.float(), torch.full_like(p, 5.0 + step).float(), rtol=0, atol=0.04)
            master = optimiser.state[p]["master"]
            assert float((master - (5.0 + step)).abs().max()) < 2e-3 and torch.equal(p, master.to(dtype))


def test_only_what_was_written_is_taken():
    """A weight that still is its master rounded keeps the master's other digits; clamping in every step loses none."""
    model = network(torch.bfloat16)
    optimiser = AdamWEMA(model.parameters(), 1e-5)
    half_steps(model, optimiser, range(5))
    weight, master = model[4].weight, optimiser.state[model[4].weight]["master"]
    before = master.clone()
    assert not torch.equal(before, weight.float())
    with torch.no_grad():
        weight.clamp_(-1.0, 1.0)
        weight[0, :3] = 0.5
    optimiser.zero_grad()
    optimiser.step()
    assert torch.equal(master[1], before[1]) and torch.equal(master[0, 3:], before[0, 3:])
    assert master[0, :3].tolist() == weight[0, :3].tolist() == [0.5] * 3


def test_loaded_weights_are_in_the_state_that_is_stored():
    model = network(torch.bfloat16)
    optimiser = AdamWEMA(model.parameters())
    model.load_state_dict({name: torch.full_like(value, 5.0) for name, value in model.state_dict().items()})
    assert all(torch.equal(entry["master"], torch.full_like(entry["master"], 5.0)) for entry in optimiser.state_dict()["state"].values())


def test_the_moments_of_a_run_do_not_bring_its_weights_back():
    """As for float32 weights, the state of an optimiser changes no weight of a model that got others."""
    model, other = network(torch.bfloat16), network(torch.bfloat16)
    optimiser, stored = AdamWEMA(model.parameters(), 1e-3), AdamWEMA(other.parameters(), 1e-3)
    half_steps(other, stored, range(2))
    model.load_state_dict({name: torch.full_like(value, 5.0) for name, value in model.state_dict().items()})
    optimiser.load_state_dict(stored.state_dict())
    half_steps(model, optimiser, [2])
    torch.testing.assert_close(model[4].weight.float(), torch.full((2, 144), 5.0), rtol=0, atol=0.04)


@pytest.mark.parametrize("order", ["model first", "optimiser first"])
def test_masters_are_restored_exactly_in_either_order(order):
    model = network(torch.bfloat16)
    optimiser = AdamWEMA(model.parameters(), 1e-5, averages=AVERAGES)
    half_steps(model, optimiser, range(5))
    again = network(torch.bfloat16)
    restored = AdamWEMA(again.parameters(), 1e-5, averages=AVERAGES)
    pairs = [(again, copy.deepcopy(model.state_dict())), (restored, copy.deepcopy(optimiser.state_dict()))]
    for target, stored in pairs if order == "model first" else reversed(pairs):
        target.load_state_dict(stored)
    assert_same_future(model, optimiser, again, restored)


def assert_same_future(model, optimiser, again, other):
    for net, steps in ((model, optimiser), (again, other)):
        half_steps(net, steps, range(5, 8))
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)
        assert all(torch.equal(value, other.state[q][name]) for name, value in optimiser.state[p].items())


# Copies


def copied(pair):
    return copy.deepcopy(pair)


def pickled(pair):
    return pickle.loads(pickle.dumps(pair))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("duplicate", [copied, pickled])
def test_a_copy_goes_on_with_the_copied_model(duplicate, dtype):
    model = network(dtype).to(memory_format=torch.channels_last)
    optimiser = AdamWEMA(model.parameters(), 1e-3, averages=AVERAGES, max_norm=0.5)
    optimiser.param_groups[0]["lr"] = 1e-4
    half_steps(model, optimiser, range(5))
    again, other = duplicate((model, optimiser))
    assert other.averages == AVERAGES and torch.equal(other.gradient_norm, optimiser.gradient_norm)
    before = [p.detach().clone() for p in model.parameters()]
    half_steps(again, other, [99])
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)) and int(optimiser.updates) == 5
    again, other = duplicate((model, optimiser))
    assert_same_future(model, optimiser, again, other)
    assert torch.equal(other.average(again)[0].weight, optimiser.average(model)[0].weight)


def test_a_copy_of_the_optimiser_alone_and_of_kept_gradients():
    model = network()
    optimiser = AdamWEMA(model.parameters(), 0.1, backend="reference")
    optimiser.keep_gradients()
    other = copy.deepcopy(optimiser)
    (weight, *_) = other.param_groups[0]["params"]
    weight.grad = torch.ones_like(weight)
    other.step()
    assert not torch.equal(weight, model[0].weight) and len(other._kept) == len(optimiser._kept)
    assert len(pickle.dumps(optimiser)) < 4 * sum(p.numel() * p.element_size() for p in model.parameters()) + 20_000


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("late", [False, True])
def test_training_goes_on_from_the_state_of_torchs_adamw(late, backend):
    """Some parameters have had fewer gradients than others, or none."""
    settings = {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.1}
    model = network()
    theirs = torch.optim.AdamW(model.parameters(), **settings)

    def step(model, optimiser, number):
        gradients(model, number)
        for i, p in enumerate(model.parameters()):
            if late and number < 2 * (i % 3):
                p.grad = None
        optimiser.step()

    for number in range(3):
        step(model, theirs, number)
    other = copy.deepcopy(model)
    ours = AdamWEMA(other.parameters(), averages=AVERAGES, backend=backend)
    ours.load_state_dict(theirs.state_dict())
    assert int(ours.updates) == 3 and ours.param_groups[0]["betas"] == (0.8, 0.95) and "amsgrad" not in ours.param_groups[0]
    for number in range(3, 8):
        step(model, theirs, number)
        step(other, ours, number)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=2e-6, atol=1e-7)
    AdamWEMA(other.parameters(), averages=AVERAGES).load_state_dict(ours.state_dict())


@pytest.mark.parametrize("name", ["amsgrad", "maximize"])
def test_what_torchs_adamw_does_beyond_is_refused(name):
    model = network()
    theirs = torch.optim.AdamW(model.parameters(), **{name: True})
    with pytest.raises(ValueError, match=f"state_dict: expected {name}=False, which is all that this optimiser does, got True"):
        AdamWEMA(model.parameters()).load_state_dict(theirs.state_dict())


def test_the_weight_decay_of_adam_is_refused():
    model = network()
    AdamWEMA(model.parameters()).load_state_dict(torch.optim.Adam(model.parameters()).state_dict())
    with pytest.raises(ValueError, match=r"state_dict: expected AdamW's weight decay, got Adam's, 0\.1"):
        AdamWEMA(model.parameters()).load_state_dict(torch.optim.Adam(model.parameters(), weight_decay=0.1).state_dict())
