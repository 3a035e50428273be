"""Progress for people (a line or a bar on stdout) and for programs (one JSON object a line)."""

import json
import math
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fm_fast.train.config import TrainConfig
from fm_fast.train.files import replaced_whole


class Logger:
    """Collects losses without reading them from the device, and reports their mean every `log_every` steps.

    The mean is that of the finite losses, since a step without a finite gradient is left out; the number of others is reported.
    Raises FloatingPointError at such a point if no loss is finite.
    """

    def __init__(self, file: Path, config: TrainConfig, first_step: int) -> None:
        self.file, self.config = file, config
        self._losses: list[Tensor] = []
        self._quartiles: list[Tensor] = []
        self._since = time.perf_counter()
        self._bar = _progress_bar(config.steps, first_step)
        _keep_records(file, first_step)

    def step(self, step: int, loss: Tensor, rate: float, by_quartile: Tensor | None = None) -> None:
        """Note the loss of the step that finished as number `step` (counted from 1), and its sums and counts [2, 4] by quartile of t."""
        self._losses.append(loss)
        if by_quartile is not None:
            self._quartiles.append(by_quartile)
        if self._bar is not None:
            self._bar.update(1)
        if step % self.config.log_every == 0 or step == self.config.steps:
            self._report(step, rate)

    def without_timing(self, action: Callable[[], None]) -> float:
        """Run `action` so that it does not count as training time; returns the seconds it took."""
        started = time.perf_counter()
        action()
        seconds = time.perf_counter() - started
        self._since += seconds
        return seconds

    def say(self, text: str) -> None:
        """Print a line without breaking the progress bar."""
        if self._bar is None:
            print(text, flush=True)
        else:
            self._bar.write(text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _report(self, step: int, rate: float) -> None:
        losses, quartiles = [float(value) for value in self._losses], self._mean_by_quartile()
        finite = [value for value in losses if math.isfinite(value)]
        loss = sum(finite) / len(finite) if finite else losses[-1]
        seconds = max(time.perf_counter() - self._since, 1e-9)
        speed = len(losses) * self.config.batch_size / seconds
        self._losses, self._quartiles, self._since = [], [], time.perf_counter()
        record = {"learning_rate": rate, "images": step * self.config.batch_size, "images_per_second": round(speed, 1)}
        self._write(step=step, loss=loss, **record, loss_by_quartile=quartiles, not_finite=len(losses) - len(finite))
        self._show(step, loss, rate, speed)
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} at step {step}; a lower learning_rate or a smaller clip may help")

    def _mean_by_quartile(self) -> list[float | None]:
        """Mean losses of t in the quarters of [0, 1]; None where no sample fell."""
        if not self._quartiles:
            return []
        sums, counts = torch.stack(self._quartiles).sum(0).tolist()
        return [total / count if count else None for total, count in zip(sums, counts, strict=True)]

    def _write(self, **record: Any) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def _show(self, step: int, loss: float, rate: float, speed: float) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.4f}, {speed:.0f} images/s")
            return
        remaining = (self.config.steps - step) * self.config.batch_size / speed
        steps = f"step {step:>{len(str(self.config.steps))}}/{self.config.steps}"
        print(f"{steps}  loss {loss:.4f}  lr {rate:.2e}  {speed:.0f} images/s  {_duration(remaining)} left", flush=True)


def _keep_records(file: Path, last_step: int) -> None:
    """Leave the records up to that step only: a run that was killed may have logged steps after its last checkpoint."""
    lines = file.read_text().splitlines() if file.is_file() else []
    with replaced_whole(file) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines if _step_of(line) <= last_step))


def _step_of(line: str) -> float:
    """Infinity for a line that was cut off."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return math.inf


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _progress_bar(total: int, first: int) -> Any:
    """A tqdm bar where tqdm is installed and somebody watches, else None."""
    if not sys.stdout.isatty() or find_spec("tqdm") is None:
        return None
    from tqdm import tqdm

    return tqdm(total=total, initial=first, unit="step", file=sys.stdout, dynamic_ncols=True)
