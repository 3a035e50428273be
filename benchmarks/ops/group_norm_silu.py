"""group_norm_silu: forward and backward of the layer before every convolution of a U-Net.

Every provider computes y = silu(GroupNorm(x)) and the gradients of x and of the norm's parameters; "modulated" takes the channels in two
halves, as a decoder has them, and modulates the norm by scale and shift. Parameters have the dtype of x, as in a network cast whole.
"forward" is y with what backward will need, "backward" the gradients alone.
"NHWC" and "NCHW" are the memory formats of our provider's x; torch's functions run in both, each on tensors of its own format.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.op import Op, Provider, Setting, bytes_of_shape, keeping_graphs
from benchmarks.points import check_close
from fm_fast import _backends
from fm_fast.nn.norm import GroupNormSiLU

SIZES = {"32x32": (64, 32, 32, 32), "16x16": (64, 64, 16, 16), "8x8": (64, 128, 8, 8)}
MODES = ("NHWC", "NCHW", "NHWC modulated", "NCHW modulated")
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
GROUPS = 32
FORMATS = {"NHWC": torch.channels_last, "NCHW": torch.contiguous_format}

Step = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Inputs:
    """The channels in one tensor, what modulates them (or None), the norm's parameters and the gradient of the result."""

    x: Tensor
    scale: Tensor | None
    shift: Tensor | None
    weight: Tensor
    bias: Tensor
    grad_y: Tensor

    def to(self, layout: str) -> "Inputs":
        x, grad_y = (t.contiguous(memory_format=FORMATS[layout]) for t in (self.x, self.grad_y))
        return Inputs(x, self.scale, self.shift, self.weight, self.bias, grad_y)

    def double(self) -> "Inputs":
        return Inputs(*(None if t is None else t.double() for t in self.__dict__.values()))  # type: ignore[arg-type]

    def leaves(self) -> list[Tensor]:
        """x, or its two halves, and everything else that gets a gradient."""
        parts = [self.x] if self.scale is None else [half.clone(memory_format=_format(self.x)) for half in self.x.chunk(2, dim=1)]
        modulation = [] if self.scale is None or self.shift is None else [self.scale, self.shift]
        return [t.detach().requires_grad_() for t in (*parts, self.weight, self.bias, *modulation)]


def _format(x: Tensor) -> torch.memory_format:
    return torch.contiguous_format if x.is_contiguous() else torch.channels_last


def inputs(setting: Setting) -> Inputs:
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=setting.device).to(setting.dtype)

    batch, channels = setting.shape[:2]
    modulation = [draw(batch, channels) if "modulated" in setting.mode else None for _ in range(2)]
    return Inputs(draw(*setting.shape), *modulation, draw(channels), draw(channels), draw(*setting.shape))


def _formula(*leaves: Tensor) -> Tensor:
    """torch's own functions, of the leaves that Inputs gives."""
    if len(leaves) == 3:
        return F.silu(F.group_norm(leaves[0], GROUPS, *leaves[1:]))
    first, second, weight, bias, scale, shift = leaves
    h = F.group_norm(torch.cat([first, second], 1), GROUPS, weight, bias)
    return F.silu(torch.addcmul(shift[:, :, None, None], h, 1 + scale[:, :, None, None]))


def _torchs(layout: str, compiled: bool = False) -> Callable[[Inputs, Setting], Step]:
    def build(given: Inputs, setting: Setting) -> Step:
        placed = given.to(layout)
        function = torch.compile(_formula, dynamic=False) if compiled else _formula
        return _step(function, placed.leaves(), placed.grad_y, setting.part)

    return build


def _ours(backend: str) -> Callable[[Inputs, Setting], Step]:
    def build(given: Inputs, setting: Setting) -> Step:
        placed = given.to(setting.mode[:4])
        layer = GroupNormSiLU(GROUPS, setting.shape[1], fused=backend != "reference")

        def function(*leaves: Tensor) -> Tensor:
            weight, bias = leaves[-2:] if len(leaves) == 3 else leaves[2:4]
            return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, leaves[:1], _modulation(leaves))

        return _step(function, placed.leaves(), placed.grad_y, setting.part)

    return build


def _modulation(leaves: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return {} if len(leaves) == 3 else {"second": leaves[1], "scale": leaves[4], "shift": leaves[5]}


def _step(function: Callable[..., Tensor], leaves: list[Tensor], grad_y: Tensor, part: str = "full") -> Step:
    """A step returns y and the gradients; y alone of forward."""

    def with_gradients(y: Tensor, keep: bool) -> tuple[Tensor, ...]:
        return y.detach(), *torch.autograd.grad(y, leaves, grad_y, retain_graph=keep)

    if part == "forward":
        return lambda: (function(*leaves),)
    if part == "full":
        return lambda: with_gradients(function(*leaves), keep=False)
    with keeping_graphs():
        kept = function(*leaves)
    return lambda: with_gradients(kept, keep=True)


def providers(setting: Setting) -> list[Provider]:
    backend, layout = _backends.resolve("group_norm_silu", setting.device), setting.mode[:4]
    return [
        Provider(f"fm_fast {backend}", _ours(backend)),
        Provider("torch eager NHWC", _torchs("NHWC")),
        Provider("torch eager NCHW", _torchs("NCHW")),
        Provider(f"torch.compile {layout}", _torchs(layout, compiled=True)),
        Provider("fm_fast reference", _ours("reference")),
    ]


def check(given: Inputs, setting: Setting, step: Step) -> None:
    """The result and every gradient against float64."""
    wide = given.double()
    exact, found = _step(_formula, wide.leaves(), wide.grad_y)(), step()
    assert len(found) == (1 if setting.part == "forward" else len(exact)), f"{len(found)} results instead of {len(exact)}"
    for i, (value, wanted) in enumerate(zip(found, exact, strict=False)):
        check_close("the result" if i == 0 else f"gradient {i}", value, wanted, TOLERANCE[setting.dtype])


def bytes_moved(setting: Setting) -> int:
    """x read and y written, then x and the gradient read and one written."""
    return {"full": 5, "forward": 2, "backward": 3}[setting.part] * bytes_of_shape(setting)


OP = Op(
    "group_norm_silu",
    SIZES,
    MODES,
    inputs,
    providers,
    check,
    bytes_moved,
    tensor_bytes=bytes_of_shape,
    parts=("full", "forward", "backward"),
)
