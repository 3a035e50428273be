"""Every benchmarked op by its name."""

from benchmarks.op import Op
from benchmarks.ops import adamw_ema, divergence, group_norm_silu, likelihood, path_loss, sampler

OPS: dict[str, Op] = {op.name: op for op in (path_loss.OP, sampler.OP, divergence.OP, likelihood.OP, adamw_ema.OP, group_norm_silu.OP)}
