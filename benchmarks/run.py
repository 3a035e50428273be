"""Compare providers of an op on this machine: correctness first, then interleaved timing.

    python -m benchmarks.run --op path_loss --device cpu --size all --threads 2

A provider whose results are wrong stops the run before any time is shown.
"""

import argparse
import functools
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from benchmarks.costs import Costs
    from benchmarks.op import Op, Provider, Setting
    from benchmarks.results import Row
    from benchmarks.timing import Clock, Step

Result = TypeVar("Result")
WARM_UP_SECONDS, GPU_WARM_UP_SECONDS = 0.5, 0.1
SMALL_STEP_MS = 2.0
PARTS = ("full", "forward", "backward", "call")
TIMES = ("ms", "us")
# What is counted of a step, by metric, and its head in a table
RATES = {
    "copy_share": "{:.0%} of copy",
    "images_per_second": "{:,.0f} images/s",
    "tflops": "{:.3g} TFLOP/s",
    "share_of_peak": "{:.0%} of peak",
}
COUNTED = {"peak_mib": "peak MiB", "peak_tensors": "tensors", "kernels": "kernels", "passes": "passes"}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--op", default="path_loss", help="one of benchmarks/registry.py, or all: every CPU benchmark of the README")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--size", nargs="+", default=["all"], help="sizes of the op, or all")
    parser.add_argument("--mode", nargs="+", metavar="TEXT", help="modes to keep, by part of their names")
    parser.add_argument("--part", nargs="+", default=["full"], choices=PARTS, help="halves of a step; call: a whole solve of few steps")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--isa", choices=("avx512", "avx2", "portable"), help="instruction set of the C++ library (FM_FAST_CPU)")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch, on the CPU")
    parser.add_argument(
        "--clock", default="wall", choices=("wall", "cpu"), help="cpu: CPU time of the process, for a busy machine (with --threads 1)"
    )
    parser.add_argument("--rounds", type=int, help="each round runs every provider once, in random order")
    parser.add_argument(
        "--only", nargs="*", metavar="TEXT", help="other providers than ours to keep, by part of their names; none without a text"
    )
    parser.add_argument("--against", metavar="COMMIT", help="compare our time with another commit's instead of other providers'")
    parser.add_argument("--pairs", type=int, default=7, help="of processes, with --against")
    parser.add_argument("--out", type=Path, help="JSON file of the rows; a CSV is written beside it (default: benchmarks/results/)")
    return parser.parse_args(arguments)


def settings(op: "Op", options: argparse.Namespace) -> "Iterator[Setting]":
    """Every size, mode and part that was asked for."""
    import torch

    from benchmarks.op import Setting

    known = {**op.sizes, **(op.gpu_sizes if options.device == "cuda" else {})}
    for name in options.size:
        if name not in ("all", *known):
            sys.exit(f"--size must be all or some of {', '.join(map(repr, known))} for op {op.name}, got {name!r}")
    sizes = known if "all" in options.size else {name: known[name] for name in options.size}
    modes = [mode for mode in op.modes if not options.mode or any(text in mode for text in options.mode)]
    if not modes:
        sys.exit(f"--mode must be part of one of {', '.join(op.modes)} for op {op.name}, got {', '.join(options.mode)}")
    missing = [part for part in options.part if part not in op.parts]
    if missing:
        sys.exit(f"--part must be some of {', '.join(op.parts)} for op {op.name}, got {', '.join(missing)}")
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    for (size, shape), mode, part in itertools.product(sizes.items(), modes, options.part):
        yield Setting(device, size, shape, dtype, mode, part)


@dataclass(frozen=True)
class Gated:
    """Providers that may be timed. steps: by name, one for each set of inputs. errors: of those whose arithmetic is too coarse."""

    steps: dict[str, list]
    errors: dict[str, float]


def gate(op: "Op", setting: "Setting", only: list[str] | None) -> Gated:
    """Every provider after its check; SystemExit if one is wrong."""
    given, found = [op.inputs(setting) for _ in range(_input_sets(op, setting))], Gated({}, {})
    for i, provider in enumerate(op.providers(setting)):
        if i and only is not None and not any(text in provider.name for text in only):
            continue
        built = _unless_left_out(op, setting, provider.name, functools.partial(_built, op, setting, provider, given), not provider.ours)
        if built is None:
            continue
        found.steps[provider.name], errors = built
        if errors:
            found.errors[provider.name] = max(errors)
    return found


def _built(op: "Op", setting: "Setting", provider: "Provider", given: list) -> tuple[list, list[float]]:
    """Its steps on each set of inputs, and the errors of steps that are as inexact as its arithmetic."""
    steps = [provider.build(inputs, setting) for inputs in given]
    if not provider.gated:
        return steps, []
    errors = [_checked(op, setting, provider, *pair) for pair in zip(given, steps, strict=True)]
    return steps, [error for error in errors if error is not None]


def _unless_left_out(op: "Op", setting: "Setting", provider: str, work: Callable[[], Result], may_fail: bool) -> Result | None:
    """What the work gives. On a GPU a provider that is wrong or fails where it may is left out, and costs us no rows: None."""
    try:
        return work()
    except (Exception, SystemExit) as error:
        if not may_fail or setting.device.type == "cpu":
            raise
        failure = f"{op.name}, {setting.size}, {setting.problem}: {provider} failed: {type(error).__name__}: {error}"
        print(f"left out: {error if isinstance(error, SystemExit) else failure}")
        return None


def _checked(op: "Op", setting: "Setting", provider: "Provider", inputs: Any, step: Any) -> float | None:
    """None, or the error of another's step that is as inexact as its arithmetic; SystemExit if the step is wrong."""
    from benchmarks.op import Inexact

    try:
        op.check(inputs, setting, step)
    except AssertionError as error:
        if isinstance(error, Inexact) and not provider.ours:
            return error.error
        sys.exit(f"{op.name}, {setting.size}, {setting.problem}: {provider.name} is wrong, so nothing is timed: {error}")
    return None


def _input_sets(op: "Op", setting: "Setting") -> int:
    """Sets to rotate over: on a GPU enough to leave its cache behind; on a CPU one, as a model would leave its output there too."""
    if setting.device.type == "cpu" or op.bytes_moved is None:
        return 1
    return max(2, min(64, (512 << 20) // op.bytes_moved(setting)))


def measure(op: "Op", setting: "Setting", options: argparse.Namespace) -> "list[Row]":
    """The rows of one setting: the op's values, ratios to ours, what a step costs besides, and on a GPU the share of copy bandwidth."""
    import torch

    from benchmarks import timing

    torch._dynamo.reset()  # or the second size would run code that was compiled for any size
    gated, rounds = gate(op, setting, options.only), options.rounds or op.rounds
    bandwidth, unit = None, op.unit
    if setting.device.type == "cuda" and op.observe is None:
        replays = _captured(op, setting, gated)
        timing.warm_up(replays, GPU_WARM_UP_SECONDS, torch.cuda.synchronize)
        clock = timing.device_clock(len(next(iter(gated.steps.values()))))
        values, bandwidth = timing.interleaved(replays, rounds, clock), timing.copy_bandwidth(setting.device)
    else:
        timing.keep_freed_memory()
        now = timing.now(setting.device, options.clock)
        values = (op.observe or _milliseconds)({name: sets[0] for name, sets in gated.steps.items()}, rounds, now)
        unit = f"cpu_{op.unit}" if options.clock == "cpu" and op.unit in TIMES else op.unit
    # Last: what is counted is not timed.
    counts = {name: functools.partial(op.costs, gated.steps[name][0], setting.device) for name in values}
    costs = {name: _unless_left_out(op, setting, name, count, True) for name, count in counts.items()}
    return _rows(op, setting, values, gated.errors, costs, bandwidth, unit)


def _captured(op: "Op", setting: "Setting", gated: Gated) -> "dict[str, Step]":
    from benchmarks import timing

    work = {name: functools.partial(timing.captured, sets) for name, sets in gated.steps.items()}
    tried = {name: _unless_left_out(op, setting, name, capture, not name.startswith("fm_fast")) for name, capture in work.items()}
    return {name: replay for name, replay in tried.items() if replay is not None}


def _milliseconds(steps: "Mapping[str, Step]", rounds: int, now: "Clock") -> dict[str, list[float]]:
    """A step's time, averaged over a few calls where it is short."""
    from benchmarks import timing

    timing.warm_up(steps, WARM_UP_SECONDS)
    repeats = 1 if timing.host_clock(3)(next(iter(steps.values()))) > SMALL_STEP_MS else 5
    return timing.interleaved(steps, rounds, timing.host_clock(repeats, now))


def _rows(
    op: "Op", setting: "Setting", times: dict[str, list[float]], errors: dict[str, float], costs: "dict[str, Costs | None]",
    copy_bandwidth: float | None, unit: str,
) -> "list[Row]":  # fmt: skip
    from benchmarks import timing
    from benchmarks.results import Row

    ours = next(iter(times))
    common = (setting.problem, setting.size, str(setting.dtype).removeprefix("torch."))
    rows = []
    for name, values in times.items():
        summaries = {unit: timing.summarise(values)}
        if name in errors:
            summaries["error"] = timing.summarise([errors[name]])
        else:
            summaries[op.relation] = timing.ratios(times, name, ours)
        if copy_bandwidth and op.bytes_moved and name not in errors:
            summaries["copy_share"] = timing.summarise([op.bytes_moved(setting) / ms / copy_bandwidth for ms in values])
        for metric, amount in op.work(setting).items():
            summaries[metric] = timing.summarise([amount / ms for ms in values])
        summaries |= {metric: timing.summarise([value]) for metric, value in _counted(op, setting, costs[name]).items()}
        rows += [Row(op.name, name, *common, metric, value.median, value.p20, value.p80) for metric, value in summaries.items()]
    return rows


def _counted(op: "Op", setting: "Setting", costs: "Costs | None") -> dict[str, float]:
    """What is known of a step's costs, by metric."""
    from benchmarks.costs import MIB

    if costs is None:
        return {}
    found = {"peak_mib": costs.peak / MIB, "kernels": costs.kernels}
    if op.tensor_bytes is not None:
        size = op.tensor_bytes(setting)
        found |= {"peak_tensors": costs.peak / size, "passes": None if costs.traffic is None else costs.traffic / size}
    return {metric: float(value) for metric, value in found.items() if value is not None}


def table(rows: "list[Row]", ours: str) -> str:
    """A line a provider: its value and how many times ours that is (20th and 80th percentiles), or by how much it is inexact; its costs."""
    cells: dict[str, dict[str, Row]] = {}
    for row in rows:
        cells.setdefault(row.provider, {})[row.metric] = row
    first = rows[0]
    relation = f"share of {ours}" if "share" in cells[first.provider] else f"times {ours}"
    heads = "".join(f"{head:>9}" for head in COUNTED.values())
    lines = [f"\n{first.op}, {first.size}, {first.dtype}, {first.mode}", f"{'provider':<34}{first.metric:>28}{relation:>36}{heads}"]
    for name, found in cells.items():
        counts = "".join(f"{_short(found[metric].median) if metric in found else '':>9}" for metric in COUNTED)
        rates = "".join(f"   {form.format(found[metric].median)}" for metric, form in RATES.items() if metric in found)
        lines.append(f"{name:<34}{_spread(found[first.metric]):>28}{_related(found):>36}{counts}{rates}".rstrip())
    return "\n".join(lines)


def _related(found: "Mapping[str, Row]") -> str:
    if "error" in found:
        return f"inexact: off by {found['error'].median:.1e}"
    return _spread(found["ratio"]) if "ratio" in found else _spread(found["share"], 100.0, "%")


def _spread(row: "Row", factor: float = 1.0, unit: str = "") -> str:
    median, p20, p80 = (factor * value for value in (row.median, row.p20, row.p80))
    return f"{median:.3f}{unit} [{p20:.3f}, {p80:.3f}]"


def _short(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 100.0 else f"{value:.0f}"


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if options.isa:
        # Read once, when fm_fast is imported: hence the imports inside functions.
        os.environ["FM_FAST_CPU"] = options.isa
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler, which counts, tells of its starts and ends otherwise
    import torch

    from benchmarks import plan

    torch.set_num_threads(options.threads)
    if options.op == "all":
        plan.run(options, run_op)
    else:
        run_op(options)


def run_op(options: argparse.Namespace) -> None:
    """Print the tables of one op and write its rows, or compare it with another commit's."""
    import torch

    from benchmarks import against, peers, registry, results

    if options.op not in registry.NAMES:
        sys.exit(f"--op must be all or one of {', '.join(registry.NAMES)}, got {options.op!r}")
    op = registry.find(options.op)
    if options.device not in op.devices:
        sys.exit(f"--device must be {' or '.join(op.devices)} for op {op.name}, got {options.device!r}")
    chosen = list(settings(op, options))
    if options.against is not None:
        return against.compare(options)
    surroundings = results.environment(torch.device(options.device), options.threads if options.device == "cpu" else None)
    print(", ".join(f"{name} {value}" for name, value in surroundings.items() if value))
    for remark in peers.remarks(op.peers):
        print(remark, flush=True)
    path = options.out or results.default_path(options.op, surroundings, options.dtype, [part for part in options.part if part != "full"])
    rows: list[Row] = []
    for setting in chosen:
        new = measure(op, setting, options)
        rows += new
        print(table(new, new[0].provider), flush=True)
        results.write(path, rows, surroundings)


if __name__ == "__main__":
    main()
