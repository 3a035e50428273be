"""Parameters that AdamWEMA gets after it was made, as of layers that are no longer frozen."""

import copy
import pickle

import pytest
import torch
from optimiser_cases import AVERAGES, HALF_TYPES, gradients, network
from torch import nn

from fm_fast.train.optimiser.adamw_ema import AdamWEMA


def parts(model):
    """(Parameters of the last layer, those of the others)."""
    last = list(model[-1].parameters())
    return last, [p for p in model.parameters() if all(p is not q for q in last)]


def train(model, optimiser, steps):
    for step in steps:
        gradients(model, step)
        optimiser.step()


def unfrozen(model, at=3, until=7, **settings):
    """Trained for a while in its last layer, then as a whole."""
    last, others = parts(model)
    optimiser = AdamWEMA(last, 1e-2, averages=AVERAGES, **settings)
    train(model, optimiser, range(at))
    optimiser.add_param_group({"params": others, "lr": 3e-3, "weight_decay": 0.2})
    train(model, optimiser, range(at, until))
    return optimiser


def values(model):
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("backend", ["reference", None])
def test_new_parameters_are_updated_as_by_torch(backend):
    model, other = network(), network()
    last, others = parts(other)
    theirs = torch.optim.AdamW(last, 1e-2)
    train(other, theirs, range(3))
    theirs.add_param_group({"params": others, "lr": 3e-3, "weight_decay": 0.2})
    train(other, theirs, range(3, 7))
    ours = unfrozen(model, backend=backend)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert (int(ours.updates), int(ours.skipped)) == (7, 0)
    assert [int(ours.state[p]["updates"]) for group in ours.param_groups for p in group["params"]] == [7, 7, 4, 4, 4, 4]


def test_averages_of_new_parameters_begin_with_them():
    model, old = network(), network()
    last, others = parts(model)
    optimiser = AdamWEMA(last, 1e-2, averages=AVERAGES)
    train(model, optimiser, range(3))
    before, given_out = [p.clone() for p in optimiser.average(model[-1], 1).parameters()], optimiser.average(model[-1], 1)
    optimiser.add_param_group({"params": others})
    whole = optimiser.average(model, 1)
    assert all(torch.equal(p, q) for p, q in zip(parts(whole)[0], before, strict=True))
    assert all(torch.equal(p, q) for p, q in zip(parts(whole)[1], parts(old)[1], strict=True))
    train(model, optimiser, range(3, 5))
    assert all(torch.equal(p, q) for p, q in zip(given_out.parameters(), before, strict=True)), "those given out stay"
    assert not any(torch.equal(p, q) for p, q in zip(parts(whole)[0], before, strict=True)), "those given out since move"


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
def test_masters_stay(dtype):
    """Against one optimiser that has had all groups from the beginning."""
    model, other = network(dtype), network(dtype)
    last, others = parts(other)
    whole = AdamWEMA([{"params": last}, {"params": others, "lr": 3e-3, "weight_decay": 0.2}], 1e-2, averages=AVERAGES)
    for step in range(3):
        gradients(other, step)
        for p in others:
            p.grad = None
        whole.step()
    train(other, whole, range(3, 7))
    unfrozen(model)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert p.dtype == dtype and torch.equal(p, q)


def test_the_state_goes_on_in_another_process():
    model = network()
    optimiser = unfrozen(model)
    again = network()
    again.load_state_dict(model.state_dict())
    last, others = parts(again)
    other = AdamWEMA([{"params": last}, {"params": others}], averages=AVERAGES)
    other.load_state_dict(copy.deepcopy(optimiser.state_dict()))
    copied, of_copy = pickle.loads(pickle.dumps((model, optimiser)))
    for network_, optimiser_ in ((model, optimiser), (again, other), (copied, of_copy)):
        train(network_, optimiser_, range(7, 9))
    for p, q, r in zip(model.parameters(), again.parameters(), copied.parameters(), strict=True):
        assert torch.equal(p, q) and torch.equal(p, r)


def test_gradients_are_still_kept():
    model = network()
    last, others = parts(model)
    optimiser = AdamWEMA(last)
    optimiser.keep_gradients()
    optimiser.add_param_group({"params": others})
    gradients(model, 0)
    optimiser.step()
    assert [kept.data_ptr() for kept in optimiser._gradients()] == [kept.data_ptr() for kept in optimiser._kept]
    assert len(optimiser._kept) == 6


@pytest.mark.parametrize(
    ("group", "error", "message"),
    [
        (lambda model: {"params": parts(model)[0]}, ValueError, "more than one parameter group"),
        (lambda model: {"params": [nn.Parameter(torch.ones(3).double())]}, ValueError, "parameters: expected float64, or float32"),
        (lambda model: {"params": [nn.Parameter(torch.ones(3, device="meta"))]}, ValueError, "parameters: expected one device"),
        (lambda model: {"params": parts(model)[1], "lr": -1.0}, ValueError, "lr: expected 0 or more"),
        (lambda model: {"params": ["weight"]}, TypeError, "optimizer can only optimize Tensors"),
    ],
)  # fmt: skip
def test_a_group_that_cannot_be_changes_nothing(group, error, message):
    model, other = network(), network()
    optimiser, expected = (AdamWEMA(parts(one)[0], averages=AVERAGES) for one in (model, other))
    train(model, optimiser, range(2)), train(other, expected, range(2))
    with pytest.raises(error, match=message):
        optimiser.add_param_group(group(model))
    train(model, optimiser, range(2, 4)), train(other, expected, range(2, 4))
    assert len(optimiser.param_groups) == 1 and all(torch.equal(p, q) for p, q in zip(values(model), values(other), strict=True))
