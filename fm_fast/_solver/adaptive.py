"""Adaptive solves through torchdiffeq, with times kept inside the path's range and every failure told in words."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# (t as a float64 scalar tensor, parts of the state) -> their derivatives
Derivative = Callable[[Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]]


def solve_adaptive(
    derivative: Derivative, parts: tuple[Tensor, ...], times: Sequence[float], method: str, rtol: float, atol: float, max_steps: int
) -> tuple[tuple[Tensor, ...], int]:
    """The parts of the state at each of ``times`` (stacked in front) and the number of evaluations.

    torchdiffeq's solvers look beyond the last time, and probe far outside when they choose their first step, where the VP path is not a
    number: times are clamped, and steps end at ``times``. The error norm is the largest root mean square of any part.

    Raises RuntimeError if the field is not finite, the step underflows, or ``max_steps`` steps do not reach the next of ``times``.
    """
    import torchdiffeq  # it imports SciPy, which takes longer than all of fm_fast

    if parts[0].numel() == 0:
        return tuple(part.expand(len(times), *part.shape) for part in parts), 0
    low, high = min(times), max(times)
    evaluations, own_failure = 0, None

    def clamped(t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        nonlocal evaluations, own_failure
        evaluations += 1
        try:
            return derivative(t.clamp(low, high), state)
        except AssertionError as failure:
            own_failure = failure
            raise

    nodes = torch.tensor(times, dtype=torch.float64, device=parts[0].device)
    options = {"dtype": torch.float64, "max_num_steps": max_steps, "step_t": nodes[1:]}
    try:
        solution = torchdiffeq.odeint(clamped, parts, nodes, rtol=rtol, atol=atol, method=method, options=options)
    except AssertionError as failure:
        if failure is own_failure:
            raise
        raise RuntimeError(_explanation(method, str(failure), max_steps, rtol, atol)) from failure
    return tuple(solution), evaluations  # type: ignore[return-value]


def _explanation(method: str, failure: str, max_steps: int, rtol: float, atol: float) -> str:
    if "max_num_steps" in failure:
        return (
            f"{method} did not reach the end of the solve in max_steps={max_steps} steps; raise max_steps, or rtol={rtol} and atol={atol}"
        )
    return f"{method} failed ({failure}): the model's velocity is not finite, or too rough for rtol={rtol} and atol={atol}"
