"""Everything that needs a GPU, in one command: ``make gpu-report``, or ``python -m benchmarks.gpu_report [build|test|sanitize|bench]``.

It runs on the GPU that is there, without a network, and prints a short table last. Rows go to <device>-<date>.json in
benchmarks/results or the folder --out, as they are measured; what came of each stage to <device>-<date>-stages.json, also as it comes.
Where a command may not take long, `bench --op path_loss noise` measures these alone. Exits with 2 where there is no GPU, with 1 if a
stage failed.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from benchmarks import plan, registry, results, run
from benchmarks.op import Op, Setting

ROOT = Path(__file__).parent.parent
PYTEST = [sys.executable, "-m", "pytest", "-v", "-m", "gpu"]  # by name, as they end: what takes too long is ended before it tells
TESTS = ("tests/test_gpu.py", "tests/test_gpu_calls.py", "tests/test_trainer_parity.py")
PROCESSES = 8  # that share the tests, most of which wait for Triton to compile
# Few of them: the sanitizer takes a hundred times as long.
SANITIZED_TESTS = "(reductions and sum) or (data_map and bfloat16) or (mixed_layouts and bfloat16) or step_error_of_what"
# Options and tests of each tool. memcheck: of probes that are meant to fail, as torch's and the driver's are, nothing is to be learnt.
# racecheck: it takes Triton's own reductions for races (triton-lang/triton issue 7264).
SANITIZERS = {
    "memcheck": (["--report-api-errors", "no"], SANITIZED_TESTS),
    "racecheck": ([], f"({SANITIZED_TESTS}) and not triton"),
}
# Of a stage's tests, of a sanitizer's and of a trivial program under it: a stage is to end within four minutes.
TEST_SECONDS, SANITIZER_SECONDS, TRIVIAL_SECONDS = 230, 75, 40
BUILD_SECONDS = BENCH_SECONDS = 235
SPARE_SECONDS = 10  # to start, and to tell what came of it
TRIVIAL = [sys.executable, "-c", "import torch; torch.zeros(1, device='cuda').add_(1).cpu()"]
LIBRARY = "from fm_fast import _backends; raise SystemExit(_backends.why_not('path_loss', 'cuda', 'cuda'))"
WITH_CUDA = "FM_FAST_BUILD=cuda"
UNFINISHED = "FAILED: it was ended before it had finished"

# What was tried, and "ok", "FAILED" and perhaps why, or why it was not.
Outcomes = Iterator[tuple[str, str]]


def build(options: argparse.Namespace) -> Outcomes:
    """Compile and install this checkout with the tools of this machine, and print what came of it."""
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--no-index", "--editable", "."]
    install.append("--check-build-dependencies")  # else an old setuptools fails in its own words
    asked = _for_this_gpu()
    outcome = _required([*asked, *install], BUILD_SECONDS)
    if outcome != "ok" and WITH_CUDA in asked:
        yield "install with CUDA", outcome
        outcome = _required(install, BUILD_SECONDS)
    yield "install", outcome
    yield "info", _outcome([sys.executable, "-c", "import fm_fast; print(fm_fast.info())"])
    yield from _cuda_library()


def _cuda_library() -> Outcomes:
    """Whether it is there. Where it is not, as in a checkout that was built elsewhere, tests skip it and benchmarks run without it."""
    yield "CUDA library", _required([sys.executable, "-c", LIBRARY], TRIVIAL_SECONDS)


def _for_this_gpu() -> list[str]:
    """What goes before a build that compiles for the GPU that is here, where nobody said for which: the others take minutes.

    With nvcc there, the CUDA library is asked for: setup.py looks for a driver, which a container may hide, and leaves it out otherwise.
    """
    wanted = ["TORCH_CUDA_ARCH_LIST={}.{}".format(*torch.cuda.get_device_capability())]
    if shutil.which("nvcc") or _beside_nvcc("nvcc"):
        wanted.append(WITH_CUDA)
    unset = [setting for setting in wanted if not os.environ.get(setting.partition("=")[0])]
    return ["env", *unset] if unset else []


def test(options: argparse.Namespace) -> Outcomes:
    yield from _cuda_library()
    shared = ["-n", str(PROCESSES), "--dist", "loadgroup"] if find_spec("xdist") else []
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "tests.xml")
        outcome = _required([*PYTEST, *TESTS, *shared, f"--junitxml={report}"], TEST_SECONDS)
        if outcome != "ok":
            outcome = ": ".join([outcome, *_failed_tests(report)])
        elif _ran_nothing(report):
            outcome = "FAILED: all tests were skipped"
        yield "tests", outcome


def _ran_nothing(report: Path) -> bool:
    """Whether every test was skipped, of which pytest makes no failure."""
    if not report.is_file():
        return False
    return all(case.find("skipped") is not None for case in ElementTree.parse(report).iter("testcase"))


def _failed_tests(report: Path) -> list[str]:
    """Their names, in one text; none where pytest has not come to its end."""
    if not report.is_file():
        return []
    cases = ElementTree.parse(report).iter("testcase")
    return [", ".join(case.get("name", "?") for case in cases if case.find("failure") is not None or case.find("error") is not None)]


def sanitize(options: argparse.Namespace) -> Outcomes:
    """Some parity tests under compute-sanitizer. A tool that is missing or that this machine refuses is no failure of ours."""
    program = shutil.which("compute-sanitizer") or _beside_nvcc("compute-sanitizer")
    for tool, (settings, chosen) in SANITIZERS.items():
        # Each tensor in memory of its own, or what a kernel writes beyond one would lie in another, and be allowed.
        command = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", program or "", "--tool", tool, "--error-exitcode", "1", *settings]
        yield tool, _sanitized(command, chosen) if program else "compute-sanitizer is not installed"


def _beside_nvcc(name: str) -> str | None:
    """A program of the CUDA toolkit whose folder is not on the path."""
    from torch.utils.cpp_extension import CUDA_HOME

    return shutil.which(name, path=str(Path(CUDA_HOME, "bin"))) if CUDA_HOME else None


def _sanitized(tool: list[str], chosen: str) -> str:
    """A run that takes too long has found nothing so far."""
    trivial = _limited([*tool, *TRIVIAL], TRIVIAL_SECONDS)
    if trivial != "ok":
        return "refused here, on a trivial program too: " + ("its output is above" if trivial == "FAILED" else trivial)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "tests.xml")
        outcome = _limited([*tool, *PYTEST, TESTS[0], "-k", chosen, f"--junitxml={report}"], SANITIZER_SECONDS)
        return "nothing ran: all tests were skipped" if outcome == "ok" and _ran_nothing(report) else outcome


def bench(options: argparse.Namespace) -> Outcomes:
    """What the plan lists, in its dtypes; rows are written after each setting, whose providers are timed in turns."""
    yield from _cuda_library()
    until, surroundings = time.monotonic() + BENCH_SECONDS - SPARE_SECONDS, results.environment(torch.device("cuda"), None)
    path, entries = _path(options.out, surroundings, ""), [entry for entry in plan.GPU_PLAN if not options.op or entry.op in options.op]
    earlier = [record for record in _records(path) if record["op"] not in {entry.op for entry in entries}]
    rows: list[results.Row] = []
    tables = []
    for entry, dtype in [(planned, dtype) for planned in entries for dtype in planned.dtypes]:
        op, chosen = registry.find(entry.op), entry.options(run.parse(["--device", "cuda", "--dtype", dtype]))
        for setting in run.settings(op, chosen):
            new, outcome = _measured(op, setting, chosen)
            if new:
                rows += new
                tables.append(run.table(new, new[0].provider))
                print(tables[-1], flush=True)  # also where the rest does not come to its end
                results.write(path, rows, surroundings, earlier)
            yield f"{op.name}, {setting.size}, {dtype}, {setting.problem}", outcome
            if outcome != "ok" and not _device_works():
                yield from _by_another(entry.op, entries, options, until)
                return
    print("\n".join(["\nAll of them:", *tables]))


def _device_works() -> bool:
    """After an illegal access nothing does in this process any more."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def _by_another(op: str, entries: Sequence[plan.Entry], options: argparse.Namespace, until: float) -> Outcomes:
    """What comes after that op, by a new process that must not outlive this one; of its own settings the others are lost."""
    names = list(dict.fromkeys(entry.op for entry in entries))
    left = names[names.index(op) + 1 :]
    yield "device", f"FAILED: {op} has left it of no more use to its process"
    if left:
        command = [sys.executable, "-m", "benchmarks.gpu_report", "bench", "--op", *left, "--out", str(options.out)]
        yield ", ".join(left), _required(command, max(until - time.monotonic(), 0.0))


def _records(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


def _measured(op: Op, setting: Setting, options: argparse.Namespace) -> tuple[list[results.Row], str]:
    """The rows of a setting and what came of it: one that fails must not cost the report the others.

    Nor may one of our backends cost it the rows of the first.
    """
    try:
        return run.measure(op, setting, options), "ok"
    except (Exception, SystemExit) as error:  # SystemExit: a provider is wrong
        traceback.print_exc()
        outcome = f"FAILED: {error}".splitlines()[0]
    others = [provider for provider in op.providers(setting) if not provider.ours]
    alone = dataclasses.replace(op, providers=lambda setting: others)
    # With the first of ours, or with none.
    for chosen, only in ((op, [provider.name for provider in others]), (alone, None)):
        with contextlib.suppress(Exception, SystemExit):
            return run.measure(chosen, setting, argparse.Namespace(**{**vars(options), "only": only})), f"{outcome}; rows without it"
    return [], outcome


STAGES: dict[str, Callable[[argparse.Namespace], Outcomes]] = {"build": build, "test": test, "sanitize": sanitize, "bench": bench}


def _succeeds(command: list[str], seconds: float | None = None) -> bool:
    """Run from the root of the checkout; the output goes through as it comes. What takes longer is ended with all that it has begun."""
    sys.stdout.flush()
    with subprocess.Popen(command, cwd=ROOT, start_new_session=seconds is not None) as process:
        try:
            return process.wait(seconds) == 0
        except BaseException:
            if seconds is not None:
                os.killpg(process.pid, signal.SIGKILL)
            raise


def _outcome(command: list[str], seconds: float | None = None) -> str:
    return "ok" if _succeeds(command, seconds) else "FAILED"


def _limited(command: list[str], seconds: float) -> str:
    """The same of a command that may hang."""
    try:
        return _outcome(command, seconds)
    except subprocess.TimeoutExpired:
        return f"not at its end after {seconds} s"


def _required(command: list[str], seconds: float) -> str:
    """The same of one that must come to its end."""
    outcome = _limited(command, seconds)
    return f"FAILED: {outcome}" if outcome.startswith("not ") else outcome


def _path(folder: Path, surroundings: Mapping[str, str], suffix: str) -> Path:
    return folder / ("-".join("_".join(surroundings[part].split()) for part in ("device", "date")) + f"{suffix}.json")


def _record(folder: Path, stage: str, outcomes: Mapping[str, str], surroundings: Mapping[str, str]) -> None:
    """Put what came of a stage into the report's file."""
    path = _path(folder, surroundings, "-stages")
    stages = json.loads(path.read_text(encoding="utf-8"))["stages"] if path.is_file() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**surroundings, "stages": {**stages, stage: outcomes}}, indent=1) + "\n", encoding="utf-8")


def _run_stage(stage: str, options: argparse.Namespace) -> bool:
    """Recorded after everything that was tried, so that a stage that is killed leaves what it had."""
    surroundings = results.environment(torch.device("cuda"), None)
    print(", ".join(f"{name} {value}" for name, value in surroundings.items() if value))
    outcomes: dict[str, str] = {}
    record = functools.partial(_record, options.out, stage, surroundings=surroundings)
    record({stage: UNFINISHED})
    for name, outcome in STAGES[stage](options):
        outcomes[name] = outcome
        record({**outcomes, stage: UNFINISHED})
    record(outcomes)
    print("\n".join(f"{stage}: {name}: {outcome}" for name, outcome in outcomes.items()))
    return not any(outcome.startswith("FAILED") for outcome in outcomes.values())


def _in_new_process(stage: str, folder: Path) -> bool:
    """A stage of its own process: one that follows the build must import what was built."""
    return _succeeds([sys.executable, "-m", "benchmarks.gpu_report", stage, "--out", str(folder)])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_report", description=__doc__)
    parser.add_argument("stage", nargs="?", default="all", choices=("all", *STAGES))
    planned = [entry.op for entry in plan.GPU_PLAN]
    parser.add_argument("--op", nargs="+", choices=planned, metavar="OP", help="of stage bench alone: these ops, beside earlier rows")
    parser.add_argument(
        "--out", type=Path, default=results.FOLDER, metavar="FOLDER", help="where the report's files go [benchmarks/results]"
    )
    options = parser.parse_args(arguments)
    if options.op and options.stage != "bench":
        parser.error(f"--op: expected stage bench, got {options.stage}")
    if not torch.cuda.is_available():
        print("no CUDA device here: nothing was run")
        return 2
    if options.stage == "all":
        outcomes = {name: _in_new_process(name, options.out) for name in STAGES}
        print(", ".join(f"{name}: {'ok' if good else 'FAILED'}" for name, good in outcomes.items()))
        return 0 if all(outcomes.values()) else 1
    with _ended_after(BENCH_SECONDS) if options.stage == "bench" else contextlib.nullcontext():
        return 0 if _run_stage(options.stage, options) else 1


@contextlib.contextmanager
def _ended_after(seconds: float) -> Iterator[None]:
    """What waits for a device for ever hears of no exception: the process ends, and leaves what it has written."""

    def end() -> None:
        print(f"not at its end after {seconds} s", flush=True)
        os._exit(1)

    watch = threading.Timer(seconds, end)
    watch.daemon = True
    watch.start()
    try:
        yield
    finally:
        watch.cancel()


if __name__ == "__main__":
    sys.exit(main())
