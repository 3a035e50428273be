"""Results as JSON files: parts that a restarted command reads instead of computing again, and the summary for the reader."""

import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch

from fm_fast._version import __version__
from fm_fast.train.files import replaced_whole

Result = TypeVar("Result")


@dataclass(frozen=True)
class Parts:
    """Where a command keeps its finished parts, and the settings with which a part must have been computed to count."""

    folder: Path
    settings: dict[str, Any]

    def get_all(
        self, kind: type[Result], function: Callable[..., Result], arguments: Mapping[str, tuple[Any, ...]], jobs: int = 1
    ) -> list[Result]:
        """function(*arguments[name]) for each name, a dataclass of numbers and tuples: read from its file where that has these settings.

        What is missing is computed, `jobs` processes at a time, and each part is written as soon as it is done.
        """
        results = {name: self._read(name, kind) for name in arguments}
        missing = [name for name, result in results.items() if result is None]
        for name, result, seconds in _compute(function, {name: arguments[name] for name in missing}, jobs):
            content = {"settings": self._settings(kind), "seconds": seconds, "result": asdict(result)}  # type: ignore[call-overload]
            write_json(self._file(name), content)
            print(f"{name}: {seconds:.0f} s", flush=True)
            results[name] = result
        return [results[name] for name in arguments]  # type: ignore[misc]

    def _read(self, name: str, kind: type[Result]) -> Result | None:
        stored = _read(self._file(name))
        if stored is None or stored.get("settings") != self._settings(kind):
            return None
        print(f"{name}: found in {self._file(name)} ({stored['seconds']:.0f} s when it was computed)", flush=True)
        return kind(**_tuples(stored["result"]))

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def _settings(self, kind: type) -> dict[str, Any]:
        return _plain({**self.settings, "fm_fast": __version__, "fields": [entry.name for entry in fields(kind)]})

    def seconds(self, names: Iterable[str]) -> float:
        """Time that these parts took when they were computed, one after the other."""
        return sum((_read(self._file(name)) or {"seconds": 0.0})["seconds"] for name in names)


def _compute(function: Callable[..., Result], arguments: Mapping[str, tuple[Any, ...]], jobs: int) -> Iterator[tuple[str, Result, float]]:
    """(name, result, seconds) in the order in which they are done."""
    if jobs == 1 or len(arguments) < 2:
        for name, values in arguments.items():
            yield name, *_timed(function, values)
        return
    # Spawned, not forked: a fork copies the locks of torch's threads without the threads.
    with ProcessPoolExecutor(min(jobs, len(arguments)), mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(_timed, function, values): name for name, values in arguments.items()}
        for future in as_completed(futures):
            yield futures[future], *future.result()


def _timed(function: Callable[..., Result], arguments: tuple[Any, ...]) -> tuple[Result, float]:
    started = time.perf_counter()
    result = function(*arguments)
    return result, time.perf_counter() - started


def _read(file: Path) -> dict[str, Any] | None:
    """The content, or None where there is none or half of one."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return content if isinstance(content, dict) else None


def write_json(file: Path, content: dict[str, Any]) -> None:
    """An interrupted command leaves the old file or the new one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with replaced_whole(file) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def summary(command: str, seconds: float, **content: Any) -> dict[str, Any]:
    """What every summary starts with: how to get it again, and where it was computed."""
    return {
        "command": command, "seconds": round(seconds), "fm_fast": __version__, "torch": torch.__version__,
        "machine": platform.machine(), "cores": os.cpu_count(), **content,
    }  # fmt: skip


def _plain(value: Any) -> Any:
    """As it comes back from JSON."""
    return json.loads(json.dumps(value))


def _tuples(value: Any) -> Any:
    """Lists, which JSON has for tuples, as tuples again."""
    if isinstance(value, dict):
        return {name: _tuples(entry) for name, entry in value.items()}
    return tuple(_tuples(entry) for entry in value) if isinstance(value, list) else value


def rounded(values: torch.Tensor, digits: int) -> Any:
    """A tensor as nested tuples of rounded numbers: what is drawn needs no more."""
    scale = 10**digits
    return _tuples(((values.double() * scale).round() / scale).tolist())
