"""Dropout of the U-Net: a function of (seed, step, sample), the same with plain and fused layers, in a training step's hands."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from unet_helpers import TINY, inputs, shaken

from fm_fast.nn import GroupNormSiLU, UNet
from fm_fast.random import noise

CONFIG = replace(TINY, dropout=0.5)


def keyed(model, seed=3, step=5, first_id=0):
    model.set_dropout_key(seed, step, first_id)
    return model


@pytest.mark.parametrize("resampling", ["convolution", "block"])
def test_fused_and_plain_layers_give_the_same_output_and_gradients(resampling):
    config = replace(CONFIG, resampling=resampling)
    plain, fused = shaken(UNet(config, fused=False)), UNet(config)
    fused.load_state_dict(plain.state_dict())
    x, t, y = inputs(3)
    outputs = [keyed(model)(x, t, y=y) for model in (plain, fused)]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-4)
    for output in outputs:
        output.square().sum().backward()
    for (name, one), other in zip(plain.named_parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-3, atol=1e-4 * float(one.grad.abs().max()) + 1e-6, msg=name)


@pytest.mark.parametrize("fused", [True, False])
def test_masks_depend_on_seed_step_and_sample_only(fused):
    model, (x, t, y) = shaken(UNet(CONFIG, fused=fused)), inputs(4)
    whole = keyed(model)(x, t, y=y)
    torch.testing.assert_close(keyed(model)(x, t, y=y), whole, rtol=0, atol=0)
    second = keyed(model, first_id=2)(x[2:], t[2:], y=y[2:])
    torch.testing.assert_close(second, whole[2:], rtol=1e-5, atol=1e-5)
    for other in ({"seed": 4}, {"step": 6}, {"first_id": 1}):
        assert (keyed(model, **other)(x, t, y=y) - whole).abs().max() > 1e-2
    keyed(model, torch.tensor(3), torch.tensor([5]), torch.tensor(0))
    torch.testing.assert_close(model(x, t, y=y), whole, rtol=0, atol=0)


def test_evaluation_has_no_dropout():
    model, (x, t, y) = shaken(UNet(CONFIG)), inputs(2)
    without = UNet(TINY)
    without.load_state_dict(model.state_dict())
    torch.testing.assert_close(model.eval()(x, t, y=y), without(x, t, y=y), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fused", [True, False])
def test_each_layer_draws_its_own_part_of_the_stream(fused):
    model = UNet(CONFIG, fused=fused)
    layers = [module for module in model.modules() if isinstance(module, GroupNormSiLU) and module.dropout > 0.0]
    assert len(layers) == 2 + 2 + 4 and [layer.index for layer in layers] == list(range(8))
    # Dropout zeroes whole activations: of a layer whose result is silu(10) everywhere without it, the mask can be read off.
    for layer in layers:
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.constant_(layer.bias, 10.0)
        y = layer(torch.zeros(3, layer.channels, 2, 3), key=torch.tensor([3, 5, 7]))
        kept = noise((3, layer.channels, 2, 3), seed=3, step=5, stream="dropout", index=layer.index, sample_ids=7) >= 0.5
        assert torch.equal(y != 0.0, kept)


def test_the_key_is_filled_in_place_and_not_stored():
    model = UNet(CONFIG)
    key = model.dropout_key
    keyed(model, 2**62, 2**31, 9)
    assert model.dropout_key is key and key.dtype == torch.int64 and key.tolist() == [2**62, 2**31, 9]
    assert "dropout_key" not in model.state_dict()
    assert not list(model.buffers())  # which DistributedDataParallel would make those of the first process
    assert keyed(UNet(CONFIG).to(torch.bfloat16)).dropout_key.tolist() == [3, 5, 0]


def test_training_without_a_key_is_an_error():
    model, (x, t, y) = UNet(CONFIG), inputs(2)
    with pytest.raises(ValueError, match=r"dropout_key: expected set_dropout_key\(seed, step, first_id\) before each training step"):
        model(x, t, y=y)
    UNet(TINY)(x, t, y=y)
    with pytest.raises(Exception, match=r"dropout_key: expected set_dropout_key\(seed, step, first_id\)"):
        torch.compile(model, backend="eager")(x, t, y=y)
    with pytest.raises(ValueError, match="dropout_key: expected"):
        torch.func.grad(lambda x: model(x, t, y=y).sum())(x)
    copy.deepcopy(keyed(model))(x, t, y=y)


def test_the_key_outlives_what_becomes_of_the_weights():
    """Their memory is new, and may hold anything, when a network comes from the meta device or is emptied."""
    with torch.device("meta"):
        inner = UNet(CONFIG)
    nn.Sequential(inner).to_empty(device="cpu")
    with pytest.raises(ValueError, match="dropout_key: expected"):
        inner(*inputs(2)[:2], y=inputs(2)[2])
    keyed(inner)
    for change in (
        lambda: inner.to(torch.float64), lambda: inner.type(torch.bfloat16), lambda: inner.to_empty(device="cpu"),
        lambda: inner.to("meta"), lambda: inner.to_empty(device="cpu"),
    ):  # fmt: skip
        change()
        assert inner.dropout_key.tolist() == [3, 5, 0] and inner.dropout_key.dtype == torch.int64


def test_weights_that_are_assigned_to_a_network_on_the_meta_device():
    state, (x, t, y) = shaken(UNet(CONFIG)).state_dict(), inputs(2)
    with torch.device("meta"):
        model = UNet(CONFIG)
    model.load_state_dict(state, assign=True)
    expected = UNet(CONFIG)
    expected.load_state_dict(state)
    assert torch.equal(keyed(model)(x, t, y=y), keyed(expected)(x, t, y=y))
    assert model.to("cpu").dropout_key.tolist() == [3, 5, 0]


@pytest.mark.parametrize("fused", [True, False])
def test_the_key_of_a_call_is_that_of_its_backward_pass(fused):
    """Two calls with keys of their own before one backward pass: as two micro-batches of a sum."""
    model, (x, t, y) = shaken(UNet(CONFIG, fused=fused)), inputs(2)

    def gradients(*losses):
        model.zero_grad()
        sum(losses).backward()
        return [p.grad.clone() for p in model.parameters()]

    def loss(first_id):
        return keyed(model, first_id=first_id)(x, t, y).square().sum()

    apart = [gradients(loss(first_id)) for first_id in (0, 2)]
    expected = [a + b for a, b in zip(*apart, strict=True)]
    together = gradients(*[loss(first_id) for first_id in (0, 2)])
    keys = [torch.tensor([3, 5, i]) for i in (0, 2)]
    again = gradients(*[checkpoint(model, x, t, y, dropout_key=key, use_reentrant=False).square().sum() for key in keys])
    for found in (together, again):
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()) + 1e-7)


@pytest.mark.parametrize(
    ("key", "kind", "message"),
    [
        ((1, 2, 3), TypeError, "dropout_key must be a torch.Tensor, got tuple"),
        (torch.zeros(3), ValueError, r"dropout_key must be int64 of shape \[3\], .* got torch.float32 of shape \(3,\)"),
        (torch.tensor([1, 2]), ValueError, r"dropout_key must be int64 of shape \[3\], .* of shape \(2,\)"),
    ],
)
def test_wrong_keys_of_a_call(key, kind, message):
    x, t, y = inputs(2)
    with pytest.raises(kind, match=message):
        UNet(CONFIG)(x, t, y, dropout_key=key)
    every_second = torch.tensor([3, 0, 5, 0, 7, 0])[::2]
    model = shaken(UNet(CONFIG))
    assert torch.equal(model(x, t, y, dropout_key=every_second), model(x, t, y, dropout_key=torch.tensor([3, 5, 7])))


@pytest.mark.parametrize("name", ["seed", "step", "first_id"])
def test_wrong_keys(name):
    with pytest.raises(ValueError, match=name):
        UNet(CONFIG).set_dropout_key(**{"seed": 0, "step": 0} | {name: -1})
