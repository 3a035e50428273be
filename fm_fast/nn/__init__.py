"""Networks: the reference U-Net and the layers it is made of."""

from fm_fast.nn.config import UNetConfig
from fm_fast.nn.norm import GroupNormSiLU
from fm_fast.nn.precondition import Preconditioned
from fm_fast.nn.presets import PRESETS
from fm_fast.nn.unet import UNet
from fm_fast.nn.weights import load_guided_diffusion, load_torchcfm

__all__ = ["PRESETS", "GroupNormSiLU", "Preconditioned", "UNet", "UNetConfig", "load_guided_diffusion", "load_torchcfm"]
