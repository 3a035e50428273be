"""The loop of every fixed-step solve: evaluate the network, combine, repeat. No arithmetic on the host and no wait for the device."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from fm_fast import _modes
from fm_fast._solver.plan import Plan
from fm_fast._solver.state import State

# (input of the network, number of the evaluation) -> output
Evaluate = Callable[[Tensor, int], Tensor]
# (number of the finished step, state)
AfterStep = Callable[[int, Tensor], None]
Result = TypeVar("Result")


def run(plan: Plan, state: State, evaluate: Evaluate, after_step: AfterStep | None = None, name: str = "model") -> Tensor:
    """The state at the last node; ``state`` must have been made for ``plan`` and is used up. name: what errors call the network."""
    try:
        return _run(plan, state, _watched(evaluate, state.input, name), after_step)
    finally:
        state.advance.clear()  # which refers to the state that holds it: its buffers would wait for the garbage collector


def _run(plan: Plan, state: State, evaluate: Evaluate, after_step: AfterStep | None) -> Tensor:
    number, first_stage, finished = 0, 0, 0
    for segment in plan.segments:
        stages = state.advance[first_stage : first_stage + len(segment.stages)]
        for row in range(segment.steps):
            for advance in stages:
                advance(row, evaluate(state.input, number))
                number += 1
            finished += 1
            if after_step is not None:
                after_step(finished, state.x)
        first_stage += len(segment.stages)
    return state.x


def _watched(evaluate: Evaluate, x: Tensor, name: str) -> Evaluate:
    """The same, with a RuntimeError where an input, such as x, is written to."""
    if not counts_writes(x):
        return evaluate
    return lambda x, number: unwritten(x, lambda: evaluate(x, number), name)


def unwritten(x: Tensor, compute: Callable[[], Result], name: str = "model") -> Result:
    """What is computed from x, of which writes are counted; RuntimeError if x, an input of the model, was written to meanwhile."""
    before = x._version
    result = compute()
    if x._version != before:
        given = "x" if name == "model" else "y"
        raise RuntimeError(f"{name} must leave its input {given} as it is, which is the state of the solve; give it {given}.clone()")
    return result


def counts_writes(x: Tensor) -> bool:
    """Whether torch counts writes to x and to what is made of it."""
    uncounted = _modes.is_compiling() or _modes.transforms_active() or torch.is_inference_mode_enabled()
    return not (uncounted or x.is_inference())
