"""The network at the times of a plan: conditions bound, the batch doubled where guidance applies, the first output checked."""

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fm_fast import _ops, reference
from fm_fast._solver.constants import own_constant
from fm_fast._solver.field import Field, check_output
from fm_fast._solver.loop import Evaluate
from fm_fast._solver.plan import Plan


def make_evaluate(field: Field, plan: Plan, start: Tensor, rerun: bool = False) -> Evaluate:
    """The model at the plan's times, for the loop of ``_solve``; ``rerun``: in the backward pass, instead of keeping its graph.

    The first output is checked here; the op checks the sizes of the others.
    """
    times = time_tensor(plan, start)
    evaluate = _guided(field, plan, times) if field.doubled is not None else _plain(field, times)
    if start.dim() > 3:
        evaluate = _native(evaluate)
    return _rerun(evaluate) if rerun else evaluate


def time_tensor(plan: Plan, start: Tensor) -> Tensor:
    """The plan's times in memory of this solve, since a network may write into what it is given."""
    return own_constant(plan.times, reference.accumulation_dtype(start), start.device)


def time_views(times: Tensor, batch: int) -> tuple[Tensor, ...]:
    """A view [batch] of each of the times: what the network is given, made once, without memory of its own."""
    return times.unsqueeze(1).expand(-1, batch).unbind(0)


def _plain(field: Field, times: Tensor) -> Evaluate:
    model, cond, views = field.model, field.cond, time_views(times, field.batch)

    def evaluate(x: Tensor, number: int) -> Tensor:
        output = model(x, views[number], **cond)
        if number == 0:
            check_output(output, x)
        return output

    return evaluate


def _guided(field: Field, plan: Plan, times: Tensor) -> Evaluate:
    assert field.guidance is not None and field.doubled is not None
    model, batch, views = field.model, field.batch, time_views(times, 2 * field.batch)
    guided = [field.guidance.applies(t) for t in plan.times.tolist()]
    conditions, sizes = {True: field.doubled, False: field.cond}, {True: 2 * batch, False: batch}

    def evaluate(x: Tensor, number: int) -> Tensor:
        doubled = guided[number]
        x = x[: sizes[doubled]]
        output = model(x, views[number][: sizes[doubled]], **conditions[doubled])
        if number == 0:
            check_output(output, x)
        return output

    return evaluate


def _native(evaluate: Evaluate) -> Evaluate:
    """Outputs of four and more dimensions in a layout that the op takes."""
    return lambda x, number: _ops.native_layout(evaluate(x, number))


def _rerun(evaluate: Evaluate) -> Evaluate:
    return lambda x, number: checkpoint(evaluate, x, number, use_reentrant=False)  # type: ignore[return-value]
