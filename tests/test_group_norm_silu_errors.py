"""What group_norm_silu, its layer and its raw op refuse."""

import pytest
import torch

from fm_fast import _backends
from fm_fast.nn.norm import GroupNormSiLU

pytestmark = pytest.mark.usefixtures("poisoned_outputs")
needs_cpp = pytest.mark.skipif(_backends.why_not("group_norm_silu", "cpu", "cpp") is not None, reason="the C++ library is not built")

WRONG_SETTINGS = {
    "groups must be at least 1": {"groups": 0},
    "channels must be a multiple of groups, 3, got 8": {"groups": 3},
    "eps must be positive": {"eps": 0.0},
    "dropout must lie in": {"dropout": 1.0},
    "index must lie in": {"index": 2**24},
}


@pytest.mark.parametrize("message", WRONG_SETTINGS)
def test_wrong_settings(message):
    with pytest.raises((ValueError, TypeError), match=message):
        GroupNormSiLU(**{"groups": 2, "channels": 8, **WRONG_SETTINGS[message]})


WRONG_INPUTS = {
    "x must have 8 channels, got 6": {"x": torch.ones(2, 6, 3, 3)},
    "x must be float64, float32": {"x": torch.ones(2, 8, 3, 3, dtype=torch.int64)},
    "x must have shape": {"x": torch.ones(8)},
    "x and second must have 8 channels, got 9": {"second": torch.ones(2, 1, 3, 3)},
    "second must have the dtype of x": {"x": torch.ones(2, 6, 3, 3), "second": torch.ones(2, 2, 3, 3).double()},
    "second must have the shape of x": {"x": torch.ones(2, 6, 3, 3), "second": torch.ones(2, 2, 3, 4)},
    "embedding must have shape": {"embedding": torch.ones(2, 6)},
    "scale must have shape": {"scale": torch.ones(2, 8, 1, 1)},
    "shift must be a torch.Tensor": {"shift": 1.0},
    "shift must be float64": {"shift": torch.ones(2, 8, dtype=torch.int64)},
    "key must be int64 of shape": {"key": torch.ones(3)},
}


@pytest.mark.parametrize("message", WRONG_INPUTS)
def test_wrong_inputs(message):
    arguments = {"x": torch.ones(2, 8, 3, 3), **WRONG_INPUTS[message]}
    with pytest.raises((ValueError, TypeError), match=message):
        GroupNormSiLU(2, 8)(arguments.pop("x"), **arguments)


def raw_arguments(**changes):
    nothing, x = torch.empty(0), torch.ones(2, 4, 3, 3)
    arguments = {
        "y": torch.empty_like(x),
        "mean": torch.empty(2, 2),
        "rstd": torch.empty(2, 2),
        "x": x,
        "second": nothing,
        "embedding": nothing,
    }
    arguments |= {"weight": torch.ones(4), "bias": torch.ones(4), "scale": nothing, "shift": nothing, "key": nothing}
    return arguments | {"groups": 2, "eps": 1e-5, "activation": True, "dropout": 0.0, "index": 0} | changes


WRONG_RAW = {
    "argument y: expected the shape of x with 4 channels": {"y": torch.empty(2, 4, 3, 2)},
    "argument y: expected the dtype of x": {"y": torch.empty(2, 4, 3, 3).double()},
    "argument x: expected a number of channels that groups divides": {"groups": 3},
    "argument groups: expected 1 to 4, got 0": {"groups": 0},
    "argument mean: expected a contiguous tensor of 4": {"mean": torch.empty(3)},
    "argument mean: expected float32, or float64": {"mean": torch.empty(2, 2).double()},
    "argument weight: expected 4 numbers": {"weight": torch.ones(3)},
    "argument scale: expected 4 numbers for each of 2 samples": {"scale": torch.ones(2, 3)},
    "argument second": {"second": torch.ones(2, 4, 3, 2)},
    "argument key": {"dropout": 0.5},
    "argument dropout": {"dropout": 1.0},
    "argument index": {"index": -1},
    "argument x: expected .B, C": {"x": torch.ones(2, 4)},
    "argument x: requires grad": {"x": torch.ones(2, 4, 3, 3, requires_grad=True)},
}


@needs_cpp
@pytest.mark.parametrize("message", WRONG_RAW)
def test_wrong_arguments_of_the_raw_op(message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fm_fast.group_norm_silu(**raw_arguments(**WRONG_RAW[message]))
