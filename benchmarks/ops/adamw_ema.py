"""adamw_ema: a training step's share behind the backward pass, for the parameters of a U-Net.

Every provider clips the norm of all gradients, takes a step of AdamW and moves the averages of the weights. With 16-bit weights it also
reads 16-bit gradients, updates float32 masters and rounds them. Sizes are (channels, levels, blocks) of the reference U-Net.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.op import Op, Provider, Setting
from benchmarks.points import check_close, copying
from fm_fast.nn import UNet, UNetConfig
from fm_fast.train.optimiser.adamw_ema import AdamWEMA
from fm_fast.train.optimiser.averaging import fixed_decay

SIZES = {"digits": (32, 2, 1), "narrow": (32, 3, 1), "wide": (64, 3, 2)}
MULTIPLIERS = (1, 2, 2)
MODES = {"1 average": (0.999,), "3 averages": (0.99, 0.999, 0.9999)}
RATE, BETAS, EPSILON, WEIGHT_DECAY, NORM = 1e-3, (0.9, 0.99), 1e-8, 0.01, 1.0
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}
CHECKED_STEPS = 2
# (averages, weights, 1 - decay) -> None
Move = Callable[[Sequence[Tensor], Sequence[Tensor], float], None]


@dataclass(frozen=True)
class Inputs:
    """The weights before the first step, and the gradients of every step."""

    weights: list[Tensor]
    gradients: list[Tensor]


class Outcome(NamedTuple):
    """What a step leaves: the weights in their own dtype, and each average."""

    weights: Sequence[Tensor]
    averages: Sequence[Sequence[Tensor]]


def _parameter_shapes(channels: int, levels: int, blocks: int) -> list[torch.Size]:
    config = UNetConfig(
        channels=channels, multipliers=MULTIPLIERS[:levels], blocks=blocks, attention_sizes=(8,), head_channels=32, groups=8, classes=10
    )
    with torch.device("meta"):
        return [p.shape for p in UNet(config).parameters()]


def inputs(setting: Setting) -> Inputs:
    shapes = _parameter_shapes(*setting.shape)

    def draw(scale: float) -> list[Tensor]:
        return [(scale * torch.randn(shape)).to(setting.device, setting.dtype) for shape in shapes]

    return Inputs(draw(0.1), draw(1e-2))  # a gradient of norm 9 and more, which is clipped


# Providers


def _ours(given: Inputs, setting: Setting) -> Callable[[], Outcome]:
    weights = _parameters(given.weights, given.gradients)
    averages = [fixed_decay(decay) for decay in MODES[setting.mode]]
    optimiser = AdamWEMA(weights, RATE, BETAS, EPSILON, WEIGHT_DECAY, max_norm=NORM, averages=averages)
    kept = [[optimiser.state[p]["averages"][i] for p in weights] for i in range(len(averages))]

    def step() -> Outcome:
        optimiser.step()
        return Outcome(weights, kept)

    return step


def _parameters(weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
    parameters: list[Tensor] = [nn.Parameter(weight.clone()) for weight in weights]
    for p, gradient in zip(parameters, gradients, strict=True):
        p.grad = gradient.clone()
    return parameters


def _torch(kind: str, move: Move) -> Callable[[Inputs, Setting], Callable[[], Outcome]]:
    """torch's optimiser in its fused, foreach or for-loop form, and a way to move averages."""

    def build(given: Inputs, setting: Setting) -> Callable[[], Outcome]:
        half = setting.dtype != torch.float32
        masters = _parameters([x.float() for x in given.weights], [g.float() for g in given.gradients])
        weights = [x.clone() for x in given.weights] if half else masters
        values = [p.detach() for p in masters]
        averages = [[x.clone() for x in values] for _ in MODES[setting.mode]]
        form = {"fused": kind == "fused", "foreach": kind == "foreach", "capturable": setting.device.type == "cuda"}
        optimiser = torch.optim.AdamW(masters, RATE, BETAS, EPSILON, WEIGHT_DECAY, **form)

        def step() -> Outcome:
            # In float32 the gradients stay as the first step has clipped them: to clip them again costs the same and changes nothing.
            if half:
                torch._foreach_copy_([p.grad for p in masters if p.grad is not None], given.gradients)
            nn.utils.clip_grad_norm_(masters, NORM)
            optimiser.step()
            for average, decay in zip(averages, MODES[setting.mode], strict=True):
                move(average, values, 1.0 - decay)
            if half:
                torch._foreach_copy_(weights, values)
            return Outcome(weights, averages)

        return step

    return build


def _foreach(averages: Sequence[Tensor], weights: Sequence[Tensor], rate: float) -> None:
    torch._foreach_lerp_(averages, weights, rate)


def _loop(averages: Sequence[Tensor], weights: Sequence[Tensor], rate: float) -> None:
    for average, weight in zip(averages, weights, strict=True):
        average.mul_(1.0 - rate).add_(weight, alpha=rate)


def providers(setting: Setting) -> list[Provider]:
    return [
        Provider("fm_fast", _ours),
        Provider("clip, fused AdamW, foreach EMA", _torch("fused", _foreach)),
        Provider("clip, foreach AdamW, foreach EMA", _torch("foreach", _foreach)),
        Provider("clip, loop AdamW, loop EMA", _torch("loop", _loop)),
        Provider("memory floor", copying(bytes_moved), gated=False),
    ]


# Correctness


def check(given: Inputs, setting: Setting, step: Callable[[], Outcome]) -> None:
    """Weights and averages after the first steps against torch's optimiser in float64."""
    found = [step() for _ in range(CHECKED_STEPS)][-1]
    wanted = _recomputed(given, setting)
    for name, ours, exact, tolerance in (
        ("weights", found.weights, wanted.weights, TOLERANCE[setting.dtype]),
        *(("average", a, b, TOLERANCE[torch.float32]) for a, b in zip(found.averages, wanted.averages, strict=True)),
    ):
        check_close(name, _joined(ours), _joined(exact), tolerance)


def _recomputed(given: Inputs, setting: Setting) -> Outcome:
    weights = _parameters([x.double() for x in given.weights], [g.double() for g in given.gradients])
    averages = [[p.detach().clone() for p in weights] for _ in MODES[setting.mode]]
    optimiser = torch.optim.AdamW(weights, RATE, BETAS, EPSILON, WEIGHT_DECAY, foreach=False)
    for _ in range(CHECKED_STEPS):
        for p, gradient in zip(weights, given.gradients, strict=True):
            p.grad = gradient.double()
        nn.utils.clip_grad_norm_(weights, NORM)
        optimiser.step()
        for average, decay in zip(averages, MODES[setting.mode], strict=True):
            _loop(average, [p.detach() for p in weights], 1.0 - decay)
    return Outcome([p.detach() for p in weights], averages)


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([x.detach().flatten() for x in tensors])


def bytes_moved(setting: Setting) -> int:
    """The gradient twice; weights (masters), both moments and every average in and out; the rounded weights out."""
    half = setting.dtype.itemsize if setting.dtype != torch.float32 else 0
    return _count(setting) * (2 * setting.dtype.itemsize + 8 * (3 + len(MODES[setting.mode])) + half)


def tensor_bytes(setting: Setting) -> int:
    """Of all weights."""
    return _count(setting) * setting.dtype.itemsize


def _count(setting: Setting) -> int:
    return sum(shape.numel() for shape in _parameter_shapes(*setting.shape))


OP = Op("adamw_ema", SIZES, tuple(MODES), inputs, providers, check, bytes_moved, tensor_bytes=tensor_bytes)
