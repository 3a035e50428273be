"""Rows of results, with what is needed to repeat them, as JSON and CSV."""

import csv
import datetime
import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import fm_fast as fm
from benchmarks import peers

FOLDER = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """One number of one provider.

    ``metric`` is the op's unit ("ms", "us" a solver step, "nats2" of variance), with "cpu_" before it where CPU time was taken; "ratio"
    (its value over ours, paired) or "share" (of the whole that its table begins with); "error" in place of a ratio, where the provider's
    arithmetic is too coarse; "copy_share" (of bandwidth); "images_per_second", "tflops", "share_of_peak" (of the device's
    best speed in the setting's dtype). Of a single step: "peak_mib" and "peak_tensors", its additional memory in MiB and
    in full-size tensors; "kernels"; "passes", the bytes that they read and write in full-size tensors. What cannot be known has no row.
    """

    op: str
    provider: str
    mode: str
    size: str
    dtype: str
    metric: str
    median: float
    p20: float
    p80: float


def environment(device: torch.device, threads: int | None) -> dict[str, str]:
    """The columns that say where and with what the rows were measured."""
    info = fm.info()
    return {
        "device": _device_name(device),
        "threads": str(threads or ""),
        "cpu_isa": info.cpu_isa or "" if device.type == "cpu" else "",
        "torch": info.torch,
        "triton": info.triton or "",
        "python": info.python,
        "cuda": torch.version.cuda or "",
        **{name: peers.version(name) or "" for name in peers.PINNED},
        "fm_fast": info.fm_fast,
        "commit": commit_of(FOLDER.parents[1]),
        "date": datetime.date.today().isoformat(),
    }


def default_path(op: str, surroundings: Mapping[str, str], dtype: str = "float32", halves: Sequence[str] = ()) -> Path:
    """results/<device>-<date>-<op>.json, with the instruction set on a CPU.

    Another dtype, halves of a step and another number of threads than two are named: their rows are not written over the usual ones.
    """
    threads = surroundings["threads"]
    unusual = ("" if dtype == "float32" else dtype, *halves, f"{threads} threads" if threads not in ("", "2") else "")
    parts = (surroundings["device"], surroundings["cpu_isa"], surroundings["date"], op, *unusual)
    return FOLDER / ("-".join("_".join(part.split()) for part in parts if part) + ".json")


def write(path: Path, rows: list[Row], surroundings: Mapping[str, str], earlier: Sequence[Mapping[str, object]] = ()) -> None:
    """Write the rows so far to ``path`` (JSON) and beside it as CSV; called after every setting, so that a stopped run keeps its rows.

    earlier: records of a file, to stand before them.
    """
    records = [*earlier, *({**asdict(row), **surroundings} for row in rows)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    with path.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(records[0]))
        writer.writeheader()
        writer.writerows(records)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    return _cpu_name(cpuinfo.read_text(encoding="utf-8")) if cpuinfo.is_file() else platform.machine()


def _cpu_name(cpuinfo: str) -> str:
    """With family and model: a virtual machine may call processors of two generations by one name."""
    first = cpuinfo.strip().partition("\n\n")[0]
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
    numbers = [f"{word} {found[key]}" for word, key in (("family", "cpu family"), ("model", "model")) if key in found]
    return " ".join([found.get("model name") or platform.machine(), *numbers])


WRITTEN = ("benchmarks/results", "docs/images")  # by benchmarks themselves


def commit_of(root: Path) -> str:
    """The commit of a checkout, with "-dirty" where anything but results differs from it; empty where git does not know."""
    try:
        changed = _git(root, "status", "--porcelain", "--", ".", *(f":!{folder}" for folder in WRITTEN))
        return _git(root, "rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True).stdout.strip()
