"""The state of a fixed-step solve, in two kinds that share the loop.

`FusedState` updates private buffers in place, one op and the fewest memory passes an evaluation. `PlainState` makes new tensors by plain
PyTorch, which gradients and ``torch.func`` transforms follow.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fm_fast import _modes, _ops, reference
from fm_fast._constants import constant
from fm_fast._solver.history import History
from fm_fast._solver.plan import Plan, Stage


@dataclass(frozen=True)
class Layout:
    """What the network is given: its dtype, on a doubled batch or not, and the guidance scale that mixes a doubled output."""

    dtype: torch.dtype
    doubled: bool = False
    scale: float = 1.0


class State(Protocol):
    """x, the network's next input (which holds the batch twice where the layout says so), and an update for each stage of the plan.

    ``advance[stage](row, output)`` takes the newest output and makes the next input, with the coefficients of that row.
    """

    x: Tensor
    input: Tensor
    advance: list[Callable[[int, Tensor], None]]


def make_state(x0: Tensor, plan: Plan, layout: Layout, backend: str, plain: bool) -> State:
    """The state of a loop: fused, unless plain PyTorch is needed: gradients are recorded, a transform is active, or it was asked for."""
    if plain or _ops.needs_reference(backend):
        return PlainState(x0, plan, layout)
    return FusedState(x0, plan, layout, backend)


class PlainState:
    """New tensors by plain PyTorch: differentiable in x0 and in every output."""

    def __init__(self, x0: Tensor, plan: Plan, layout: Layout) -> None:
        self._layout, self._history = layout, History(plan.longest_lag + 1, x0)
        self.x = x0.to(reference.accumulation_dtype(x0))
        self.input = self._as_input(self.x)
        self.advance = [self._combination(stage) for stage in plan.stages]

    def _as_input(self, x: Tensor) -> Tensor:
        x = x.to(self._layout.dtype)
        return torch.cat([x, x]) if self._layout.doubled else x

    def _combination(self, stage: Stage) -> Callable[[int, Tensor], None]:
        scale, coefficients = self._layout.scale, stage.coefficients.tolist()
        factors = None if stage.velocity is None else stage.velocity.tolist()

        def advance(row: int, output: Tensor) -> None:
            kept = output if factors is None else reference.linear_step(self.x, [output], factors[row], scale)
            self._history.add(kept, output)
            x = reference.linear_step(self.x, self._history.read(stage.lags), coefficients[row], scale)
            self.x = x if stage.ends_step else self.x
            self.input = self._as_input(x)

        return advance


class Buffer(NamedTuple):
    """Where updates go: ``target``, and ``copy``, which gets the result once or twice more unless it is empty.

    input: what the network is given then, the memory of the target, of the copy or of both.
    """

    target: Tensor
    copy: Tensor
    input: Tensor


def _state_buffer(x0: Tensor, layout: Layout, nothing: Tensor) -> Buffer:
    """Of the state at the nodes, which begins as x0. It is the network's input, or the first half of that, where dtypes allow it."""
    dtype, batch = reference.accumulation_dtype(x0), x0.shape[0]
    if layout.dtype == dtype and layout.doubled:
        both = _filled_input(x0, layout)
        return Buffer(both[:batch], both[batch:], both)
    x = x0.to(dtype, copy=True, memory_format=_ops.memory_format(x0))
    if layout.dtype == dtype:
        return Buffer(x, nothing, x)
    given = _filled_input(x0, layout)
    return Buffer(x, given, given)


def _stage_buffer(x0: Tensor, layout: Layout, nothing: Tensor) -> Buffer:
    """Of the inputs of inner stages, which nothing but the network reads."""
    given, batch = _empty_input(x0, layout), x0.shape[0]
    return Buffer(given[:batch], given[batch:], given) if layout.doubled else Buffer(given, nothing, given)


def _filled_input(x0: Tensor, layout: Layout) -> Tensor:
    given, batch = _empty_input(x0, layout), x0.shape[0]
    for begin in range(0, given.shape[0], batch or 1):
        given[begin : begin + batch].copy_(x0)
    return given


def _empty_input(x0: Tensor, layout: Layout) -> Tensor:
    """An uninitialised input of the network in x0's memory format, holding the batch once or twice."""
    batch = 2 * x0.shape[0] if layout.doubled else x0.shape[0]
    return torch.empty((batch, *x0.shape[1:]), dtype=layout.dtype, device=x0.device, memory_format=_ops.memory_format(x0))


class FusedState:
    """Buffers that one op an evaluation updates in place.

    x is float32 or float64. Without another dtype for the network its input is x itself; a doubled input keeps x as its first half.
    """

    def __init__(self, x0: Tensor, plan: Plan, layout: Layout, backend: str) -> None:
        self._linear_step, self._scale = _ops.linear_step(backend), layout.scale
        self._history = History(plan.longest_lag + 1, x0)
        self._nothing = x0.new_empty(0)
        self._state_buffer = _state_buffer(x0, layout, self._nothing)
        self._stage_buffer = _stage_buffer(x0, layout, self._nothing) if plan.has_inner_stages else Buffer(*[self._nothing] * 3)
        self.x, self.input = self._state_buffer.target, self._state_buffer.input
        self._memory_of = _modes.memory_reader(x0)
        self._own_memory = set(map(self._memory_of, (self.x, self.input, self._stage_buffer.input)))
        # One update in place, or updates that read earlier outputs: neither bears an output that lies in the state's own memory.
        self._copies = plan.longest_lag > 0 or plan.updates_in_place
        self.advance = [self._addition(stage) or self._combination(stage) for stage in plan.stages]

    def _addition(self, stage: Stage) -> Callable[[int, Tensor], None] | None:
        """The update where it is x + c o in x's dtype, for which PyTorch's own add is the best kernel: as many passes, less to call."""
        x, factors, copies = self.x, stage.additions, self._copies
        target, copy, following = self._buffer(stage)
        if factors is None or copy is not self._nothing or target.dtype != x.dtype or self._scale != 1.0 or self._history.limit != 1:
            return None

        def advance(row: int, output: Tensor) -> None:
            if copies:
                output = self._own(output)
            torch.add(x, output, alpha=factors[row], out=target)
            self.input = following

        return advance

    def _combination(self, stage: Stage) -> Callable[[int, Tensor], None]:
        history, lags, scale, linear_step, x = self._history, stage.lags, self._scale, self._linear_step, self.x
        table, as_kept = constant(stage.coefficients, torch.float64, x.device), self._as_kept(stage)
        target, copy, following = self._buffer(stage)

        def advance(row: int, output: Tensor) -> None:
            history.add(as_kept(row, output), output)
            linear_step(target, copy, x, history.read(lags), table, row, scale)
            self.input = following

        return advance

    def _buffer(self, stage: Stage) -> Buffer:
        return self._state_buffer if stage.ends_step else self._stage_buffer

    def _as_kept(self, stage: Stage) -> Callable[[int, Tensor], Tensor]:
        """p x + r o in new memory where the stage asks for it, else the output as it can be kept."""
        if stage.velocity is None:
            return (lambda row, output: self._own(output)) if self._copies else (lambda row, output: output)
        table = constant(stage.velocity, torch.float64, self.x.device)

        def velocity(row: int, output: Tensor) -> Tensor:
            result = torch.empty_like(self.x)
            self._linear_step(result, self._nothing, self.x, [output], table, row, self._scale)
            return result

        return velocity

    def _own(self, output: Tensor) -> Tensor:
        """The output, or a copy where it lies in a buffer of ours: a model may return its input, or a view of it."""
        return output.clone() if self._memory_of(output) in self._own_memory else output
