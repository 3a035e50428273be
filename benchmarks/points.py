"""Ways to draw the noise x0 and the times t and to move to x_t = t x1 + (1 - t) x0, on the optimal-transport path.

What ``path_sample`` compares, and the first half of what ``path_loss`` does.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fm_fast as fm
from benchmarks import peers
from benchmarks.op import Provider, Setting
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
GPU_SIZES = {"256 MiB": (342, 3, 256, 256)}
MODES = ("x0 drawn", "x0 given")


class Point(NamedTuple):
    """x_t, the noise and times that led to it, and the target where a library gives it along with them."""

    x_t: Tensor
    x0: Tensor
    t: Tensor
    target: Tensor | None = None


@dataclass(frozen=True)
class Data:
    """Data and, where it is given, the noise."""

    x1: Tensor
    x0: Tensor | None


Draw = Callable[[], Point]
# From the data to a function that draws a point anew at every call
Make = Callable[[Data], Draw]


def over(t: Tensor, x: Tensor) -> Tensor:
    """t [B] as a column for x [B, ...]."""
    return t.reshape(-1, *[1] * (x.dim() - 1))


class AsModule(torch.nn.Module):
    """A function as the module that a library asks for."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.forward = function


def draw(given: Data) -> tuple[Tensor, Tensor]:
    """(x0, t) by PyTorch's generator."""
    x0 = torch.randn_like(given.x1) if given.x0 is None else given.x0
    return x0, torch.rand(given.x1.shape[0], dtype=given.x1.dtype, device=given.x1.device)


def _naive_point(x1: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    t = over(t, x1)
    return (1 - t) * x0 + t * x1


def _lerp_point(x1: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    return torch.lerp(x0, x1, over(t, x1))


def _by(point: Callable[[Tensor, Tensor, Tensor], Tensor], given: Data) -> Draw:
    def make() -> Point:
        x0, t = draw(given)
        return Point(point(given.x1, x0, t), x0, t)

    return make


def naive(given: Data) -> Draw:
    """The formula as one writes it."""
    return _by(_naive_point, given)


def lerp(given: Data) -> Draw:
    """The fewest eager operations."""
    return _by(_lerp_point, given)


def compiled_outside(given: Data) -> Draw:
    """torch.compile of the formula; the noise is drawn before it."""
    return _by(torch.compile(_naive_point, dynamic=False), given)


def compiled_inside(given: Data) -> Draw:
    """torch.compile sees the drawing too, as in a training step compiled whole."""

    def draw_point(x1: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        x0, t = draw(Data(x1, noise))
        return _naive_point(x1, x0, t), x0, t

    compiled = torch.compile(draw_point, dynamic=False)
    return lambda: Point(*compiled(given.x1, given.x0))


EAGER_AND_COMPILED: dict[str, Make] = {
    "naive eager": naive,
    "best eager": lerp,
    "compile, noise inside": compiled_inside,
    "compile, noise outside": compiled_outside,
}

# Peers

# (x1, x0) -> (x_t, target, t)
PeerPoint = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


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


def _torchebm() -> PeerPoint:
    from torchebm.interpolants import LinearInterpolant

    interpolant = LinearInterpolant()

    def point(x1: Tensor, x0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        t = torch.rand(x1.shape[0], dtype=x1.dtype, device=x1.device)
        return *interpolant.interpolate(x0, x1, t), t

    return point


PEERS = {"torchcfm": _torchcfm, "flow_matching": _flow_matching, "torchebm": _torchebm}
# It draws the times on the host, which no CUDA graph can hold.
CPU_PEERS = ("torchcfm",)


def of_peer(name: str) -> Make:
    """A library that computes x_t and the target together, and leaves the noise before them to its user."""

    def make(given: Data) -> Draw:
        point = PEERS[name]()

        def at_work() -> Point:
            x0 = torch.randn_like(given.x1) if given.x0 is None else given.x0
            x_t, target, t = point(given.x1, x0)
            return Point(x_t, x0, t, target)

        return at_work

    return make


def peers_for(setting: Setting) -> list[str]:
    """Those that are installed and can run there."""
    return [name for name in PEERS if peers.available(name) and (setting.device.type == "cpu" or name not in CPU_PEERS)]


# Ours


class Counter:
    """Seed and training step: plain numbers on the CPU; on a GPU device tensors, counted in place, as a captured graph needs."""

    def __init__(self, device: torch.device) -> None:
        on_device = device.type == "cuda"
        self.seed = torch.zeros((), dtype=torch.int64, device=device) if on_device else 0
        self.step = torch.zeros((), dtype=torch.int64, device=device) if on_device else 0

    def next(self) -> Tensor | int:
        self.step += 1
        return self.step


def ours(given: Data, backend: str) -> Callable[[], fm.PathSample]:
    """fm_fast's draw: on a GPU by torch's generator, as the others draw, since a kernel that counts steps would be timed too."""
    if given.x1.is_cuda:
        return lambda: fm.sample_path(given.x1, x0=given.x0, backend=backend)
    counter = Counter(given.x1.device)
    return lambda: fm.sample_path(given.x1, x0=given.x0, seed=counter.seed, step=counter.next(), backend=backend)


def our_backends(setting: Setting, *ops: str) -> list[str]:
    """The backends of the device that run all of the ops, the automatic choice first; the reference only where nothing else can."""
    kind, first = setting.device.type, _backends.resolve(ops[-1], setting.device)
    names = [first, *(name for name in _backends.BACKENDS if name not in (first, "reference"))]
    return [name for name in names if all(_backends.why_not(op, kind, name) is None for op in ops)]


def with_ours(setting: Setting, op: str, ours: Callable[[str], Any], others: Mapping[str, Any], floor: Any) -> list[Provider]:
    """The providers of an op: fm_fast on each backend, the others, and a bound that computes nothing. Builds, as `Provider` has them."""
    return [
        *(Provider(f"fm_fast {name}", ours(name)) for name in our_backends(setting, op)),
        *(Provider(name, build) for name, build in others.items()),
        Provider("memory floor", floor, gated=False),
    ]


def copying(bytes_moved: Callable[[Setting], int]) -> Callable[[Any, Setting], Callable[[], object]]:
    """Builds a bound: the bytes that must be read and written, by one plain copy."""

    def build(given: Any, setting: Setting) -> Callable[[], object]:
        source, target = torch.zeros(2, bytes_moved(setting) // 2, dtype=torch.uint8, device=setting.device)
        return lambda: target.copy_(source)

    return build


# Correctness


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Of all elements together, in float64."""
    return float((found.detach().double() - wanted).norm() / wanted.norm())


def off_by(name: str, error: float, tolerance: float) -> str:
    """The message of a check of a relative error."""
    return f"{name} is off by {error:.1e} (relative), more than {tolerance:.0e}"


def check_close(name: str, found: Tensor, wanted: Tensor, tolerance: float) -> None:
    """AssertionError unless the relative error is within the tolerance."""
    error = relative_error(found, wanted)
    assert error <= tolerance, off_by(name, error, tolerance)


def check_draws(x0: Tensor, t: Tensor, again: tuple[Tensor, Tensor], given: Data) -> None:
    """AssertionError unless t looks uniform, x0 normal, and the next draw is another."""
    assert float(t.min()) >= 0.0 and float(t.max()) <= 1.0 and abs(float(t.mean()) - 0.5) < 0.29 * 5 / len(t) ** 0.5, "t is not uniform"
    assert abs(float(x0.mean())) < 5 / x0.numel() ** 0.5 and abs(float(x0.var()) - 1) < 8 / x0.numel() ** 0.5, "x0 is not normal"
    assert not torch.equal(again[1].double(), t), "t repeats"
    assert given.x0 is not None or not torch.equal(again[0].double(), x0), "x0 repeats"
