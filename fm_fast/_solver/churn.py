"""Noise on the way of a fixed-step solve: to the loop, an evaluation that draws instead of calling the network."""

import torch
from torch import Tensor

from fm_fast import _ops, random
from fm_fast._philox import INDEX_LIMIT, Kind, Stream
from fm_fast._solver.loop import Evaluate
from fm_fast._solver.plan import Plan
from fm_fast.random import Whole


def churn_key(churn: float, seed: Whole | None, step: Whole | None, sample_ids: Whole | None, noise: Tensor) -> Tensor | None:
    """The key of the noise on the way, None without; ValueError where one is given in vain, as when ``step`` should be ``steps``."""
    if churn > 0.0:
        return random.make_key(seed, step, sample_ids, noise.shape[0], noise.device)
    for name, value in (("seed", seed), ("step", step), ("sample_ids", sample_ids)):
        if value is not None:
            meant = " (the number of steps is steps)" if name == "step" else ""
            raise ValueError(f"{name} needs churn > 0, without which nothing is drawn on the way{meant}, got {value}")
    return None


def with_noise(evaluate: Evaluate, plan: Plan, key: Tensor, shape: torch.Size, dtype: torch.dtype, backend: str) -> Evaluate:
    """The network's evaluations, each step's after the noise that it begins with; the step is the index of the stream."""
    (segment,) = plan.segments
    calls = len(segment.stages)
    if segment.steps > INDEX_LIMIT:
        raise ValueError(f"steps must be at most {INDEX_LIMIT} with churn, got {segment.steps}")

    def either(x: Tensor, number: int) -> Tensor:
        step, stage = divmod(number, calls)
        if stage > 0:
            return evaluate(x, number - step - 1)
        return _ops.noise(key, tuple(shape), Kind.normal, Stream.bridge, step, dtype, backend)

    return either
