"""path_loss: a training step's share outside the model, on the optimal-transport path.

Every provider draws x0 (unless given) and t, moves to x_t = t x1 + (1 - t) x0, and computes mean ||o - (x1 - x0)||^2 and its gradient
in o. The model is replaced by a fixed leaf prediction o, which stands between the two halves: no provider may fuse across it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fm_fast as fm
from benchmarks import peers
from benchmarks.op import Inexact, Op, Provider, Setting, bytes_of_shape
from fm_fast import _backends

SIZES = {
    "small": (128, 3, 32, 32),
    "large": (32, 3, 256, 256),
    "2-D": (256, 2),
    "2-D, many": (8192, 2),
    "tabular": (1024, 64),
    "robotics": (256, 16, 7),  # chunks of 16 actions of an arm of 7 joints
    "latents": (32, 4, 32, 32),
}
MODES = ("x0 drawn", "x0 given")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
REQUIRED_PASSES = {"x0 drawn": 5, "x0 given": 7}


@dataclass(frozen=True)
class Inputs:
    """Data, the prediction leaf and, where it is given, the noise."""

    x1: Tensor
    o: Tensor
    x0: Tensor | None


class Outcome(NamedTuple):
    """What a step computed; ``draws`` tells the x0 and t it used, on request, so that telling is not timed."""

    x_t: Tensor
    loss: Tensor
    grad: Tensor
    draws: Callable[[], tuple[Tensor, Tensor]]


def inputs(setting: Setting) -> Inputs:
    def draw() -> Tensor:
        return torch.randn(setting.shape, dtype=setting.dtype, device=setting.device)

    return Inputs(draw(), draw().requires_grad_(), draw() if setting.mode == "x0 given" else None)


def _draw(given: Inputs) -> tuple[Tensor, Tensor]:
    x0 = torch.randn_like(given.x1) if given.x0 is None else given.x0
    return x0, torch.rand(given.x1.shape[0], dtype=given.x1.dtype, device=given.x1.device)


def _over(t: Tensor, x: Tensor) -> Tensor:
    return t.reshape(-1, *[1] * (x.dim() - 1))


def _naive_point(x1: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    t = _over(t, x1)
    return (1 - t) * x0 + t * x1


def _naive_loss(o: Tensor, x1: Tensor, x0: Tensor) -> Tensor:
    return ((o - (x1 - x0)) ** 2).mean()


def _lerp_point(x1: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    return torch.lerp(x0, x1, _over(t, x1))


def _mse_loss(o: Tensor, x1: Tensor, x0: Tensor) -> Tensor:
    return F.mse_loss(o, x1 - x0)


def _two_halves(point: Callable[..., Tensor], loss: Callable[..., Tensor]) -> Callable[[Inputs, Setting], Callable[[], Outcome]]:
    """A provider's step from its x_t and its loss, with the noise drawn outside of both."""

    def build(given: Inputs, setting: Setting) -> Callable[[], Outcome]:
        def step() -> Outcome:
            x0, t = _draw(given)
            x_t = point(given.x1, x0, t)
            value = loss(given.o, given.x1, x0)
            return Outcome(x_t, value.detach(), torch.autograd.grad(value, given.o)[0], lambda: (x0, t))

        return step

    return build


def _compiled_outside(given: Inputs, setting: Setting) -> Callable[[], Outcome]:
    return _two_halves(torch.compile(_naive_point, dynamic=False), torch.compile(_naive_loss, dynamic=False))(given, setting)


def _compiled_inside(given: Inputs, setting: Setting) -> Callable[[], Outcome]:
    """torch.compile sees the drawing too, as in a training step compiled whole."""

    def draw_point(x1: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        x0, t = _draw(Inputs(x1, x1, noise))
        return _naive_point(x1, x0, t), x0, t

    first, loss = torch.compile(draw_point, dynamic=False), torch.compile(_naive_loss, dynamic=False)

    def step() -> Outcome:
        x_t, x0, t = first(given.x1, given.x0)
        value = loss(given.o, given.x1, x0)
        return Outcome(x_t, value.detach(), torch.autograd.grad(value, given.o)[0], lambda: (x0, t))

    return step


# (x1, x0) -> (x_t, target, t)
PeerPoint = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def _peer(make: Callable[[], PeerPoint]) -> Callable[[Inputs, Setting], Callable[[], Outcome]]:
    """A library that computes x_t and the target together, and leaves the noise before them and the loss after them to its user."""

    def build(given: Inputs, setting: Setting) -> Callable[[], Outcome]:
        point = make()

        def step() -> Outcome:
            x0 = torch.randn_like(given.x1) if given.x0 is None else given.x0
            x_t, target, t = point(given.x1, x0)
            value = ((given.o - target) ** 2).mean()
            return Outcome(x_t, value.detach(), torch.autograd.grad(value, given.o)[0], lambda: (x0, t))

        return step

    return build


def _torchcfm() -> PeerPoint:
    from torchcfm.conditional_flow_matching import ConditionalFlowMatcher

    matcher = ConditionalFlowMatcher(sigma=0.0)

    def point(x1: Tensor, x0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        t, x_t, target = matcher.sample_location_and_conditional_flow(x0, x1)
        return x_t, target, t

    return point


def _flow_matching() -> PeerPoint:
    from flow_matching.path import CondOTProbPath

    path = CondOTProbPath()

    def point(x1: Tensor, x0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        t = torch.rand(x1.shape[0], dtype=x1.dtype, device=x1.device)
        sample = path.sample(x_0=x0, x_1=x1, t=t)
        return sample.x_t, sample.dx_t, t

    return point


PEERS = {"torchcfm": _torchcfm, "flow_matching": _flow_matching}
# It draws the times on the host, which no CUDA graph can hold.
CPU_PEERS = ("torchcfm",)


def _peers(setting: Setting) -> list[Provider]:
    names = [name for name in PEERS if peers.available(name) and (setting.device.type == "cpu" or name not in CPU_PEERS)]
    return [Provider(name, _peer(PEERS[name])) for name in names]


def _ours(backend: str) -> Callable[[Inputs, Setting], Callable[[], Outcome]]:
    def build(given: Inputs, setting: Setting) -> Callable[[], Outcome]:
        counter = _Counter(setting.device)

        def step() -> Outcome:
            s = fm.sample_path(given.x1, x0=given.x0, seed=counter.seed, step=counter.next(), backend=backend)
            value = s.loss(given.o)
            grad = torch.autograd.grad(value, given.o)[0]
            return Outcome(s.x_t, value.detach(), grad, lambda: (s.x0, s.t))

        return step

    return build


class _Counter:
    """Seed and training step: plain numbers on the CPU; on a GPU device tensors, counted in place, as a captured graph needs."""

    def __init__(self, device: torch.device) -> None:
        self.on_device = device.type == "cuda"
        self.seed = torch.zeros((), dtype=torch.int64, device=device) if self.on_device else 0
        self.step = torch.zeros((), dtype=torch.int64, device=device) if self.on_device else 0

    def next(self) -> Tensor | int:
        self.step += 1
        return self.step


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


def _our_backends(setting: Setting) -> list[Provider]:
    """The backends of this device that run both ops, the automatic choice first; the reference only where nothing else can."""
    kind = setting.device.type
    first = _backends.resolve("path_loss", setting.device)
    names = [first, *(name for name in _backends.BACKENDS if name not in (first, "reference"))]
    able = [name for name in names if all(_backends.why_not(op, kind, name) is None for op in ("path_sample", "path_loss"))]
    return [Provider(f"fm_fast {name}", _ours(name)) for name in able]


def providers(setting: Setting) -> list[Provider]:
    others = [
        Provider("naive eager", _two_halves(_naive_point, _naive_loss)),
        Provider("best eager", _two_halves(_lerp_point, _mse_loss)),
        Provider("compile, noise inside", _compiled_inside),
        Provider("compile, noise outside", _compiled_outside),
        *_peers(setting),
        Provider("memory floor", _memory_floor, gated=False),
    ]
    return [*_our_backends(setting), *others]


def _relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def check(given: Inputs, setting: Setting, step: Callable[[], Outcome]) -> None:
    """x_t, loss and gradient against float64 from the step's own draws; the draws against the distributions they should have."""
    first, x_t, loss, grad = _recomputed(given, step)
    tolerance = TOLERANCE[setting.dtype]
    explained = tolerance + (_underflow(given.o.numel()) if setting.dtype == torch.float16 else 0.0)
    errors = {
        "x_t": _relative_error(first.x_t, x_t),
        "loss": _relative_error(first.loss, loss),
        "gradient": _relative_error(first.grad, grad),
    }
    for name, error in errors.items():
        assert error <= (explained if name == "gradient" else tolerance), _off_by(name, error, tolerance)
    x0, t = (values.double() for values in first.draws())
    assert float(t.min()) >= 0.0 and float(t.max()) <= 1.0 and abs(float(t.mean()) - 0.5) < 0.29 * 5 / len(t) ** 0.5, "t is not uniform"
    assert abs(float(x0.mean())) < 5 / x0.numel() ** 0.5 and abs(float(x0.var()) - 1) < 8 / x0.numel() ** 0.5, "x0 is not normal"
    again = step().draws()
    assert not torch.equal(again[1], first.draws()[1]), "t repeats"
    assert given.x0 is not None or not torch.equal(again[0], first.draws()[0]), "x0 repeats"
    if errors["gradient"] > tolerance:
        raise Inexact(_off_by("gradient", errors["gradient"], tolerance), errors["gradient"])


def _off_by(name: str, error: float, tolerance: float) -> str:
    return f"{name} is off by {error:.1e} (relative), more than {tolerance:.0e}"


def _underflow(count: int) -> float:
    """What the relative error of the gradient 2 e / N may be where float16 holds 1 / N before it is multiplied by 2 e.

    Below 2^-14 float16 has no more than the multiples of 2^-24. 1 / N is off by up to 2^-25, which is N 2^-25 of it; the product is off by
    up to 2^-25 once more, and the root of its mean square is 2 sqrt(3) / N, since e is a sum of three normal numbers.
    """
    return count * 2.0**-25 * (1.0 + 1.0 / (2.0 * 3.0**0.5))


def _recomputed(given: Inputs, step: Callable[[], Outcome]) -> tuple[Outcome, Tensor, Tensor, Tensor]:
    outcome = step()
    x0, t = (values.double() for values in outcome.draws())
    x1, o, column = given.x1.double(), given.o.detach().double(), _over(t, given.x1)
    error = o - (x1 - x0)
    return outcome, (1 - column) * x0 + column * x1, error.square().mean(), 2 * error / error.numel()


def bytes_moved(setting: Setting) -> int:
    return REQUIRED_PASSES[setting.mode] * bytes_of_shape(setting)


OP = Op("path_loss", SIZES, MODES, inputs, providers, check, bytes_moved, peers=tuple(PEERS), tensor_bytes=bytes_of_shape)
