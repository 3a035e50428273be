"""The folder of a run: its files' names, its numbered checkpoints, and that no run overwrites another's unasked."""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fm_fast.train.config import TrainConfig, from_dict
from fm_fast.train.files import TEMPORARY, is_full, only_writer
from fm_fast.train.storage.checkpoint import read_checkpoint, save_checkpoint

NUMBERED = re.compile(r"checkpoint-(\d{8,})\.pt")


@dataclass(frozen=True)
class Found:
    """The newest valid checkpoint, its content, and what is wrong with each newer file."""

    file: Path
    content: dict[str, Any]
    damaged: dict[Path, str]

    @property
    def warnings(self) -> list[str]:
        return [f"{problem}; {self.file.name} is used instead" for problem in self.damaged.values()]

    def set_damaged_aside(self) -> None:
        """Rename the newer files, so that they do not pass for the newest once training has gone on from here."""
        for file in self.damaged:
            with contextlib.suppress(FileNotFoundError):
                file.rename(file.with_name(f"{file.name}.damaged"))


@dataclass(frozen=True)
class RunFolder:
    """checkpoint-00000500.pt and the like (the number counts finished steps), weights.safetensors, logs and pictures."""

    path: Path

    @property
    def log(self) -> Path:
        return self.path / "log.jsonl"

    @property
    def samples(self) -> Path:
        return self.path / "samples.png"

    @property
    def curve(self) -> Path:
        return self.path / "loss.png"

    @property
    def quality(self) -> Path:
        return self.path / "quality.jsonl"

    @property
    def quality_curve(self) -> Path:
        return self.path / "quality.png"

    @property
    def weights(self) -> Path:
        return self.path / "weights.safetensors"

    def checkpoint(self, step: int) -> Path:
        return self.path / f"checkpoint-{step:08d}.pt"

    def checkpoints(self) -> list[Path]:
        """Those that are there, newest first, valid or not."""
        files = self.path.iterdir() if self.path.is_dir() else ()
        numbered = [(int(match[1]), file) for file in files if (match := NUMBERED.fullmatch(file.name)) and not file.is_dir()]
        return [file for _, file in sorted(numbered, reverse=True)]

    def settings(self) -> TrainConfig:
        """Those of the run, by its newest checkpoint that can be read, without reading its tensors. Raises as `newest_valid` does."""
        return from_dict(self.newest_valid(mapped=True).content["config"])

    def newest_valid(self, mapped: bool = False) -> "Found":
        """The newest checkpoint that can be read. Raises FileNotFoundError if there is none, ValueError if all are damaged."""
        files, damaged = self.checkpoints(), {}
        for file in files:
            try:
                return Found(file, read_checkpoint(file, mapped), damaged)
            except (ValueError, FileNotFoundError) as error:
                if not file.exists() and self.checkpoints() != files:
                    return self.newest_valid(mapped)  # the run goes on, and has deleted old ones
                damaged[file] = str(error)
        if not files:
            raise FileNotFoundError(f"{self.path}: no checkpoint-NUMBER.pt in this folder")
        raise ValueError("; ".join(damaged.values()))

    def save(self, stored: dict[str, Any], config: TrainConfig, data: dict[str, Any] | None = None) -> Path:
        """Write a checkpoint of a state's `state_dict()`, then delete all but the newest `config.keep_checkpoints`.

        Where the disk is full, the older ones make room before: all but the newest that can be read.
        """
        file = self.checkpoint(stored["step"])
        try:
            save_checkpoint(file, stored, config, data)
        except OSError as error:
            if not (is_full(error) and config.keep_checkpoints > 0 and self._made_room()):
                raise
            save_checkpoint(file, stored, config, data)
        if config.keep_checkpoints > 0:
            for old in self.checkpoints()[config.keep_checkpoints :]:
                with contextlib.suppress(FileNotFoundError, PermissionError):  # gone, or read by somebody on Windows: the next save's turn
                    old.unlink()
        return file

    def _made_room(self) -> bool:
        """Whether there were checkpoints beside the newest valid one."""
        with contextlib.suppress(ValueError, FileNotFoundError):
            if len(self.checkpoints()) < 2:
                return False
            newest = self.newest_valid().file
            older = [file for file in self.checkpoints() if file != newest]
            for file in older:
                file.unlink()
            return bool(older)
        return False

    @contextlib.contextmanager
    def held(self, resuming: bool, overwriting: bool) -> Iterator[None]:
        """Keep other runs out, and a new run from mixing its checkpoints with those of another.

        Raises FileExistsError where there are such and neither is wanted, or where another process is writing.
        """
        with only_writer(self.path):
            found = [*self.checkpoints(), *([self.weights] if self.weights.exists() else [])]
            if found and not (resuming or overwriting):
                raise FileExistsError(
                    f"{self.path}: holds {found[0].name} of another run;"
                    " --resume (train(..., resuming=True)) continues it, --overwrite (overwriting=True) deletes it, or choose another --out"
                )
            yield

    def tidy(self) -> None:
        """Delete what an interrupted write left behind."""
        for file in (*self.path.glob(f"checkpoint-*{TEMPORARY}"), *self.path.glob(f"{self.weights.name}*{TEMPORARY}")):
            file.unlink(missing_ok=True)

    def clear(self) -> None:
        """Delete the files of the run that a new one replaces, and begin the new one's log."""
        pictures, logs = (self.samples, self.curve, self.quality_curve), (self.log, self.quality)
        for file in (*self.checkpoints(), *self.path.glob("checkpoint-*.pt.damaged"), self.weights, *pictures, *logs):
            file.unlink(missing_ok=True)
        self.log.touch()
