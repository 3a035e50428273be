"""The network at the times of a plan: conditions bound, the batch doubled where guidance applies, every output checked."""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fm_fast import _ops, reference
from fm_fast._checks import FLOATING, explain_call
from fm_fast._constants import own_constant
from fm_fast._solver.field import Field, check_output
from fm_fast._solver.loop import Evaluate
from fm_fast._solver.plan import Plan


def make_evaluate(field: Field, plan: Plan, start: Tensor, rerun: bool = False) -> Evaluate:
    """The model at the plan's times, for the loop of ``loop.run``; ``rerun``: in the backward pass, instead of keeping its graph."""
    times = time_tensor(plan, start)
    evaluate = _guided(field, plan, times) if field.doubled is not None else _plain(field, times, start.shape)
    if start.dim() > 3:
        evaluate = _native(evaluate)
    return _rerun(evaluate) if rerun else evaluate


def make_mixed(field: Field, plan: Plan, start: Tensor, rerun: bool = False) -> Evaluate:
    """The same with guidance mixed in by plain PyTorch, so that inputs and outputs are single batches; differentiable."""
    views = time_views(time_tensor(plan, start), field.batch)
    scales = [field.scale_at(t) for t in plan.middles()] if field.guidance else [None] * plan.evaluations

    def evaluate(x: Tensor, number: int) -> Tensor:
        output = field.output_at(x, views[number], scales[number])
        check_each(output, x, x.shape, number)
        return _ops.native_layout(output)

    return _rerun(evaluate) if rerun else evaluate


def check_each(output: object, x: Tensor, shape: torch.Size, number: int, name: str = "model") -> None:
    """An output for the input x, whose shape is given since asking costs time: the first whole, the others by type, shape and dtype."""
    if number == 0 or type(output) is not Tensor or output.shape != shape or output.dtype not in FLOATING:
        check_output(output, x, name)


def time_tensor(plan: Plan, start: Tensor) -> Tensor:
    """The plan's times in memory of this solve, since a network may write into what it is given."""
    return own_constant(plan.times, reference.accumulation_dtype(start), start.device)


def time_views(times: Tensor, batch: int) -> tuple[Tensor, ...]:
    """A view [batch] of each of the times: what the network is given, made once, without memory of its own."""
    return times.unsqueeze(1).expand(-1, batch).unbind(0)


def _plain(field: Field, times: Tensor, shape: torch.Size) -> Evaluate:
    model, cond, views = field.model, field.cond, time_views(times, field.batch)

    def evaluate(x: Tensor, number: int) -> Tensor:
        try:
            output = model(x, views[number], **cond)
        except Exception as error:
            explain_call(error, x, views[number], cond)
            raise
        check_each(output, x, shape, number)
        return output

    return evaluate


def _guided(field: Field, plan: Plan, times: Tensor) -> Evaluate:
    assert field.guidance is not None and field.doubled is not None
    model, batch, views = field.model, field.batch, time_views(times, 2 * field.batch)
    guided = [field.guidance.applies(t) for t in plan.middles()]
    conditions, sizes = {True: field.doubled, False: field.cond}, {True: 2 * batch, False: batch}

    def evaluate(x: Tensor, number: int) -> Tensor:
        doubled = guided[number]
        x = x[: sizes[doubled]]
        t = views[number][: sizes[doubled]]
        try:
            output = model(x, t, **conditions[doubled])
        except Exception as error:
            explain_call(error, x, t, conditions[doubled])
            raise
        check_each(output, x, x.shape, number)
        return output

    return evaluate


def _native(evaluate: Evaluate) -> Evaluate:
    """Outputs of four and more dimensions in a layout that the op takes."""
    return lambda x, number: _ops.native_layout(evaluate(x, number))


def _rerun(evaluate: Evaluate) -> Evaluate:
    return lambda x, number: checkpoint(evaluate, x, number, use_reentrant=False)  # type: ignore[return-value]
