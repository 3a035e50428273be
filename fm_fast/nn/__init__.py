"""Networks: the reference U-Net and the layers it is made of."""

from fm_fast.nn.precondition import Preconditioned
from fm_fast.nn.unet import UNet, UNetConfig

__all__ = ["Preconditioned", "UNet", "UNetConfig"]
