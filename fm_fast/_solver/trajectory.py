"""The states of a solve that are saved, those of fixed steps copied once: a trajectory may take more memory than all else."""

from collections import defaultdict

import torch
from torch import Tensor


class Trajectory:
    """The states at some numbers of finished steps, as one tensor [S, B, ...].

    at_once: each is written where it stays. Otherwise they are stacked at the end, as graphs of autograd and of compilers want it, and need
    twice the memory for that.
    """

    def __init__(self, steps: tuple[int, ...], at_once: bool) -> None:
        self._steps, self._at_once = steps, at_once
        self._rows: dict[int, list[int]] = defaultdict(list)
        for row, step in enumerate(steps):
            self._rows[step].append(row)
        self._states: dict[int, Tensor] = {}
        self._whole: Tensor | None = None

    def note(self, step: int, x: Tensor) -> None:
        """Copy the state after that many steps, if it is one of them: the solve goes on in the same memory."""
        if step not in self._rows:
            return
        if not self._at_once:
            self._states[step] = x.clone() if step else x  # nothing writes to the start
            return
        if self._whole is None:
            self._whole = x.new_empty(len(self._steps), *x.shape)
        for row in self._rows[step]:
            self._whole[row].copy_(x)

    def tensor(self) -> Tensor | None:
        """None where nothing was to be saved."""
        if not self._steps:
            return None
        return torch.stack([self._states[step] for step in self._steps]) if self._whole is None else self._whole


class StepsTaken:
    """The start of an adaptive solve and its state after each step that counted, with their times."""

    def __init__(self, t: float, start: Tensor) -> None:
        self._times, self._states = [t], [start]

    def note(self, t: float, x: Tensor) -> None:
        self._times.append(t)
        self._states.append(x.clone())

    @property
    def times(self) -> tuple[float, ...]:
        return tuple(self._times)

    def tensor(self) -> Tensor:
        return torch.stack(self._states)
