"""step_control: whether the steps that the samples of a batch have tried count, and how their next ones go, of dopri5.

Every provider does it again and again, on errors that are accepted two times of three.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.op import Op, Provider, Setting
from benchmarks.points import check_close, our_backends
from fm_fast import _ops, reference
from fm_fast.reference import StepControl
from fm_fast.solvers import DOPRI5

SIZES = {"small": (256,), "many": (8192,)}
MODES = ("one part", "two parts")


@dataclass(frozen=True)
class Inputs:
    """Where all samples are, and the errors of the steps that they have tried."""

    numbers: Tensor
    counts: Tensor
    means: Tensor
    stops: Tensor
    nodes: Tensor


Step = Callable[[], StepControl]


def inputs(setting: Setting) -> Inputs:
    (batch,), doubles = setting.shape, {"dtype": torch.float64, "device": setting.device}
    t, h = torch.rand(batch, **doubles), torch.full((batch,), 0.01, **doubles)
    counts = torch.tensor([1, 0, reference.ON_THE_WAY], device=setting.device).unsqueeze(1).repeat(1, batch)
    means = 1.5 * torch.rand(1 + MODES.index(setting.mode), batch, **doubles)
    return Inputs(torch.stack([t, h, h]), counts, means, torch.tensor([0.0, 1.0], **doubles), torch.tensor(DOPRI5.table.c, **doubles))


def _ours(backend: str) -> Callable[[Inputs, Setting], Step]:
    def build(given: Inputs, setting: Setting) -> Step:
        op, batch = _ops.step_control(backend), setting.shape[0]
        accepted, totals = given.means.new_empty(batch, dtype=torch.uint8), given.counts.new_zeros(3)
        times, factors = given.means.new_empty(len(given.nodes), batch), given.means.new_empty(2, batch)

        def step() -> StepControl:
            numbers, counts = given.numbers.clone(), given.counts.clone()
            op(numbers, counts, totals.zero_(), accepted, times, factors, given.means, given.stops, given.nodes, DOPRI5.order, 6)
            return StepControl(numbers, counts, totals, accepted, times, factors)

        return step

    return build


def _eager(given: Inputs, setting: Setting) -> Step:
    return lambda: reference.step_control(given.numbers, given.counts, given.means, given.stops, given.nodes, DOPRI5.order, 6)


def _compiled(given: Inputs, setting: Setting) -> Step:
    function = torch.compile(reference.step_control, dynamic=False)
    return lambda: function(given.numbers, given.counts, given.means, given.stops, given.nodes, DOPRI5.order, 6)


def providers(setting: Setting) -> list[Provider]:
    found = [Provider(f"fm_fast {name}", _ours(name)) for name in our_backends(setting, "step_control") if name != "reference"]
    return [*found, Provider("eager", _eager), Provider("torch.compile", _compiled)]


def check(given: Inputs, setting: Setting, step: Step) -> None:
    """The new lengths of the steps, and which count."""
    found, error = step(), given.means.amax(0).sqrt()
    factor = (0.9 * error ** (-1.0 / DOPRI5.order)).clamp(0.2, 10.0)
    left, longer = 1.0 - given.numbers[0], given.numbers[2] * torch.where(error < 1.0, factor.clamp(min=1.0), factor)
    goes_on = (error > 1.0) | (given.numbers[1] < left)
    check_close("length", found.numbers[1][goes_on], longer[goes_on], 1e-9)
    assert torch.equal(found.accepted.bool(), error <= 1.0), "steps count that do not, or the other way round"


def bytes_moved(setting: Setting) -> int:
    """Numbers and counts read and written, the means read, two factors, the times and a byte written: of each sample."""
    parts = 1 + MODES.index(setting.mode)
    return setting.shape[0] * (8 * (2 * 6 + parts + len(DOPRI5.table.c)) + 2 * torch.float32.itemsize + 1)


OP = Op("step_control", SIZES, MODES, inputs, providers, check, bytes_moved)
