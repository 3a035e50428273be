"""Every benchmarked op by its name, which is also its module's."""

import importlib

from benchmarks.op import Op

NAMES = (
    "noise", "path_sample", "path_loss", "linear_step", "step_error", "step_control", "sampler", "adaptive", "probe", "divergence_step",
    "divergence", "likelihood", "adamw_ema", "group_norm_silu", "conv3x3", "conv_weight_grad", "attention", "coupling", "train_step",
    "training", "share",
)  # fmt: skip


def find(name: str) -> Op:
    """The op of a name. Nothing else is imported: an older fm_fast may lack what another op is about."""
    return importlib.import_module(f"benchmarks.ops.{name}").OP
