"""Triton's kernels on the software GPU: its interpreter computes them in the device's memory, when the stream's turn comes."""

from typing import Any

import interpreter_repairs
from software_gpu.torch_ops import Place, is_there, place_of, submit
from torch.utils._pytree import tree_flatten, tree_unflatten
from triton.runtime.interpreter import InterpretedFunction

_interpret = InterpretedFunction.run


def _run(self: InterpretedFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    """A launch. As on a GPU, what goes there are addresses and numbers."""
    flat, shape = tree_flatten((args, kwargs))
    device = next((x.device for x in flat if is_there(x)), None)
    if warmup or device is None:
        return _interpret(self, *args, grid=grid, warmup=warmup, **kwargs)
    places = [place_of(x) if is_there(x) else x for x in flat]

    def work() -> None:
        views, named = tree_unflatten([x.view() if isinstance(x, Place) else x for x in places], shape)
        _interpret(self, *views, grid=grid, warmup=False, **named)

    return submit(device, work)


def install() -> None:
    interpreter_repairs.round_to_bfloat16()
    interpreter_repairs.replace_language_once()
    InterpretedFunction.run = _run
