"""Shapes of U-Nets by name: our own small ones, those of the paper's Table 3, and those of other libraries for a like-for-like comparison.

What the paper leaves open (scale and shift, residual blocks that resample, the time's factor) is as in the released ADM models of
Dhariwal & Nichol (2021), whose code also lets the channels a head decide where the number of heads is given too. The paper's images have
no labels here; classes=1000 turns an ImageNet shape into a class-conditional one.
"""

from fm_fast.nn.config import UNetConfig

# Adds the embedding, resamples by convolutions and feeds t to the sinusoids as it is: the CIFAR-10 example of torchcfm.
_CIFAR10_TORCHCFM = UNetConfig(
    32, 3, 0, channels=128, multipliers=(1, 2, 2, 2), blocks=2, attention_sizes=(16,), head_channels=64, dropout=0.1,
    scale_shift=False, resampling="convolution", time_scale=1.0,
)  # fmt: skip

PRESETS: dict[str, UNetConfig] = {
    "digits": UNetConfig.digits(),
    "fashion": UNetConfig(28, 1, 10, channels=32, multipliers=(1, 2, 2), blocks=1, attention_sizes=(7,), head_channels=32, groups=8),
    "cifar10-torchcfm": _CIFAR10_TORCHCFM,
    "cifar10-paper": UNetConfig(
        32, 3, 0, channels=256, multipliers=(1, 2, 2, 2), blocks=2, attention_sizes=(16,), head_channels=64, resampling="block"
    ),
    "imagenet32-paper": UNetConfig(
        32, 3, 0, channels=256, multipliers=(1, 2, 2, 2), blocks=3, attention_sizes=(16, 8), head_channels=64, resampling="block"
    ),
    "imagenet64-paper": UNetConfig(
        64, 3, 0, channels=192, multipliers=(1, 2, 3, 4), blocks=3, attention_sizes=(32, 16, 8), head_channels=64, resampling="block"
    ),
    "imagenet128-paper": UNetConfig(
        128, 3, 0, channels=256, multipliers=(1, 1, 2, 3, 4), blocks=3, attention_sizes=(32, 16, 8), head_channels=64, resampling="block"
    ),
    # The paper gives no shape for its 64 -> 256 super-resolution (section 6.3): this is ADM's upsampler, class-conditional.
    "sr64-256": UNetConfig(
        256, 3, 1000, channels=192, multipliers=(1, 1, 2, 2, 4, 4), blocks=2, attention_sizes=(32, 16, 8), head_channels=0, heads=4,
        resampling="block", low_resolution_channels=3,
    ),
}  # fmt: skip
