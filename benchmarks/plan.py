"""What ``--op all`` runs, every benchmark of the README on the CPU in less than 15 minutes on two cores; and what the GPU report times."""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

# Options that the plan sets itself, by what they are when they are not given.
SET_BY_PLAN = {"size": ["all"], "mode": None, "part": ["full"], "rounds": None, "only": None, "out": None, "against": None}


@dataclass(frozen=True)
class Entry:
    """One run of an op: sizes and providers by name, as the options of ``benchmarks.run`` are; None for all."""

    op: str
    sizes: tuple[str, ...]
    modes: tuple[str, ...] | None
    rounds: int
    only: tuple[str, ...] | None = None
    dtypes: tuple[str, ...] = ("float32", "bfloat16")  # on a GPU

    def options(self, given: argparse.Namespace) -> argparse.Namespace:
        """Those given, with what the entry sets."""
        modes, only = (None if names is None else list(names) for names in (self.modes, self.only))
        chosen = {"op": self.op, "size": list(self.sizes), "mode": modes, "rounds": self.rounds, "only": only}
        return argparse.Namespace(**{**vars(given), **chosen})


PLAN = (
    Entry("noise", ("small",), None, 40),
    Entry("path_sample", ("small",), None, 40, only=("eager", "floor")),
    Entry("path_loss", ("small", "large", "2-D", "2-D, many", "tabular", "robotics", "latents"), None, 40),
    Entry("linear_step", ("small",), None, 40),
    Entry("step_error", ("small",), None, 40),
    Entry("step_control", ("small", "many"), ("one part",), 40),
    Entry("sampler", ("tiny",), None, 20),
    Entry("adaptive", ("tiny", "CIFAR"), ("dopri5",), 10),
    Entry("probe", ("small",), ("1 probe", "4 probes"), 20),
    Entry("divergence_step", ("small",), ("1 probe", "4 probes"), 20),
    Entry("likelihood", ("grey",), ("midpoint, 1 probe", "euler, 1 probe"), 8),
    Entry("adamw_ema", ("digits", "narrow", "wide"), None, 40),
    Entry("group_norm_silu", ("32x32", "16x16", "8x8"), None, 40, only=("eager",)),
    Entry("conv3x3", ("32x32", "32x32, decoder", "16x16", "8x8"), None, 20, only=("torch",)),
    Entry("conv_weight_grad", ("32x32", "32x32, decoder", "16x16", "8x8"), None, 20, only=("torch",)),
    Entry("attention", ("16x16", "16x16, 4 heads of 64", "8x8", "32x32"), None, 20),
    Entry("train_step", ("32x32",), None, 12),
    Entry("share", ("MLP, 2-D", "MLP, robotics", "U-Net, digits", "U-Net, 32x32"), None, 3),
)

# In minutes: what a GPU is about is large, or small and launched often. The sampler runs in the dtype of its tolerance.
# What decides comes first, in case that time runs out. torch.compile takes seconds a provider, so it is there once.
EAGER = ("eager", "floor", "triton")
GPU_PLAN = (
    Entry("path_loss", ("small",), None, 100),
    Entry("path_loss", ("256 MiB",), None, 100, only=EAGER),
    Entry("training", ("CIFAR, 128", "CIFAR, 512"), None, 5, dtypes=("bfloat16",)),
    Entry("group_norm_silu", ("32x32", "16x16", "8x8"), ("NHWC", "NHWC modulated"), 100, only=("torch eager",), dtypes=("bfloat16",)),
    Entry("adamw_ema", ("wide",), ("1 average",), 100),
    Entry("sampler", ("CIFAR",), ("euler", "midpoint"), 10, dtypes=("float32",)),
    Entry("adaptive", ("CIFAR",), ("dopri5",), 10, dtypes=("float32",)),
    Entry("path_sample", ("256 MiB",), None, 100, only=EAGER),
    Entry("noise", ("256 MiB",), ("normal",), 100, only=("torch, ", "floor", "triton")),
    Entry("linear_step", ("256 MiB",), ("euler", "rk4"), 100, only=EAGER),
    Entry("step_error", ("256 MiB",), ("dopri5",), 100, only=EAGER, dtypes=("float32",)),
    Entry("step_control", ("many",), ("one part",), 100, only=EAGER, dtypes=("float32",)),
    Entry("probe", ("large",), ("4 probes",), 100, only=EAGER),
    Entry("divergence_step", ("large",), ("4 probes",), 100, only=EAGER),
)


def run(given: argparse.Namespace, run_op: Callable[[argparse.Namespace], None]) -> None:
    """Every entry, one after the other; SystemExit where an option asks for something else than the plan."""
    changed = [f"--{name}" for name, default in SET_BY_PLAN.items() if getattr(given, name) != default]
    if changed or given.device != "cpu":
        sys.exit(f"--op all runs what benchmarks/plan.py lists, on the CPU: leave out {', '.join(changed or ['--device'])}")
    for entry in PLAN:
        begin = time.perf_counter()
        run_op(entry.options(given))
        print(f"\n{entry.op} took {time.perf_counter() - begin:.0f} s", flush=True)
