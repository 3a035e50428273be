"""Progress for people (a line or a bar on stdout) and for programs (one JSON object a line; TensorBoard where asked for)."""

import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fm_fast.train.config import TrainConfig
from fm_fast.train.execution.devices import peak_memory, peak_tflops
from fm_fast.train.execution.distributed import Team
from fm_fast.train.execution.interrupt import say_nothing_more
from fm_fast.train.files import is_full, read_records, replaced_whole
from fm_fast.train.prepare import GIB
from fm_fast.train.storage.run_folder import RunFolder


@dataclass(frozen=True)
class Speed:
    """What a team does in a second. share_of_peak: of the devices' best speed, None where that is not known."""

    images: float
    tflops: float
    share_of_peak: float | None

    @classmethod
    def of(cls, images: int, seconds: float, flops_per_image: int, config: TrainConfig, team: Team) -> "Speed":
        rate = images / max(seconds, 1e-9)
        tflops = rate * flops_per_image * 1e-12
        peak = peak_tflops(team.device, config.precision)
        return cls(rate, tflops, None if peak is None else tflops / (peak * team.share.world))

    @property
    def record(self) -> dict[str, float | None]:
        share = None if self.share_of_peak is None else round(self.share_of_peak, 4)
        return {"images_per_second": round(self.images, 1), "tflops": round(self.tflops, 4), "share_of_peak": share}

    def __str__(self) -> str:
        peak = "" if self.share_of_peak is None else f" ({self.share_of_peak:.0%} of peak)"
        return f"{self.images:.0f} images/s, {self.tflops:.3g} TFLOP/s{peak}"


class Logger:
    """Collects losses without reading them from the device, and reports their mean every `log_every` steps.

    The mean is that of the finite losses, since a step without a finite gradient is left out; the number of others is reported.
    Every process of a team has one, but only the first's writes. Raises FloatingPointError at such a point if no loss is finite.
    skipped: the run's count of steps without a finite gradient, on the device, where the optimiser keeps it up to date.
    """

    def __init__(
        self, folder: RunFolder, config: TrainConfig, first_step: int, team: Team, flops_per_image: int = 0, skipped: Tensor | None = None
    ) -> None:
        self.folder, self.config, self.team, self.flops_per_image = folder, config, team, flops_per_image
        self._skipped = skipped
        self._cut: set[Path] = set()  # files whose last line may be half a one
        self._losses: list[Tensor] = []
        self._norms: list[Tensor] = []
        self._quartiles: list[Tensor] = []
        self._since = time.perf_counter()
        self._bar = _progress_bar(config.steps, first_step) if team.first else None
        self._board = _summary_writer()(str(folder.path / "tensorboard")) if team.first and config.tensorboard else None
        if team.first and first_step > 0:
            _keep_records(folder.log, first_step)
            if folder.quality.is_file():
                _keep_records(folder.quality, first_step)

    def step(self, step: int, loss: Tensor, rate: float, by_quartile: Tensor | None = None, gradient_norm: Tensor | None = None) -> None:
        """Note the loss of the step that finished as number `step` (counted from 1), and its sums and counts [2, 4] by quartile of t.

        gradient_norm: [], the same in every process.
        """
        self._losses.append(loss)
        if by_quartile is not None:
            self._quartiles.append(by_quartile)
        if gradient_norm is not None:
            self._norms.append(gradient_norm)
        if self._bar is not None:
            self._bar.update(1)
        if step % self.config.log_every == 0 or step == self.config.steps:
            self._report(step, rate)

    def quality(self, step: int, measured: dict[str, Any]) -> None:
        """Note the quality of samples after that step, in a file of its own."""
        self._write({"step": step, **measured}, self.folder.quality, "quality/")
        numbers = (f"{name} {value:.3g}" for name, value in measured.items() if value is not None and not name.startswith("real_"))
        self.say(f"quality after step {step}: {', '.join(numbers)}")

    def without_timing(self, action: Callable[[], None]) -> float:
        """Run `action` so that it does not count as training time; returns the seconds it took."""
        started = time.perf_counter()
        action()
        seconds = time.perf_counter() - started
        self._since += seconds
        return seconds

    def say(self, text: str) -> None:
        """Print a line, once a team, without breaking the progress bar."""
        if self._bar is not None:
            self._bar.write(text)
        elif self.team.first:
            tell(text)

    def close(self) -> None:
        for sink in (self._bar, self._board):
            if sink is not None:
                sink.close()

    def _report(self, step: int, rate: float) -> None:
        losses, quartiles = self._mean_losses(), self._mean_by_quartile()
        finite = [value for value in losses if math.isfinite(value)]
        loss = sum(finite) / len(finite) if finite else losses[-1]
        images = len(losses) * self.config.batch_size
        speed = Speed.of(images, time.perf_counter() - self._since, self.flops_per_image, self.config, self.team)
        gradients = self._gradients()
        self._losses, self._quartiles, self._norms, self._since = [], [], [], time.perf_counter()
        record = {"step": step, "loss": loss, "learning_rate": rate, "images": step * self.config.batch_size, **speed.record}
        record |= {"loss_by_quartile": quartiles, "averaged_steps": len(losses), "not_finite": len(losses) - len(finite)}
        record |= gradients
        record |= {"peak_memory_gib": round(peak_memory(self.team.device) / GIB, 3)}
        if self.team.first:
            self._write(record, self.folder.log)
            self._show(step, loss, rate, speed)
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} at or before step {step}; a lower learning_rate or a smaller clip may help")

    def _mean_losses(self) -> list[float]:
        """The steps' losses, averaged over the processes."""
        return (self.team.total(torch.stack(self._losses)) / self.team.share.world).tolist()

    def _gradients(self) -> dict[str, float | None]:
        """The mean of the finite norms, None where none is, and the count of skipped steps; of what was given."""
        found: dict[str, float | None] = {}
        if self._norms:
            finite = [value for value in torch.stack(self._norms).tolist() if math.isfinite(value)]
            found["gradient_norm"] = sum(finite) / len(finite) if finite else None
        if self._skipped is not None:
            found["skipped_steps"] = int(self._skipped)
        return found

    def _mean_by_quartile(self) -> list[float | None]:
        """Mean losses of t in the quarters of [0, 1]; None where no sample fell."""
        if not self._quartiles:
            return []
        sums, counts = self.team.total(torch.stack(self._quartiles).sum(0)).tolist()
        return [total / count if count else None for total, count in zip(sums, counts, strict=True)]

    def _write(self, record: dict[str, Any], file: Path, prefix: str = "") -> None:
        line = json.dumps(_finite(record), allow_nan=False) + "\n"
        try:
            with file.open("a") as stream:
                stream.write("\n" + line if file in self._cut else line)
            self._cut.discard(file)
        except OSError as error:
            if not is_full(error):
                raise
            if file not in self._cut:
                self.say(f"warning: {file}: no room for the record of step {record['step']} and the following; training goes on")
            self._cut.add(file)
        if self._board is not None:
            for name, value in _scalars(record):
                self._board.add_scalar(prefix + name, value, record["step"])

    def _show(self, step: int, loss: float, rate: float, speed: Speed) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.4f}, {speed}")
            return
        remaining = (self.config.steps - step) * self.config.batch_size / speed.images
        steps = f"step {step:>{len(str(self.config.steps))}}/{self.config.steps}"
        tell(f"{steps}  loss {loss:.4f}  lr {rate:.2e}  {speed}  {_duration(remaining)} left")


def tell(text: str) -> None:
    """Print a line, or go on in silence.

    Nobody may read any more, as when Ctrl-C has ended the other side of a pipe, and the output may have no room, as on a full disk.
    """
    try:
        print(text, flush=True)
    except UnicodeEncodeError:  # letters that the encoding of the output has not
        tell(text.encode("ascii", "backslashreplace").decode("ascii"))
    except OSError:
        say_nothing_more([sys.stdout.fileno()])


def _finite(value: Any) -> Any:
    """The same with None for numbers that JSON has not, also within lists and records."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _scalars(record: dict[str, Any]) -> list[tuple[str, float]]:
    """The numbers of a record by name, lists as name/0, name/1, ..."""
    found = []
    for name, value in record.items():
        parts = {f"{name}/{i}": part for i, part in enumerate(value)} if isinstance(value, list) else {name: value}
        found += [(key, part) for key, part in parts.items() if part is not None and name != "step"]
    return found


def require_sinks(config: TrainConfig) -> None:
    """ImportError for a log that was asked for and cannot be written."""
    if config.tensorboard:
        _summary_writer()


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("tensorboard: --tensorboard needs it: pip install tensorboard") from error
    return SummaryWriter


def _keep_records(file: Path, last_step: int) -> None:
    """Leave the records up to that step only: a run that was killed may have logged steps after its last checkpoint."""
    kept = [record for record in read_records(file) if record["step"] <= last_step] if file.is_file() else []
    with replaced_whole(file) as temporary:
        temporary.write_text("".join(f"{json.dumps(_finite(record), allow_nan=False)}\n" for record in kept))


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _progress_bar(total: int, first: int) -> Any:
    """A tqdm bar where tqdm is installed and somebody watches, else None."""
    if sys.stdout is None or not sys.stdout.isatty() or find_spec("tqdm") is None:
        return None
    from tqdm import tqdm

    return tqdm(total=total, initial=first, unit="step", file=sys.stdout, dynamic_ncols=True)
