"""attention: self-attention of the pixels of an image, from the joint projection of queries, keys and values to the result.

Our layers use it where it is faster than PyTorch's own: on CPUs with AVX2 or AVX-512. Sizes are (batch, pixels, heads, features). A
training step pays for both halves, a sampling step for the forward pass.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.op import Op, Provider, Setting, bytes_of_shape
from benchmarks.points import check_close, our_backends
from fm_fast import _ops

SIZES = {
    "16x16": (64, 256, 2, 32), "16x16, 4 heads of 64": (64, 256, 4, 64), "8x8": (64, 64, 2, 32), "32x32": (4, 1024, 4, 64),
}  # fmt: skip
MODES = ("forward", "forward and backward")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}

Attend = Callable[[Tensor], Tensor]
Step = Callable[[], Tensor]


@dataclass(frozen=True)
class Inputs:
    """The joint projection [B, pixels, 3, heads, features], and the gradient of the result [B, pixels, heads, features] or None."""

    joint: Tensor
    grad_out: Tensor | None


def inputs(setting: Setting) -> Inputs:
    batch, pixels, heads, features = setting.shape
    joint = torch.randn(batch, pixels, 3, heads, features, dtype=setting.dtype)
    if setting.mode == MODES[0]:
        return Inputs(joint, None)
    return Inputs(joint.requires_grad_(), torch.randn(setting.shape, dtype=setting.dtype))


def _by(attend: Attend) -> Callable[[Inputs, Setting], Step]:
    """The result, or the gradient of the joint projection."""

    def build(given: Inputs, setting: Setting) -> Step:
        if given.grad_out is None:
            return lambda: attend(given.joint)
        return lambda: torch.autograd.grad(attend(given.joint), given.joint, given.grad_out)[0]

    return build


def _parts(joint: Tensor) -> tuple[Tensor, ...]:
    return joint.permute(2, 0, 3, 1, 4).unbind(0)


def _fused(joint: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*_parts(joint)).transpose(1, 2)


def _composite(joint: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return _fused(joint)


def _plain(joint: Tensor) -> Tensor:
    query, key, value = _parts(joint)
    return (torch.softmax(query @ key.transpose(-1, -2) / math.sqrt(joint.shape[4]), dim=-1) @ value).transpose(1, 2)


def _ours(backend: str) -> Attend:
    return lambda joint: _ops.attention(joint, backend)


def providers(setting: Setting) -> list[Provider]:
    return [
        *(Provider(f"fm_fast {name}", _by(_ours(name))) for name in our_backends(setting, "attention")),
        Provider("torch, fused", _by(_fused)),
        Provider("torch, composite", _by(_composite)),
        Provider("matmul, softmax, matmul", _by(_plain)),
    ]


def check(given: Inputs, setting: Setting, step: Step) -> None:
    """Against float64."""
    exact = given.joint.detach().double().requires_grad_(given.grad_out is not None)
    wanted = _plain(exact)
    if given.grad_out is not None:
        (wanted,) = torch.autograd.grad(wanted, exact, given.grad_out.double())
    check_close("result", step().detach(), wanted, TOLERANCE[setting.dtype])


OP = Op("attention", SIZES, MODES, inputs, providers, check, devices=("cpu",), tensor_bytes=bytes_of_shape, rounds=20)
