"""What the tests of the U-Net share: a tiny shape, inputs, weights off their initial values, and the other library as the oracle."""

import importlib
import importlib.util
import math
import sys
import types

import torch

import fm_fast as fm
from fm_fast.nn import UNetConfig

TINY = UNetConfig(8, 1, 3, channels=8, multipliers=(1, 2), blocks=1, attention_sizes=(4,), head_channels=8, groups=4)


def inputs(batch=2, size=8, channels=1):
    x = fm.noise((batch, channels, size, size), seed=1, step=0)
    return x, torch.linspace(0.1, 0.9, batch), torch.arange(batch) % 3


def shaken(model, scale=0.1):
    """The model with every parameter moved off its initial value, so that nothing is hidden behind a zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model


# torchcfm's U-Net with 8x8 images of 3 channels: keywords of its UNetModel, of our configuration, and its order of the attention's rows.
SHARED = {"model_channels": 32, "num_res_blocks": 1, "channel_mult": (1, 2), "attention_resolutions": (2,)}
OURS = {"channels": 32, "multipliers": (1, 2), "blocks": 1, "attention_sizes": (4,), "time_scale": 1.0}
TORCHCFM_CASES = {
    "added": ({"num_classes": 4, "num_head_channels": 16}, {"classes": 4, "head_channels": 16, "scale_shift": False}, "legacy"),
    "blocks": (
        {"use_scale_shift_norm": True, "resblock_updown": True, "num_heads": 4, "use_new_attention_order": True},
        {"head_channels": 0, "heads": 4, "resampling": "block"},
        "new",
    ),
    "pool": (
        {"conv_resample": False, "use_scale_shift_norm": True, "num_heads": 2, "channel_mult": (2, 1)},
        {"resampling": "pool", "head_channels": 0, "heads": 2, "multipliers": (2, 1)},
        "legacy",
    ),
}


def our_config(case):
    return UNetConfig(8, 3, **{"classes": 0} | OURS | TORCHCFM_CASES[case][1])


def torchcfm_unet(case):
    """torchcfm's network of a case; its package's own __init__, which needs libraries that the U-Net does not, is not run."""
    if "torchcfm" not in sys.modules:
        spec = importlib.util.find_spec("torchcfm")
        package = types.ModuleType("torchcfm")
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules["torchcfm"] = package
    network = importlib.import_module("torchcfm.models.unet.unet").UNetModel
    return network(image_size=8, in_channels=3, out_channels=3, **SHARED | TORCHCFM_CASES[case][0]).eval()


def stated_weights(shapes):
    """Weights by a formula: for the i-th name in alphabetical order, normal noise of seed i over the root of the fan-in, plus 1/2."""
    weights = {}
    for number, (name, shape) in enumerate(sorted(shapes.items())):
        normals = fm.noise((1, math.prod(shape)), seed=number, step=0).reshape(shape)
        weights[name] = 0.5 * (len(shape) == 1) + normals / math.prod(shape[1:]) ** 0.5
    return weights


def stated_inputs(case):
    """(x, t, y) of a case, likewise; y is None without classes."""
    x = fm.noise((2, 3, 8, 8), seed=1000, step=0)
    return x, torch.tensor([0.25, 0.75]), torch.tensor([3, 0]) if our_config(case).classes else None
