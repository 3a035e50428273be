"""The loop of every fixed-step solve: evaluate the network, combine, repeat. No arithmetic on the host and no wait for the device.

Two kinds of state share the loop. `FusedState` updates private buffers in place, one op and the fewest memory passes an evaluation.
`PlainState` makes new tensors by plain PyTorch, which gradients and ``torch.func`` transforms follow.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from fm_fast import _modes, _ops, reference
from fm_fast._constants import constant
from fm_fast._solver.plan import Plan, Stage

# (input of the network, number of the evaluation) -> output
Evaluate = Callable[[Tensor, int], Tensor]
# (number of the finished step, state)
AfterStep = Callable[[int, Tensor], None]
Result = TypeVar("Result")


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


def all_stages(plan: Plan) -> list[Stage]:
    """Every stage of the plan once, in the order by which `run` numbers them."""
    return [stage for segment in plan.segments for stage in segment.stages]


class _History:
    """The latest outputs of a solve. A list: torch.compile puts a bounded deque together again with the wrong end (torch 2.13)."""

    def __init__(self, limit: int) -> None:
        self.limit, self.newest_first = limit, list[Tensor]()

    def add(self, output: Tensor) -> None:
        self.newest_first.insert(0, output)
        del self.newest_first[self.limit :]


class FusedState:
    """Buffers that one op an evaluation updates in place.

    x is float32 or float64. Without another dtype for the network its input is x itself; a doubled input keeps x as its first half.
    """

    def __init__(self, x0: Tensor, plan: Plan, layout: Layout, backend: str) -> None:
        self._step = _ops.linear_step(backend)
        self._scale = layout.scale
        self._none = x0.new_empty(0)
        self._history = _History(plan.longest_lag + 1)
        self._writes = _Writes()
        self._allocate(x0, plan, layout)
        self.input = self._node_input
        self._has_values, self._memory_of = _modes.has_values(x0), _modes.memory_reader(x0)
        self._buffers = set(map(self._memory_of, (self.x, self._node_input, self._stage_input)))
        # One update in place, or updates that read earlier outputs: neither bears an output that lies in the state's own memory.
        self._copies = plan.longest_lag > 0 or plan.updates_in_place
        self.advance = [self._addition(stage) or self._combination(stage) for stage in all_stages(plan)]

    def _allocate(self, x0: Tensor, plan: Plan, layout: Layout) -> None:
        dtype, batch = reference.accumulation_dtype(x0), x0.shape[0]
        if layout.dtype == dtype and not layout.doubled:
            self.x = self._node_input = x0.to(dtype, copy=True, memory_format=_ops.memory_format(x0))
            self._node_copy = self._none
        else:
            self._allocate_apart(x0, layout, dtype, batch)
        self._stage_input = _input_buffer(x0, layout) if plan.has_inner_stages else self._none
        self._stage_x, self._stage_copy = self._stage_input, self._none
        if layout.doubled:
            self._stage_x, self._stage_copy = self._stage_input[:batch], self._stage_input[batch:]

    def _allocate_apart(self, x0: Tensor, layout: Layout, dtype: torch.dtype, batch: int) -> None:
        """x, and an input that is more than x: of another dtype, or x twice."""
        self._node_input = _input_buffer(x0, layout)
        for begin in range(0, 2 * batch if layout.doubled else batch, batch or 1):
            self._node_input[begin : begin + batch].copy_(x0)
        if layout.dtype == dtype:
            self.x, self._node_copy = self._node_input[:batch], self._node_input[batch:]
        else:
            self.x = x0.to(dtype, copy=True, memory_format=_ops.memory_format(x0))
            self._node_copy = self._node_input

    def _addition(self, stage: Stage) -> Callable[[int, Tensor], None] | None:
        """The update where it is x + c o in x's dtype, for which PyTorch's own add is the best kernel: as many passes, less to call."""
        x, factors, copies = self.x, stage.additions, self._copies
        target, copy, following = self._destination(stage)
        if factors is None or copy is not self._none or target.dtype != x.dtype or self._scale != 1.0 or self._history.limit != 1:
            return None

        def advance(row: int, output: Tensor) -> None:
            if copies:
                output = self._own(output)
            torch.add(x, output, alpha=factors[row], out=target)
            self.input = following

        return advance

    def _combination(self, stage: Stage) -> Callable[[int, Tensor], None]:
        history, lags, scale, step, x = self._history, stage.lags, self._scale, self._step, self.x
        table, to_velocity = constant(stage.coefficients, torch.float64, x.device), self._velocity(stage)
        target, copy, following = self._destination(stage)

        def advance(row: int, output: Tensor) -> None:
            if not history.newest_first:
                self._writes.watch(output)
            history.add(to_velocity(row, output))
            outputs = [history.newest_first[lag] for lag in lags]
            if len(outputs) > 1 and self._has_values and _share_memory(outputs):
                self._writes.require_none(outputs)
            step(target, copy, x, outputs, table, row, scale)
            self.input = following

        return advance

    def _destination(self, stage: Stage) -> tuple[Tensor, Tensor, Tensor]:
        """Where the update goes, where it is copied, and the input that holds it."""
        if stage.ends_step:
            return self.x, self._node_copy, self._node_input
        return self._stage_x, self._stage_copy, self._stage_input

    def _velocity(self, stage: Stage) -> Callable[[int, Tensor], Tensor]:
        """p x + r o in new memory where the stage asks for it, else the output as it can be kept."""
        if stage.velocity is None:
            return (lambda row, output: self._own(output)) if self._copies else (lambda row, output: output)
        table = constant(stage.velocity, torch.float64, self.x.device)

        def velocity(row: int, output: Tensor) -> Tensor:
            result = torch.empty_like(self.x)
            self._step(result, self._none, self.x, [output], table, row, self._scale)
            return result

        return velocity

    def _own(self, output: Tensor) -> Tensor:
        """The output, or a copy where it lies in a buffer of ours: a model may return its input, or a view of it."""
        return output.clone() if self._memory_of(output) in self._buffers else output


def _share_memory(outputs: Sequence[Tensor]) -> bool:
    # An address of 0 is that of an empty batch.
    return len({output.data_ptr() for output in outputs}) < len(outputs) and outputs[0].data_ptr() != 0


class _Writes:
    """The count of writes to the solve's first output: a constant field may return it, or a view of the same tensor, again and again."""

    def __init__(self) -> None:
        self._first: weakref.ref[Tensor] | None = None
        self._count: int | None = None

    def watch(self, first: Tensor) -> None:
        origin = _origin(first)
        self._first, self._count = weakref.ref(origin), None if origin.is_inference() else origin._version

    def require_none(self, outputs: Sequence[Tensor]) -> None:
        """RuntimeError where one of the outputs, of which some share memory, may have been overwritten by a later one."""
        first = self._first() if self._first is not None else None
        # The writes of a CUDA graph are not counted.
        constant = first is not None and first.device.type == "cpu" and self._count is not None and self._count == first._version
        allowed = {output.data_ptr() for output in outputs if constant and _origin(output) is first}
        others = [output.data_ptr() for output in outputs if not (constant and _origin(output) is first)]
        if len(allowed.union(others)) < len(allowed) + len(others):
            raise RuntimeError(
                "model returned the memory of an earlier output, which this method still needs; return a new tensor, such as a clone of "
                'the output of a model compiled with mode="reduce-overhead"'
            )


def _origin(x: Tensor) -> Tensor:
    """The tensor that x is a view of, or x itself."""
    return x if x._base is None else x._base


def _input_buffer(x0: Tensor, layout: Layout) -> Tensor:
    """An uninitialised input of the network in x0's memory format, holding the batch once or twice."""
    batch = 2 * x0.shape[0] if layout.doubled else x0.shape[0]
    return torch.empty((batch, *x0.shape[1:]), dtype=layout.dtype, device=x0.device, memory_format=_ops.memory_format(x0))


class PlainState:
    """The same in plain PyTorch: differentiable in x0 and in every output."""

    def __init__(self, x0: Tensor, plan: Plan, layout: Layout) -> None:
        self._layout, self._has_values = layout, _modes.has_values(x0)
        self._history = _History(plan.longest_lag + 1)
        self._writes = _Writes()
        self.x = x0.to(reference.accumulation_dtype(x0))
        self.input = self._as_input(self.x)
        self.advance = [self._combination(stage) for stage in all_stages(plan)]

    def _as_input(self, x: Tensor) -> Tensor:
        x = x.to(self._layout.dtype)
        return torch.cat([x, x]) if self._layout.doubled else x

    def _combination(self, stage: Stage) -> Callable[[int, Tensor], None]:
        scale, coefficients = self._layout.scale, stage.coefficients.tolist()
        factors = None if stage.velocity is None else stage.velocity.tolist()

        def advance(row: int, output: Tensor) -> None:
            if not self._history.newest_first:
                self._writes.watch(output)
            self._history.add(output if factors is None else reference.linear_step(self.x, [output], factors[row], scale))
            outputs = [self._history.newest_first[lag] for lag in stage.lags]
            if len(outputs) > 1 and self._has_values and not _modes.transforms_active() and _share_memory(outputs):
                self._writes.require_none(outputs)
            x = reference.linear_step(self.x, outputs, coefficients[row], scale)
            self.x = x if stage.ends_step else self.x
            self.input = self._as_input(x)

        return advance


def make_state(x0: Tensor, plan: Plan, layout: Layout, backend: str, plain: bool) -> State:
    """The state of a loop: fused, unless plain PyTorch is needed: gradients are recorded, a transform is active, or it was asked for."""
    if plain or _ops.needs_reference(backend):
        return PlainState(x0, plan, layout)
    return FusedState(x0, plan, layout, backend)
