"""AdamWEMA against torch's optimiser in a training loop: 16-bit weights, groups, averages, state, and what it refuses."""

import contextlib
import copy
import math

import pytest
import torch
from optimiser_cases import AVERAGES, HALF_TYPES, backward, gradients, network
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from fm_fast.train.optimiser.adamw_ema import AdamWEMA
from fm_fast.train.optimiser.averaging import fixed_decay


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_training_loop_is_that_of_torch(channels_last):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model, other = network().to(memory_format=layout), network().to(memory_format=layout)
    ours = AdamWEMA(model.parameters(), 1e-2, (0.8, 0.95), 1e-6, 0.1, max_norm=0.5, averages=AVERAGES)
    theirs = torch.optim.AdamW(other.parameters(), 1e-2, (0.8, 0.95), 1e-6, 0.1)
    averaged = copy.deepcopy(other)
    for step in range(25):
        torch.testing.assert_close(backward(model, step), backward(other, step), rtol=1e-3, atol=1e-5)
        ours.step()
        norm = nn.utils.clip_grad_norm_(other.parameters(), 0.5)
        torch.testing.assert_close(ours.gradient_norm.float(), norm, rtol=1e-3, atol=0)
        theirs.step()
        ours.zero_grad()
        theirs.zero_grad()
        for a, p in zip(averaged.parameters(), other.parameters(), strict=True):
            a.data.lerp_(p.data, 1.0 - min(0.95, (1 + step) / (10 + step)))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)
    for p, q in zip(ours.average(model).parameters(), averaged.parameters(), strict=True):
        torch.testing.assert_close(p, q.detach(), rtol=1e-3, atol=1e-5)


def with_gradients(parameters, step):
    """The second gets its first gradient late, the third now and then, the fourth never; one step's are not finite."""
    generator = torch.Generator().manual_seed(step)
    for i, p in enumerate(parameters):
        present = (True, step >= 30, step % 3 == 0, False)[i]
        p.grad = torch.randn(p.shape, generator=generator) if present else None
    if step == 36:
        parameters[0].grad[0] = math.nan


@pytest.mark.parametrize("backend", ["reference", None])
def test_parameters_without_a_gradient_now_and_then_are_corrected_as_by_torch(backend):
    ours, theirs = ([nn.Parameter(torch.ones(9)) for _ in range(4)] for _ in range(2))
    optimiser = AdamWEMA(ours, 1e-2, averages=[fixed_decay(0.5)], backend=backend)
    expected = torch.optim.AdamW(theirs, 1e-2)
    for step in range(60):
        with_gradients(ours, step), with_gradients(theirs, step)
        optimiser.step()
        if step != 36:
            expected.step()
        if step == 40:
            other = AdamWEMA(ours, 1e-2, averages=[fixed_decay(0.5)], backend=backend)
            other.load_state_dict(copy.deepcopy(optimiser.state_dict()))
            optimiser = other
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert torch.equal(ours[3], torch.ones(9))
    assert [int(optimiser.state[p]["updates"]) for p in ours] == [59, 29, 19, 0] and int(optimiser.updates) == 59


def test_states_of_before_parameters_had_counts_of_their_own():
    model = network()
    optimiser = AdamWEMA(model.parameters())
    for step in range(3):
        gradients(model, step)
        optimiser.step()
    stored = copy.deepcopy(optimiser.state_dict())
    for entry in stored["state"].values():
        del entry["updates"]
    other = AdamWEMA(network().parameters())
    other.load_state_dict(stored)
    assert {int(entry["updates"]) for entry in other.state.values()} == {3}


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
def test_half_weights_are_rounded_masters(dtype):
    """The masters move as float32 weights with the same gradients would; steps too small for the weights are not lost."""
    model = network(dtype)
    master = copy.deepcopy(model).float()
    ours = AdamWEMA(model.parameters(), 1e-5, averages=(fixed_decay(0.9),))
    theirs = AdamWEMA(master.parameters(), 1e-5, averages=(fixed_decay(0.9),))
    for step in range(100):
        gradients(model, step)
        for p, q in zip(model.parameters(), master.parameters(), strict=True):
            q.grad = p.grad.float()
        ours.step()
        theirs.step()
    for p, q in zip(model.parameters(), master.parameters(), strict=True):
        assert torch.equal(ours.state[p]["master"], q) and torch.equal(p, q.to(dtype))
    assert not torch.equal(next(master.parameters()), next(network(dtype).parameters()).float())
    for p, q in zip(ours.average(model).parameters(), theirs.average(master).parameters(), strict=True):
        assert p.dtype == torch.float32 and torch.equal(p, q)


def test_mixed_weights():
    model = network()
    model[0].to(torch.bfloat16)
    optimiser = AdamWEMA(model.parameters(), 0.1)
    gradients(model, 0)
    before = [p.detach().clone() for p in model.parameters()]
    optimiser.step()
    assert all(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert torch.equal(model[0].weight, optimiser.state[model[0].weight]["master"].bfloat16())


def test_average_is_a_live_view():
    model = network()
    optimiser = AdamWEMA(model.parameters(), 0.1, averages=AVERAGES)
    average, second = optimiser.average(model), optimiser.average(model, 1)
    assert torch.equal(average[0].weight, model[0].weight) and average[0].weight.data_ptr() != model[0].weight.data_ptr()
    gradients(model, 0)
    optimiser.step()
    # The first decay is 1 / 10, and the power function takes the first weights as they are.
    torch.testing.assert_close(second[0].weight, model[0].weight.detach())
    torch.testing.assert_close(average[0].weight, (0.1 * network()[0].weight + 0.9 * model[0].weight).detach())
    assert not any(p.requires_grad for p in average.parameters())
    with pytest.raises(ValueError, match="i: expected the index of one of 2 averages, got 2"):
        optimiser.average(model, 2)


def test_the_average_of_another_model_is_refused():
    model = network()
    optimiser = AdamWEMA(model.parameters(), averages=AVERAGES)
    with pytest.raises(
        ValueError, match=r"model: expected the one whose parameters .*, got one with others: 0\.weight, 0\.bias, 2\.weight"
    ):
        optimiser.average(copy.deepcopy(model))
    with pytest.raises(ValueError, match=r"model: expected the one whose parameters the optimiser has, got one with none of them"):
        optimiser.average(copy.deepcopy(model).requires_grad_(False))
    with pytest.raises(ValueError, match=r"got one with others: 1\.weight, 1\.bias"):
        optimiser.average(nn.Sequential(model, nn.Linear(2, 2)))
    frozen = nn.Linear(2, 2).requires_grad_(False)
    average = optimiser.average(nn.Sequential(model, frozen))
    assert torch.equal(average[1].weight, frozen.weight)
    assert torch.equal(average[0][0].weight, optimiser.state[model[0].weight]["averages"][0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_restored_optimiser_continues_bit_by_bit(dtype, tmp_path):
    def start():
        model = network(dtype)
        groups = [{"params": model[0].parameters(), "lr": 0.05}, {"params": [*model[2].parameters(), *model[4].parameters()]}]
        return model, AdamWEMA(groups, 1e-2, averages=AVERAGES)

    def run(model, optimiser, steps):
        for step in steps:
            gradients(model, step, math.nan if step == 3 else 1.0)
            optimiser.param_groups[1]["lr"] = 0.01 / (1 + step)
            optimiser.step()

    model, optimiser = start()
    run(model, optimiser, range(6))
    torch.save({"model": model.state_dict(), "optimiser": optimiser.state_dict()}, tmp_path / "state.pt")
    run(model, optimiser, range(6, 12))
    again, restored = start()
    content = torch.load(tmp_path / "state.pt", weights_only=True)
    again.load_state_dict(content["model"])
    restored.load_state_dict(content["optimiser"])
    assert restored.param_groups[1]["lr"] == 0.01 / 6 and (int(restored.updates), int(restored.skipped)) == (5, 1)
    run(again, restored, range(6, 12))
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)
        assert all(torch.equal(value, restored.state[q][name]) for name, value in optimiser.state[p].items())


def test_state_survives_another_memory_layout():
    model = network()
    optimiser = AdamWEMA(model.parameters(), 1e-2, averages=AVERAGES)
    gradients(model, 0)
    optimiser.step()
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)
    restored = AdamWEMA(other.parameters(), 1e-2, averages=AVERAGES)
    restored.load_state_dict(optimiser.state_dict())
    for net, steps in ((model, optimiser), (other, restored)):
        gradients(net, 1)
        steps.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_torch_schedulers_and_closures():
    model = network()
    optimiser = AdamWEMA(model.parameters(), 0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda n: 0.5**n)
    for n in range(3):
        assert optimiser.param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**n)
        before = model[4].bias.detach().clone()
        assert float(optimiser.step(lambda n=n: backward(model, n))) > 0.0
        if n == 0:  # the first update is the learning rate in the gradient's sign
            assert float((model[4].bias.detach() - before).abs().max()) == pytest.approx(0.1, rel=1e-3)
        scheduler.step()


def test_a_learning_rate_on_the_device():
    model, other = network(), network()
    ours, theirs = AdamWEMA(model.parameters(), 1.0), AdamWEMA(other.parameters(), 0.25)
    ours.param_groups[0]["lr"] = torch.tensor(0.25)
    for net, optimiser in ((model, ours), (other, theirs)):
        gradients(net, 0)
        optimiser.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_gradients_in_another_memory_order():
    model, other = network().to(memory_format=torch.channels_last), network()
    for net in (model, other):
        optimiser = AdamWEMA(net.parameters(), 0.1)
        gradients(other, 0)
        for p, q in zip(net.parameters(), other.parameters(), strict=True):
            p.grad = q.grad.clone()  # contiguous
        optimiser.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_autograd_sees_that_weights_were_changed():
    model = network()
    optimiser = AdamWEMA(model.parameters(), 0.1)
    loss = model(torch.ones(1, 3, 8, 8)).square().mean()
    gradients(model, 0)
    optimiser.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_weights_that_moved_are_refused():
    model = network()
    optimiser = AdamWEMA(model.parameters(), 0.1)
    model.double()
    with pytest.raises(RuntimeError, match="parameters: expected the memory that they had"):
        optimiser.step()


def weight(dtype=torch.float32):
    return nn.Parameter(torch.ones(2, 3, dtype=dtype))


def test_wrong_parameters_and_settings():
    one = weight()
    cases = [
        (([one, one],), {}, "parameters: expected each once"),
        (([weight(), weight(torch.float64)],), {}, "parameters: expected float64, or float32, bfloat16 and float16"),
        (([weight(torch.complex64)],), {}, "got torch.complex64"),
        (([weight(), nn.Parameter(torch.ones(1, device="meta"))],), {}, "parameters: expected one device, got cpu, meta"),
        (([nn.Parameter(torch.ones(4, 4)[:, ::2])],), {}, "parameters: expected memory without gaps"),
        (([one], -1.0), {}, "lr: expected 0 or more"),
        (([one], float("inf")), {}, "lr: expected 0 or more, and finite, got inf"),
        (([one], "a"), {}, "lr: expected 0 or more, and finite, got 'a'"),
        (([one],), {"eps": None}, "eps: expected 0 or more, and finite, got None"),
        (([one],), {"betas": (0.9, 1.0)}, "betas: expected two numbers"),
        (([one],), {"betas": (0.9,)}, "betas: expected two numbers"),
        (([one],), {"betas": (0.9, 0.99, 0.999)}, "betas: expected two numbers"),
        (([one],), {"betas": 0.9}, "betas: expected two numbers"),
        (([one],), {"max_norm": 0.0}, "max_norm: expected a positive number"),
        (([],), {}, "empty parameter list"),
    ]
    for arguments, settings, message in cases:
        expected_warning = pytest.warns() if "once" in message else contextlib.nullcontext()
        with expected_warning, pytest.raises(ValueError, match=message):
            AdamWEMA(*arguments, **settings)
    for averages in ([0.999], 0.999, fixed_decay(0.999), "0.999"):
        with pytest.raises(TypeError, match=r"averages: expected a sequence of Averaging such as .*, got .*0.999"):
            AdamWEMA([one], averages=averages)
    with pytest.raises(RuntimeError, match="backend='triton' can't run adamw_ema on cpu"):
        AdamWEMA([one], backend="triton")


def test_settings_are_checked_where_they_are_changed():
    p = weight()
    optimiser = AdamWEMA([p])
    p.grad = torch.ones_like(p)
    optimiser.param_groups[0]["betas"] = (0.9,)
    with pytest.raises(ValueError, match="betas: expected two numbers"):
        optimiser.step()
    assert torch.equal(p, torch.ones_like(p))


def test_the_state_of_others_is_refused():
    optimiser = AdamWEMA([weight()], averages=AVERAGES)
    with pytest.raises(ValueError, match="state_dict: expected as many parameters"):
        optimiser.load_state_dict(AdamWEMA([weight(), weight()]).state_dict())
    with pytest.raises(ValueError, match=r"expected averages \(.*\) of parameter 0, got averages \(0, .*\)"):
        optimiser.load_state_dict(AdamWEMA([weight()]).state_dict())
    with pytest.raises(ValueError, match=r"expected exp_avg .* of parameter 0, got none$"):
        optimiser.load_state_dict({**optimiser.state_dict(), "state": {}})
    state = optimiser.state_dict()
    with pytest.raises(ValueError, match="expected states of the parameters of its groups, got others: 5"):
        optimiser.load_state_dict({**state, "state": {**state["state"], 5: {}}})


def trained(kind, model, steps=5):
    optimiser = kind(model.parameters(), lr=1e-2)
    for step in range(steps):
        backward(model, step)
        optimiser.step()
        optimiser.zero_grad()
    return optimiser


@pytest.mark.parametrize("kind", [torch.optim.AdamW, AdamWEMA])
def test_states_are_known_by_the_ids_of_their_groups(kind):
    """torch.distributed.checkpoint puts names there; others may number them as they like."""
    model = network()
    theirs = trained(kind, model)
    numbered, named = theirs.state_dict(), get_optimizer_state_dict(model, theirs)
    count = len(numbered["state"])
    renumbered = {
        "state": {count - 1 - i: value for i, value in numbered["state"].items()},
        "param_groups": [{**numbered["param_groups"][0], "params": list(range(count))[::-1]}],
    }
    for stored in (numbered, renumbered, named):
        other = copy.deepcopy(model)
        found = AdamWEMA(other.parameters(), lr=1e-2)
        if stored is named:
            set_optimizer_state_dict(other, found, stored)
        else:
            found.load_state_dict(copy.deepcopy(stored))
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            for name in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(found.state[q][name], theirs.state[p][name]) and bool(found.state[q][name].any())


def test_hooks_of_loading_are_called():
    model, seen = network(), []
    optimiser = trained(AdamWEMA, model)
    state, other = copy.deepcopy(optimiser.state_dict()), AdamWEMA(model.parameters(), lr=1e-2)
    other.register_load_state_dict_pre_hook(lambda optimiser, given: seen.append(given) or {**given, "param_groups": changed(given)})
    other.register_load_state_dict_post_hook(lambda optimiser: seen.append(float(optimiser.param_groups[0]["lr"])))
    other.load_state_dict(state)
    assert seen[0] == state and seen[0] is not state and seen[1] == 0.5


def changed(state):
    return [{**group, "lr": 0.5} for group in state["param_groups"]]


def test_a_rate_in_a_tensor_of_several_numbers_is_refused():
    with pytest.raises(ValueError, match="lr: expected 0 or more, and finite, got tensor"):
        AdamWEMA(network().parameters(), torch.tensor([1.0, 2.0]))


def test_a_rate_in_a_tensor_of_one_number():
    models = [network(), network()]
    for model, rate in zip(models, (1e-2, torch.tensor([1e-2])), strict=True):
        backward(model, 0)
        AdamWEMA(model.parameters(), rate).step()
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(p, q)


def test_sparse_gradients_are_refused():
    layer = nn.Embedding(4, 3, sparse=True)
    optimiser = AdamWEMA(layer.parameters())
    layer(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(TypeError, match=r"gradients: expected dense ones, got torch.sparse_coo for a parameter of \(4, 3\)"):
        optimiser.step()
