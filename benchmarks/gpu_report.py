"""Everything that needs a GPU, in one command: ``make gpu-report``, or ``python -m benchmarks.gpu_report [build|test|sanitize|bench]``.

It runs on the GPU that is there, without a network, and prints a short table last. Rows go to
benchmarks/results/<device>-<date>.json as they are measured. Exits with 2 where there is no GPU, with 1 if a stage failed.
"""

import argparse
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks import registry, results, run

ROOT = Path(__file__).parent.parent
GPU_TESTS = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests"]
SANITIZED_TESTS = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-k", "matches", "tests"]
ROUNDS = "100"


def build() -> bool:
    """Compile and install this checkout with the tools of this machine, and print what came of it."""
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--no-index", "--editable", "."]
    return _succeeds(install) and _succeeds([sys.executable, "-c", "import fm_fast; print(fm_fast.info())"])


def test() -> bool:
    return _succeeds(GPU_TESTS)


def sanitize() -> bool:
    """The parity tests under compute-sanitizer, where that is installed."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        print("sanitize: compute-sanitizer is not installed, skipped")
        return True
    return _succeeds([tool, "--tool", "memcheck", "--error-exitcode", "1", *SANITIZED_TESTS])


def bench() -> bool:
    """Every op in float32 and bfloat16; rows are written after each setting."""
    surroundings = results.environment(torch.device("cuda"), None)
    path = results.FOLDER / ("-".join("_".join(surroundings[part].split()) for part in ("device", "date")) + ".json")
    rows: list[results.Row] = []
    tables = []
    for op in (op for op in registry.OPS.values() if "cuda" in op.devices):
        for dtype in ("float32", "bfloat16"):
            options = run.parse(["--op", op.name, "--device", "cuda", "--dtype", dtype, "--rounds", ROUNDS])
            for setting in run.settings(op, options):
                new = run.measure(op, setting, options)
                rows += new
                tables.append(run.table(new, new[0].provider))
                results.write(path, rows, surroundings)
    print("\n".join(tables))
    return True


STAGES: dict[str, Callable[[], bool]] = {"build": build, "test": test, "sanitize": sanitize, "bench": bench}


def _succeeds(command: list[str]) -> bool:
    """Run from the root of the checkout; the output goes through as it comes."""
    sys.stdout.flush()
    return subprocess.run(command, cwd=ROOT, check=False).returncode == 0


def _in_new_process(stage: str) -> bool:
    """A stage of its own process: one that follows the build must import what was built."""
    return _succeeds([sys.executable, "-m", "benchmarks.gpu_report", stage])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_report", description=__doc__)
    parser.add_argument("stage", nargs="?", default="all", choices=("all", *STAGES))
    stage = parser.parse_args(arguments).stage
    if not torch.cuda.is_available():
        print("no CUDA device here: nothing was run")
        return 2
    if stage == "all":
        outcomes = {name: _in_new_process(name) for name in STAGES}
        print(", ".join(f"{name}: {'ok' if good else 'FAILED'}" for name, good in outcomes.items()))
        return 0 if all(outcomes.values()) else 1
    print(", ".join(f"{name} {value}" for name, value in results.environment(torch.device("cuda"), None).items() if value))
    return 0 if STAGES[stage]() else 1


if __name__ == "__main__":
    sys.exit(main())
