"""Weights of torchcfm's U-Net in ours: the same output as recorded from it, and as it computes where it is installed; errors."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from unet_helpers import TORCHCFM_CASES, our_config, stated_inputs, stated_weights, torchcfm_unet

from fm_fast.nn import PRESETS, load_guided_diffusion, load_torchcfm

RECORDED = Path(__file__).parent / "data" / "torchcfm_unet.npz"
needs_torchcfm = pytest.mark.skipif(
    importlib.util.find_spec("torchcfm") is None, reason="torchcfm is not installed: pip install --no-deps torchcfm==1.0.7"
)


def recorded(case):
    """(shapes by name, output) of torchcfm's network."""
    with np.load(RECORDED) as arrays:
        lines = str(arrays[f"{case}.shapes"]).splitlines()
        output = torch.from_numpy(arrays[f"{case}.output"])
    return {name: tuple(map(int, sizes)) for name, *sizes in map(str.split, lines)}, output


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("case", TORCHCFM_CASES)
def test_output_is_the_recorded_one(case, fused):
    shapes, expected = recorded(case)
    order = TORCHCFM_CASES[case][2]
    model = load_torchcfm(stated_weights(shapes), our_config(case), attention_order=order, fused=fused).eval()
    x, t, y = stated_inputs(case)
    assert expected.std() > 0.1
    with torch.no_grad():
        torch.testing.assert_close(model(x, t, y=y), expected, rtol=1e-4, atol=1e-4)
        other = {"legacy": "new", "new": "legacy"}[order]
        wrong = load_torchcfm(stated_weights(shapes), our_config(case), attention_order=other).eval()(x, t, y=y)
    assert (wrong - expected).abs().max() > 1e-2


@pytest.mark.slow
@needs_torchcfm
@pytest.mark.parametrize("case", TORCHCFM_CASES)
def test_output_and_gradients_are_those_of_the_installed_library(case):
    theirs = torchcfm_unet(case)
    theirs.load_state_dict(stated_weights({name: tuple(value.shape) for name, value in theirs.state_dict().items()}))
    ours = load_torchcfm(theirs.state_dict(), our_config(case), attention_order=TORCHCFM_CASES[case][2])
    x, t, y = stated_inputs(case)
    outputs = theirs(t, x, y), ours(x, t, y=y)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-4)
    for output in outputs:
        output.square().mean().backward()
    for name, their_name in (("head", "out.2"), ("stem", "input_blocks.0.0"), ("time.first", "time_embed.0")):
        gradients = [network.get_submodule(at).weight.grad for network, at in ((ours, name), (theirs, their_name))]
        torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-5 * float(gradients[1].abs().max()))


@pytest.mark.slow
@needs_torchcfm
def test_the_recording_is_what_the_installed_library_computes():
    for case in TORCHCFM_CASES:
        network, (shapes, expected) = torchcfm_unet(case), recorded(case)
        assert shapes == {name: tuple(value.shape) for name, value in network.state_dict().items()}
        network.load_state_dict(stated_weights(shapes))
        x, t, y = stated_inputs(case)
        with torch.no_grad():
            torch.testing.assert_close(network(t, x, y), expected, rtol=1e-4, atol=1e-4)


def test_null_class_adds_nothing_to_the_embedding():
    model = load_torchcfm(stated_weights(recorded("added")[0]), our_config("added"))
    weights = stated_weights(recorded("added")[0])
    assert torch.count_nonzero(model.label(torch.tensor([-1]))) == 0
    torch.testing.assert_close(model.label(torch.arange(4)), weights["label_emb.weight"], rtol=0, atol=0)


def test_names_of_distributed_training_are_understood():
    shapes, _ = recorded("pool")
    wrapped = {f"module.{name}": value for name, value in stated_weights(shapes).items()}
    one, other = (load_torchcfm(weights, our_config("pool")).state_dict() for weights in (wrapped, stated_weights(shapes)))
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_every_weight_is_loaded():
    shapes, _ = recorded("blocks")
    model = load_guided_diffusion(stated_weights(shapes), our_config("blocks"))
    given, loaded = (
        [float(value.double().sum()) for value in weights] for weights in (stated_weights(shapes).values(), model.state_dict().values())
    )
    assert sum(loaded) == pytest.approx(sum(given), abs=1e-6) and len(loaded) == len(given)


def test_errors_name_every_key():
    weights = stated_weights(recorded("pool")[0])
    weights["extra.weight"] = weights.pop("out.0.bias")
    weights["out.2.bias"] = torch.zeros(6)
    with pytest.raises(ValueError) as error:
        load_torchcfm(weights, our_config("pool"))
    for part in ("missing out.0.bias", "unexpected extra.weight", r"out.2.bias of shape [6] where [3] was expected"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("state_dict", "config", "options", "message"),
    [
        (
            {"ema_model": {}, "net_model": {}, "step": 1},
            our_config("pool"),
            {},
            "got a checkpoint; pass its entry 'ema_model' or 'net_model'",
        ),
        ({}, PRESETS["digits"], {}, "config.time_scale: expected 1.0, .* got 1000.0"),
        ({}, our_config("pool"), {"attention_order": "old"}, "attention_order: expected legacy or new, got 'old'"),
        ({}, our_config("pool"), {}, "missing time_embed.0.weight"),
    ],
)
def test_wrong_arguments(state_dict, config, options, message):
    with pytest.raises(ValueError, match=message):
        load_torchcfm(state_dict, config, **options)
