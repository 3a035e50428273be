"""Triton kernels: the ops on GPUs, where they are asked for or no compiled CUDA library is there. Importing needs neither a GPU nor Triton.

One op a file: formula, kernel, launcher. ``register`` makes the launchers the CUDA implementations of ops; each is imported, and Triton
with it, at its first call.
"""

import functools
import importlib
import importlib.util
from typing import Any

import torch

LAUNCHERS = {
    "noise": ("noise", "launch"),
    "path_sample": ("path_sample", "launch"),
    "path_loss": ("path_loss", "launch"),
    "path_loss_backward": ("path_loss", "launch_backward"),
    "linear_step": ("linear_step", "launch"),
    "step_error": ("step_error", "launch"),
    "step_control": ("step_control", "launch"),
    "probe": ("probe", "launch"),
    "divergence_step": ("divergence_step", "launch"),
    "adamw_ema_norm": ("adamw_ema", "launch_norm"),
    "adamw_ema": ("adamw_ema", "launch"),
    "group_norm_silu": ("group_norm_silu", "launch"),
    "group_norm_silu_backward": ("group_norm_silu_backward", "launch"),
}


@functools.cache
def launcher(op: str) -> Any:
    """The function that runs an op's kernel."""
    module, name = LAUNCHERS[op]
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)


def _lazily(op: str) -> Any:
    def run(*arguments: Any) -> None:
        if torch.is_grad_enabled() and any(_requires_grad(x) for x in arguments):
            raise RuntimeError(f"fm_fast::{op}: an input requires grad, but the raw op has no derivative: call the public function")
        launcher(op)(*arguments)

    return run


def _requires_grad(argument: Any) -> bool:
    if isinstance(argument, list | tuple):
        return any(_requires_grad(x) for x in argument)
    return isinstance(argument, torch.Tensor) and argument.requires_grad


def register(namespace: str) -> torch.library.Library | None:
    """Register every launcher for dispatch key CUDA of the ops in ``namespace``; None, and nothing done, without Triton.

    The registrations live as long as the returned library is kept.
    """
    if importlib.util.find_spec("triton") is None:
        return None
    library = torch.library.Library(namespace, "IMPL")
    for op in LAUNCHERS:
        library.impl(op, _lazily(op), "CUDA")
    return library
