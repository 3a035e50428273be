"""Runs by name: `fm-fast train NAME`. Networks of the same names are in fm_fast/nn/presets.py."""

from dataclasses import replace

from fm_fast.nn import UNetConfig
from fm_fast.nn.presets import PRESETS as NETWORKS
from fm_fast.train.config import TrainConfig

# What all runs of Lipman et al. 2023 (Table 3) share: Adam without weight decay, clipping or an average of the weights, uniform times
# (equation 9) and no guidance; its ImageNet models know no classes. Its "polynomial" schedule is linear.
_PAPER = TrainConfig(
    data="", beta1=0.9, beta2=0.999, weight_decay=0.0, clip=0.0, ema_decay=0.0, t_sampler="uniform", conditional=False, label_drop=0.0,
    guidance=1.0, dequantise=True,
    sample_steps=100, sample_every=5000, checkpoint_every=5000, log_every=100, evaluate=False,
)  # fmt: skip


def _paper(name: str, **settings: object) -> TrainConfig:
    return replace(_PAPER, out=f"out/{name}", model=NETWORKS[name], **settings)  # type: ignore[arg-type]


# By name: what it is in a line, and the run.
_PRESETS = {
    "digits": ("the shipped 8x8 digits", TrainConfig()),
    # 28x28 images averaged to 14x14 and framed to 16x16: minutes on two CPU cores.
    "fashion": ("Fashion-MNIST at 14x14, framed to 16x16", TrainConfig(
        data="fashion", out="out/fashion", pool=2, pad=1, steps=600, batch_size=64, learning_rate=1.5e-3, warmup=30, ema_decay=0.99,
        sample_every=200, checkpoint_every=200, log_every=25, guidance=1.5, evaluate=False,
        model=replace(NETWORKS["fashion"], image_size=16, attention_sizes=(4,)),
    )),
    "images": ("your images: a starting point", TrainConfig(
        data="", out="out/images", steps=20_000, learning_rate=5e-4, warmup=1000, beta2=0.999, ema_decay=0.9999,
        sample_every=2000, checkpoint_every=2000, log_every=50, sample_steps=50, model=UNetConfig.small(),
    )),
    "cifar10-torchcfm": ("CIFAR-10 as in torchcfm's example", TrainConfig(
        data="", out="out/cifar10-torchcfm", steps=400_000, batch_size=128, learning_rate=2e-4, schedule="constant", warmup=5000,
        beta2=0.999, clip=1.0, ema_decay=0.9999, conditional=False, label_drop=0.0, flip=0.5, guidance=1.0, sample_steps=100,
        sample_every=20_000, checkpoint_every=20_000, log_every=100, evaluate=False, model=NETWORKS["cifar10-torchcfm"],
    )),
    "cifar10-paper": ("CIFAR-10 as in Lipman et al. 2023", _paper(
        "cifar10-paper", steps=391_000, batch_size=256, learning_rate=5e-4, warmup=45_000
    )),
    "imagenet32-paper": ("ImageNet 32x32 as in Lipman et al. 2023", _paper(
        "imagenet32-paper", steps=250_000, batch_size=1024, learning_rate=1e-4, warmup=20_000
    )),
    "imagenet64-paper": ("ImageNet 64x64 as in Lipman et al. 2023", _paper(
        "imagenet64-paper", steps=157_000, batch_size=2048, learning_rate=1e-4, schedule="constant", warmup=0, precision="bfloat16",
        resize=64,
    )),
    "imagenet128-paper": ("ImageNet 128x128 as in Lipman et al. 2023", _paper(
        "imagenet128-paper", steps=500_000, batch_size=1536, learning_rate=1e-4, warmup=20_000, precision="bfloat16", resize=128
    )),
    # The paper gives no settings for its super-resolution: these follow its 128x128 run, with a smaller batch, labels and an average.
    "sr64-256": ("super-resolution from 64x64 to 256x256", _paper(
        "sr64-256", steps=500_000, batch_size=256, learning_rate=1e-4, warmup=20_000, precision="bfloat16", resize=256, super_resolution=4,
        conditional=True, dequantise=False, samples_per_class=4, ema_decay=0.9999, t_sampler="auto",
    )),
}  # fmt: skip
SUMMARIES = {name: summary for name, (summary, _) in _PRESETS.items()}
PRESETS = {name: run for name, (_, run) in _PRESETS.items()}
