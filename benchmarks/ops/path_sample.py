"""path_sample: the first half of a training step outside the model, on the optimal-transport path.

Every provider draws x0 (unless given) and t and moves to x_t = t x1 + (1 - t) x0. fm_fast also computes the six coefficients of each
sample's loss; torchcfm and flow_matching also the target x1 - x0.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import points
from benchmarks.op import Op, Provider, Setting, bytes_of_shape
from benchmarks.points import Data, Make, check_close, over

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
REQUIRED_PASSES = {"x0 drawn": 2, "x0 given": 3}


class Outcome(NamedTuple):
    """x_t, and on request, so that telling is not timed, the x0 and t that led to it."""

    x_t: Tensor
    draws: Callable[[], tuple[Tensor, Tensor]]


Step = Callable[[], Outcome]


def inputs(setting: Setting) -> Data:
    x1, x0 = (torch.randn(setting.shape, dtype=setting.dtype, device=setting.device) for _ in range(2))
    return Data(x1, x0 if setting.mode == "x0 given" else None)


def _others(make: Make) -> Callable[[Data, Setting], Step]:
    def build(given: Data, setting: Setting) -> Step:
        draw = make(given)

        def step() -> Outcome:
            point = draw()
            return Outcome(point.x_t, lambda: (point.x0, point.t))

        return step

    return build


def _ours(backend: str) -> Callable[[Data, Setting], Step]:
    def build(given: Data, setting: Setting) -> Step:
        draw = points.ours(given, backend)

        def step() -> Outcome:
            sample = draw()
            return Outcome(sample.x_t, lambda: (sample.x0, sample.t))

        return step

    return build


def _memory_floor(given: Data, setting: Setting) -> Callable[[], object]:
    """x1 (and x0) read, x_t written, and no arithmetic."""
    x_t = torch.empty_like(given.x1)
    return lambda: x_t.copy_(given.x1) if given.x0 is None else torch.add(given.x1, given.x0, out=x_t)


def providers(setting: Setting) -> list[Provider]:
    makes = points.EAGER_AND_COMPILED | {name: points.of_peer(name) for name in points.peers_for(setting)}
    return points.with_ours(setting, "path_sample", _ours, {name: _others(make) for name, make in makes.items()}, _memory_floor)


def check(given: Data, setting: Setting, step: Step) -> None:
    """x_t against float64 from the step's own draws; the draws against the distributions they should have."""
    found = step()
    x0, t = (values.double() for values in found.draws())
    column = over(t, given.x1)
    check_close("x_t", found.x_t, (1 - column) * x0 + column * given.x1.double(), TOLERANCE[setting.dtype])
    points.check_draws(x0, t, step().draws(), given)


def bytes_moved(setting: Setting) -> int:
    return REQUIRED_PASSES[setting.mode] * bytes_of_shape(setting)


OP = Op(
    "path_sample", points.SIZES, points.MODES, inputs, providers, check, bytes_moved, peers=tuple(points.PEERS),
    tensor_bytes=bytes_of_shape, gpu_sizes=points.GPU_SIZES,
)  # fmt: skip
