"""``python -m benchmarks.run --against COMMIT``: this checkout's fm_fast against another commit's, on this checkout's benchmarks.

Two versions of one package cannot live in one process. So the other commit is installed, native code included, into a temporary folder,
and processes that run this checkout and the other commit follow each other in pairs. A pair's ratio is that of its two medians.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.timing import Summary, summarise

ROOT = Path(__file__).parent.parent
ROUNDS = 20
FORWARDED = ("op", "device", "dtype", "isa", "threads", "clock")
FORWARDED_LISTS = ("size", "mode", "part")
UNITS = ("ms", "us", "nats2")  # of the values that are compared
# Prints the file of every module of fm_fast that an op's benchmark loads.
FILES = """
import importlib, sys
importlib.import_module(sys.argv[1])
print(*(module.__file__ for name, module in sorted(sys.modules.items()) if name.split(".")[0] == "fm_fast"), sep="\\n")
"""
PIP = ("-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation")


class Setting(NamedTuple):
    """What identifies a value on both sides."""

    size: str
    dtype: str
    mode: str
    unit: str


@dataclass(frozen=True)
class Side:
    """One version of fm_fast: the folder in which its processes start, and the one in which they find it before anything else."""

    name: str
    folder: Path
    packages: Path

    def environment(self) -> dict[str, str]:
        paths = (str(self.packages), os.environ.get("PYTHONPATH", ""))
        return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


THIS = Side("this checkout", ROOT, ROOT)
# (sources, folder) -> None: puts the package that is built of the sources into the folder
Install = Callable[[Path, Path], None]
# (side, options) -> the median of every setting, from a process of its own
Measure = Callable[[Side, argparse.Namespace], dict[Setting, float]]
Pairs = dict[Setting, list[tuple[float, float]]]


def installer(device: str) -> Install:
    """pip's install of a checkout, without a network; a library for the device that cannot be built is an error."""

    def install(sources: Path, folder: Path) -> None:
        command = [sys.executable, *PIP, "--target", str(folder), str(sources)]
        _run(command, ROOT, {**os.environ, "FM_FAST_BUILD": device})

    return install


def measure(side: Side, options: argparse.Namespace) -> dict[Setting, float]:
    """An ordinary run of our provider alone."""
    with tempfile.TemporaryDirectory(prefix="fm_fast-") as folder:
        file = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "benchmarks.run", *_forwarded(options), "--only", "--out", str(file)]
        _run(command, side.folder, side.environment())
        rows = json.loads(file.read_text(encoding="utf-8"))
    return {_setting(row): row["median"] for row in rows if row["metric"].removeprefix("cpu_") in UNITS}


def _setting(row: Mapping[str, Any]) -> Setting:
    return Setting(row["size"], row["dtype"], row["mode"], row["metric"])


def _forwarded(options: argparse.Namespace) -> list[str]:
    given = {name: getattr(options, name) for name in FORWARDED}
    words = [word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))]
    lists = [word for name in FORWARDED_LISTS if getattr(options, name) for word in (f"--{name}", *getattr(options, name))]
    return [*words, *lists, "--rounds", str(options.rounds or ROUNDS)]


def resolve(commit: str, root: Path = ROOT) -> str:
    """The hash of a commit, branch or tag; SystemExit if there is none of that name."""
    command = ["git", "-C", str(root), "rev-parse", "--verify", "--quiet", "--short", "--end-of-options", f"{commit}^{{commit}}"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except OSError as error:
        sys.exit(f"--against needs git: {error}")
    except subprocess.CalledProcessError:
        sys.exit(f"--against must be a commit, branch or tag of the repository at {root}, got {commit!r}")


@contextlib.contextmanager
def installed(commit: str, install: Install, root: Path = ROOT) -> Iterator[Side]:
    """The other side, installed from a worktree of git; both are gone afterwards, whatever ends the block."""
    with _terminable(), tempfile.TemporaryDirectory(prefix="fm_fast-against-") as name:
        sources, packages, start = (Path(name) / part for part in ("sources", "packages", "start"))
        # The processes start beside a link to the benchmarks: in the checkout's root they would find this checkout's fm_fast first.
        start.mkdir()
        (start / "benchmarks").symlink_to(ROOT / "benchmarks")
        git = ["git", "-C", str(root), "worktree"]
        try:
            _run([*git, "add", "--quiet", "--detach", str(sources), commit], root, dict(os.environ))
            install(sources, packages)
            yield Side(commit, start, packages)
        finally:
            subprocess.run([*git, "remove", "--force", str(sources)], capture_output=True, check=False)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the block as ctrl-C does, so that it tidies up."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(command: Sequence[str], folder: Path, environment: dict[str, str]) -> str:
    """What a command prints; SystemExit with its error if it fails. Interrupted, it ends with all that it started."""
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        output, error = process.communicate()
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed in {folder}:\n{error.strip() or output.strip()}")
    return output


def _loads_its_own(side: Side, op: str) -> None:
    """SystemExit if what the side's processes measure would be, in any part, another fm_fast than the side's own."""
    files = _run([sys.executable, "-c", FILES, f"benchmarks.ops.{op}"], side.folder, side.environment()).split("\n")
    foreign = [file for file in files if file and not Path(file).is_relative_to(side.packages)]
    if foreign:
        sys.exit(f"fm_fast of {side.name} is in {side.packages}, but its processes also load {', '.join(foreign)}")


def paired(other: Side, options: argparse.Namespace, measure: Measure) -> Pairs:
    """(this checkout, other) of every pair of processes; every second pair runs the other way round, so that a drift hits both alike."""
    found: Pairs = {}
    for pair in range(options.pairs):
        order = (THIS, other) if pair % 2 == 0 else (other, THIS)
        values = {side.name: measure(side, options) for side in order}
        for setting, value in values[THIS.name].items():
            found.setdefault(setting, []).append((value, values[other.name][setting]))
    return found


def ratios(pairs: Sequence[tuple[float, float]]) -> Summary:
    """The other's value over this checkout's, pair by pair."""
    return summarise([other / this for this, other in pairs])


def table(op: str, commit: str, found: Pairs) -> str:
    """A line a setting: both medians, and how many times this checkout's value the commit's is."""
    lines = [f"\n{op}, {len(next(iter(found.values())))} pairs", f"{'':<44}{THIS.name:>16}{commit:>16}{'ratio':>26}"]
    for setting, pairs in found.items():
        this, other = (summarise(list(values)).median for values in zip(*pairs, strict=True))
        ratio = ratios(pairs)
        text = f"{ratio.median:.3f} [{ratio.p20:.3f}, {ratio.p80:.3f}]"
        name = f"{setting.size}, {setting.dtype}, {setting.mode}, {setting.unit}"
        lines.append(f"{name:<44}{this:>16.4f}{other:>16.4f}{text:>26}")
    return "\n".join(lines)


def compare(options: argparse.Namespace, install: Install | None = None, measure: Measure = measure) -> None:
    """Print how many times this checkout's time the time of ``options.against`` is."""
    if options.pairs < 1:
        sys.exit(f"--pairs must be at least 1, got {options.pairs}")
    commit = resolve(options.against)
    with installed(commit, install or installer(options.device)) as other:
        for side in (THIS, other):
            _loads_its_own(side, options.op)
        found = paired(other, options, measure)
    print(table(options.op, commit, found), flush=True)
