"""path_loss: a training step's share outside the model, on the optimal-transport path.

Every provider draws x0 (unless given) and t, moves to x_t = t x1 + (1 - t) x0, and computes mean ||o - (x1 - x0)||^2 and its gradient
in o. The model is replaced by a fixed leaf prediction o, which stands between the two halves: no provider may fuse across it.
"forward" stops at the loss, "backward" computes the gradient alone, of a loss whose graph is kept. fm_fast does the gradient's work in
forward, so its backward is next to nothing: only "full" is what a training step pays.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import points
from benchmarks.op import Inexact, Op, Provider, Setting, bytes_of_shape, keeping_graphs
from benchmarks.points import PEERS, Data, Make, off_by, over, relative_error

SIZES, MODES = points.SIZES, points.MODES
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
REQUIRED_PASSES = {"x0 drawn": 5, "x0 given": 7}


@dataclass(frozen=True)
class Inputs(Data):
    """And the prediction leaf."""

    o: Tensor


class Outcome(NamedTuple):
    """What a step computed; ``draws`` tells the x0 and t it used, on request, so that telling is not timed. grad: None of forward."""

    x_t: Tensor
    loss: Tensor
    grad: Tensor | None
    draws: Callable[[], tuple[Tensor, Tensor]]


Step = Callable[[], Outcome]
# A step without its gradient, the loss with its graph
Forward = Callable[[], Outcome]


def inputs(setting: Setting) -> Inputs:
    def draw() -> Tensor:
        return torch.randn(setting.shape, dtype=setting.dtype, device=setting.device)

    return Inputs(draw(), draw() if setting.mode == "x0 given" else None, draw().requires_grad_())


def _step(forward: Forward, o: Tensor, part: str) -> Step:
    if part == "forward":
        return forward
    if part == "full":
        return lambda: _with_gradient(forward(), o, keep=False)
    with keeping_graphs():
        made = forward()
    return lambda: _with_gradient(made, o, keep=True)


def _with_gradient(made: Outcome, o: Tensor, keep: bool) -> Outcome:
    return Outcome(made.x_t, made.loss.detach(), torch.autograd.grad(made.loss, o, retain_graph=keep)[0], made.draws)


# Providers


def _naive_loss(o: Tensor, target: Tensor) -> Tensor:
    return ((o - target) ** 2).mean()


def _naive_loss_of_pair(o: Tensor, x1: Tensor, x0: Tensor) -> Tensor:
    return _naive_loss(o, x1 - x0)


def _best_loss_of_pair(o: Tensor, x1: Tensor, x0: Tensor) -> Tensor:
    return F.mse_loss(o, x1 - x0)


def _two_halves(make: Make, loss_of_pair: Callable[[Tensor, Tensor, Tensor], Tensor], compiled: bool) -> Callable[[Inputs, Setting], Step]:
    """A provider's step from its x_t and its loss; the loss of a library's target is the naive one."""

    def build(given: Inputs, setting: Setting) -> Step:
        draw, loss = make(given), torch.compile(loss_of_pair, dynamic=False) if compiled else loss_of_pair

        def forward() -> Outcome:
            point = draw()
            value = loss(given.o, given.x1, point.x0) if point.target is None else _naive_loss(given.o, point.target)
            return Outcome(point.x_t, value, None, lambda: (point.x0, point.t))

        return _step(forward, given.o, setting.part)

    return build


def _ours(backend: str) -> Callable[[Inputs, Setting], Step]:
    def build(given: Inputs, setting: Setting) -> Step:
        draw = points.ours(given, backend)

        def forward() -> Outcome:
            sample = draw()
            return Outcome(sample.x_t, sample.loss(given.o), None, lambda: (sample.x0, sample.t))

        return _step(forward, given.o, setting.part)

    return build


def _memory_floor(given: Inputs, setting: Setting) -> Callable[[], None]:
    """The memory passes that the op cannot avoid, and no arithmetic: 2 + 3 with the noise drawn in registers, 3 + 4 with x0 read."""
    x1, o, x0 = given.x1, given.o.detach(), given.x0
    x_t, grad = torch.empty_like(x1), torch.empty_like(o)

    def step() -> None:
        if x0 is None:
            x_t.copy_(x1)
            torch.add(o, x1, out=grad)
        else:
            torch.add(x1, x0, out=x_t)
            torch.addcmul(o, x1, x0, out=grad)

    return step


def _other(name: str, make: Make) -> Provider:
    loss_of_pair = _best_loss_of_pair if name == "best eager" else _naive_loss_of_pair
    return Provider(name, _two_halves(make, loss_of_pair, compiled=name.startswith("compile")))


def providers(setting: Setting) -> list[Provider]:
    makes = points.EAGER_AND_COMPILED | {name: points.of_peer(name) for name in points.peers_for(setting)}
    return [
        *(Provider(f"fm_fast {name}", _ours(name)) for name in points.our_backends(setting, "path_sample", "path_loss")),
        *(_other(name, make) for name, make in makes.items()),
        *([Provider("memory floor", _memory_floor, gated=False)] if setting.part == "full" else []),
    ]


# Correctness


def check(given: Inputs, setting: Setting, step: Step) -> None:
    """x_t, loss and gradient against float64 from the step's own draws; the draws against the distributions they should have."""
    found = step()
    x0, t = (values.double() for values in found.draws())
    exact = _recomputed(given, x0, t)
    tolerance = TOLERANCE[setting.dtype]
    explained = tolerance + (_underflow(given.o.numel()) if setting.dtype == torch.float16 else 0.0)
    errors = {"x_t": relative_error(found.x_t, exact.x_t), "loss": relative_error(found.loss, exact.loss)}
    if found.grad is not None and exact.grad is not None:
        errors["gradient"] = relative_error(found.grad, exact.grad)
    for name, error in errors.items():
        assert error <= (explained if name == "gradient" else tolerance), off_by(name, error, tolerance)
    if setting.part != "backward":
        points.check_draws(x0, t, step().draws(), given)
    if errors.get("gradient", 0.0) > tolerance:
        raise Inexact(off_by("gradient", errors["gradient"], tolerance), errors["gradient"])


def _underflow(count: int) -> float:
    """What the relative error of the gradient 2 e / N may be where float16 holds 1 / N before it is multiplied by 2 e.

    Below 2^-14 float16 has no more than the multiples of 2^-24. 1 / N is off by up to 2^-25, which is N 2^-25 of it; the product is off by
    up to 2^-25 once more, and the root of its mean square is 2 sqrt(3) / N, since e is a sum of three normal numbers.
    """
    return count * 2.0**-25 * (1.0 + 1.0 / (2.0 * 3.0**0.5))


def _recomputed(given: Inputs, x0: Tensor, t: Tensor) -> Outcome:
    x1, o, column = given.x1.double(), given.o.detach().double(), over(t, given.x1)
    error = o - (x1 - x0)
    return Outcome((1 - column) * x0 + column * x1, error.square().mean(), 2 * error / error.numel(), lambda: (x0, t))


def bytes_moved(setting: Setting) -> int:
    """Forward alone reads what it reads, writes x_t and no gradient; backward reads a gradient that forward made, and writes it scaled."""
    passes = {"full": REQUIRED_PASSES[setting.mode], "forward": REQUIRED_PASSES[setting.mode] - 1, "backward": 2}[setting.part]
    return passes * bytes_of_shape(setting)


OP = Op(
    "path_loss", SIZES, MODES, inputs, providers, check, bytes_moved, peers=tuple(PEERS), tensor_bytes=bytes_of_shape,
    parts=("full", "forward", "backward"), gpu_sizes=points.GPU_SIZES,
)  # fmt: skip
