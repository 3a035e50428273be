"""Everything that needs a GPU, in one command: ``make gpu-report``, or ``python -m benchmarks.gpu_report [build|test|sanitize|bench]``.

It runs on the GPU that is there, without a network, and prints a short table last. Rows go to
benchmarks/results/<device>-<date>.json as they are measured, what came of each stage to <device>-<date>-stages.json. Exits with 2 where
there is no GPU, with 1 if a stage failed.
"""

import argparse
import json
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from benchmarks import plan, registry, results, run
from benchmarks.op import Op, Setting

ROOT = Path(__file__).parent.parent
GPU_TESTS = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests"]
# Few of them: the sanitizer takes a hundred times as long.
SANITIZED_TESTS = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-k", "reductions or data_map or mixed_layouts", "tests"]
SANITIZERS = ("memcheck", "racecheck")
TRIVIAL = [sys.executable, "-c", "import torch; torch.zeros(1, device='cuda').add_(1).cpu()"]


Outcomes = dict[str, str]  # what was tried -> "ok", "FAILED" and perhaps why, or why it was not


def build() -> Outcomes:
    """Compile and install this checkout with the tools of this machine, and print what came of it."""
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--no-index", "--editable", "."]
    return {"install": _outcome(install), "info": _outcome([sys.executable, "-c", "import fm_fast; print(fm_fast.info())"])}


def test() -> Outcomes:
    return {"tests": _outcome(GPU_TESTS)}


def sanitize() -> Outcomes:
    """Some parity tests under compute-sanitizer. A tool that is missing or that this machine refuses is no failure of ours."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        return dict.fromkeys(SANITIZERS, "compute-sanitizer is not installed")
    # Each tensor in memory of its own, or what a kernel writes beyond one would lie in another, and be allowed.
    program = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", program]
    return {tool: _sanitized([*program, "--tool", tool, "--error-exitcode", "1"]) for tool in SANITIZERS}


def _sanitized(tool: list[str]) -> str:
    return _outcome([*tool, *SANITIZED_TESTS]) if _succeeds([*tool, *TRIVIAL]) else "refused here, on a trivial program too"


def bench() -> Outcomes:
    """What the plan lists, in its dtypes; rows are written after each setting, whose providers are timed in turns."""
    surroundings = results.environment(torch.device("cuda"), None)
    path = _path(surroundings, "")
    rows: list[results.Row] = []
    tables = []
    outcomes: Outcomes = {}
    for entry, dtype in [(planned, dtype) for planned in plan.GPU_PLAN for dtype in planned.dtypes]:
        op, options = registry.find(entry.op), entry.options(run.parse(["--device", "cuda", "--dtype", dtype]))
        for setting in run.settings(op, options):
            new, outcomes[f"{op.name}, {setting.size}, {dtype}, {setting.problem}"] = _measured(op, setting, options)
            if new:
                rows += new
                tables.append(run.table(new, new[0].provider))
                results.write(path, rows, surroundings)
    print("\n".join(tables))
    return outcomes


def _measured(op: Op, setting: Setting, options: argparse.Namespace) -> tuple[list[results.Row], str]:
    """The rows of a setting and what came of it: one that fails must not cost the report the others."""
    try:
        return run.measure(op, setting, options), "ok"
    except (Exception, SystemExit) as error:  # SystemExit: a provider is wrong
        traceback.print_exc()
        return [], f"FAILED: {error}".splitlines()[0]


STAGES: dict[str, Callable[[], Outcomes]] = {"build": build, "test": test, "sanitize": sanitize, "bench": bench}


def _succeeds(command: list[str]) -> bool:
    """Run from the root of the checkout; the output goes through as it comes."""
    sys.stdout.flush()
    return subprocess.run(command, cwd=ROOT, check=False).returncode == 0


def _outcome(command: list[str]) -> str:
    return "ok" if _succeeds(command) else "FAILED"


def _path(surroundings: Mapping[str, str], suffix: str) -> Path:
    return results.FOLDER / ("-".join("_".join(surroundings[part].split()) for part in ("device", "date")) + f"{suffix}.json")


def _record(stage: str, outcomes: Outcomes, surroundings: Mapping[str, str]) -> None:
    """Add what came of a stage to the report's file."""
    path = _path(surroundings, "-stages")
    stages = json.loads(path.read_text(encoding="utf-8"))["stages"] if path.is_file() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**surroundings, "stages": {**stages, stage: outcomes}}, indent=1) + "\n", encoding="utf-8")


def _run_stage(stage: str) -> bool:
    surroundings = results.environment(torch.device("cuda"), None)
    print(", ".join(f"{name} {value}" for name, value in surroundings.items() if value))
    outcomes = STAGES[stage]()
    _record(stage, outcomes, surroundings)
    print("\n".join(f"{stage}: {name}: {outcome}" for name, outcome in outcomes.items()))
    return not any(outcome.startswith("FAILED") for outcome in outcomes.values())


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
    return 0 if _run_stage(stage) else 1


if __name__ == "__main__":
    sys.exit(main())
