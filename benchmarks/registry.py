"""Every benchmarked op by its name."""

from benchmarks.op import Op
from benchmarks.ops import adamw_ema, divergence, group_norm_silu, likelihood, path_loss, sampler, train_step

MODULES = (path_loss, sampler, divergence, likelihood, adamw_ema, group_norm_silu, train_step)
OPS: dict[str, Op] = {module.OP.name: module.OP for module in MODULES}
