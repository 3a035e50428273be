"""Steps of the SDE dx = (v + w grad log p) dt + sqrt(2 w) dW between equidistant times."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fm_fast import reference
from fm_fast._solver.field import check_output
from fm_fast._solver.loop import counts_writes, unwritten
from fm_fast.compat.transport.path import ICPlan
from fm_fast.conversions import prediction_factors
from fm_fast.objectives import Objective, conversion_range

# (number of a time, x) -> output
Evaluate = Callable[[int, Tensor], Tensor]


class Sde:
    """With drift = f x + g o, o being the model's output, all factors are numbers that the host knows.

    Times are kept inside of the range in which velocity and score are finite, also those at which the model is asked.
    """

    def __init__(self, plan: ICPlan, objective: Objective, form: str, norm: float, low: float, high: float, steps: int) -> None:
        self._path, self._objective, self._dt = plan.path, objective, (high - low) / (steps - 1)
        t = torch.linspace(low, high, steps, dtype=torch.float64, device="cpu")
        self._times = t.clamp(*conversion_range(plan.path, objective, "score"))
        w = plan.diffusion(self._times, form, norm)
        velocity, score = self._factors("velocity"), self._factors("score")
        self._drift = [(v + w * s).tolist() for v, s in zip(velocity, score, strict=True)]
        self._kicks = (2.0 * self._dt * w).sqrt().tolist()

    def _factors(self, to: str) -> tuple[Tensor, Tensor]:
        return prediction_factors(self._path, self._objective, to, self._times)

    def solve(
        self, x: Tensor, model: Callable[..., Tensor], given: dict[str, Any], method: str, last: str | None, size: float
    ) -> list[Tensor]:
        """The state after each step, in x's dtype; between evaluations it is float32 (float64 for float64)."""
        dtype, steps, times = x.dtype, {"Euler": self._euler, "Heun": self._heun}, self._times.tolist()

        def evaluate(number: int, x: Tensor) -> Tensor:
            asked = x.to(dtype)
            t = torch.full((len(x),), times[number], dtype=x.dtype, device=x.device)
            output = unwritten(asked, lambda: model(asked, t, **given)) if counts_writes(asked) else model(asked, t, **given)
            check_output(output, asked)
            return output.to(x.dtype)

        x = x.to(reference.accumulation_dtype(x), copy=True)  # a model that writes to its input must not reach the caller's
        states = []
        for number in range(len(times) - 1):
            x = steps[method](number, x, evaluate)
            states.append(x.to(dtype))
        return [*states, self._last(x, evaluate, last, size).to(dtype)]

    def _euler(self, number: int, x: Tensor, evaluate: Evaluate) -> Tensor:
        kick = self._kick(number, x)
        return self._moved(number, x, evaluate, self._dt).add_(kick)

    def _heun(self, number: int, x: Tensor, evaluate: Evaluate) -> Tensor:
        x = x + self._kick(number, x)
        predicted = self._moved(number, x, evaluate, self._dt)
        # The mean of the drifts at both ends: half of the first step, and half of one from the second.
        return 0.5 * (x + self._moved(number + 1, predicted, evaluate, self._dt))

    def _kick(self, number: int, x: Tensor) -> Tensor:
        """Drawn in the order of the dimensions, whatever that of the memory."""
        return self._kicks[number] * torch.randn(x.shape, dtype=x.dtype, device=x.device)

    def _last(self, x: Tensor, evaluate: Evaluate, kind: str | None, size: float) -> Tensor:
        """From the last time on, without noise."""
        if kind is None:
            return x
        if kind == "Mean":
            return self._moved(-1, x, evaluate, size)
        f, g = (float(factor[-1]) for factor in self._factors("data" if kind == "Tweedie" else "velocity"))
        output = evaluate(-1, x)
        return f * x + g * output if kind == "Tweedie" else (1.0 + size * f) * x + size * g * output

    def _moved(self, number: int, x: Tensor, evaluate: Evaluate, size: float) -> Tensor:
        """x + size * drift."""
        f, g = self._drift[0][number], self._drift[1][number]
        return (1.0 + size * f) * x + size * g * evaluate(number, x)
