"""Record what torchcfm's U-Net computes, for the test of tests/test_unet_weights.py that runs without it.

    pip install --no-deps torchcfm==1.0.7
    python tests/data/record_torchcfm_unet.py

Writes torchcfm_unet.npz: for each case of unet_helpers.TORCHCFM_CASES its output, float32 [2, 3, 8, 8], at `stated_inputs` with
`stated_weights`, and the names and shapes of its weights.
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from unet_helpers import TORCHCFM_CASES, stated_inputs, stated_weights, torchcfm_unet


def recorded(case: str) -> dict[str, np.ndarray]:
    network = torchcfm_unet(case)
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    network.load_state_dict(stated_weights(shapes))
    x, t, y = stated_inputs(case)
    with torch.no_grad():
        output = network(t, x, y)
    lines = [f"{name} {' '.join(map(str, shape))}" for name, shape in shapes.items()]
    return {f"{case}.output": output.numpy(), f"{case}.shapes": np.array("\n".join(lines))}


if __name__ == "__main__":
    arrays = {name: value for case in TORCHCFM_CASES for name, value in recorded(case).items()}
    np.savez_compressed(Path(__file__).parent / "torchcfm_unet.npz", **arrays)
