"""Compare providers of an op on this machine: correctness first, then interleaved timing.

    python -m benchmarks.run --op path_loss --device cpu --size all --threads 2

A provider whose results are wrong stops the run before any time is shown.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.op import Op, Setting
    from benchmarks.results import Row
    from benchmarks.timing import Clock, Step

WARM_UP_SECONDS = 0.5
SMALL_STEP_MS = 2.0
TIMES = ("ms", "us")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--op", default="path_loss", help="one of benchmarks/registry.py, or all: every CPU benchmark of the README")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--size", nargs="+", default=["all"], help="sizes of the op, or all")
    parser.add_argument("--mode", nargs="+", metavar="TEXT", help="modes to keep, by part of their names")
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
    """Every size and mode that was asked for."""
    import torch

    from benchmarks.op import Setting

    for name in options.size:
        if name not in ("all", *op.sizes):
            sys.exit(f"--size must be all or some of {', '.join(map(repr, op.sizes))} for op {op.name}, got {name!r}")
    sizes = op.sizes if "all" in options.size else {name: op.sizes[name] for name in options.size}
    modes = [mode for mode in op.modes if not options.mode or any(text in mode for text in options.mode)]
    if not modes:
        sys.exit(f"--mode must be part of one of {', '.join(op.modes)} for op {op.name}, got {', '.join(options.mode)}")
    for size, shape in sizes.items():
        for mode in modes:
            yield Setting(torch.device(options.device), size, shape, getattr(torch, options.dtype), mode)


def gate(op: "Op", setting: "Setting", only: list[str] | None) -> dict[str, list]:
    """The steps of every provider, by name, after each has passed the check; SystemExit if one has not."""
    given, steps = [op.inputs(setting) for _ in range(_input_sets(op, setting))], {}
    for i, provider in enumerate(op.providers(setting)):
        if i and only is not None and not any(text in provider.name for text in only):
            continue
        steps[provider.name] = [provider.build(inputs, setting) for inputs in given]
        try:
            for inputs, step in zip(given, steps[provider.name] if provider.gated else [], strict=False):
                op.check(inputs, setting, step)
        except AssertionError as error:
            sys.exit(f"{op.name}, {setting.size}, {setting.mode}: {provider.name} is wrong, so nothing is timed: {error}")
    return steps


def _input_sets(op: "Op", setting: "Setting") -> int:
    """Sets to rotate over: on a GPU enough to leave its cache behind; on a CPU one, as a model would leave its output there too."""
    if setting.device.type == "cpu" or op.bytes_moved is None:
        return 1
    return max(2, min(64, (512 << 20) // op.bytes_moved(setting)))


def measure(op: "Op", setting: "Setting", options: argparse.Namespace) -> "list[Row]":
    """The rows of one setting: the op's values, ratios to ours and, on a GPU, the share of copy bandwidth."""
    import torch

    from benchmarks import timing

    torch._dynamo.reset()  # or the second size would run code that was compiled for any size
    steps, rounds = gate(op, setting, options.only), options.rounds or op.rounds
    if setting.device.type == "cuda":
        replays = {name: timing.captured(sets) for name, sets in steps.items()}
        timing.warm_up(replays, WARM_UP_SECONDS)
        clock = timing.device_clock(len(next(iter(steps.values()))))
        return _rows(op, setting, timing.interleaved(replays, rounds, clock), timing.copy_bandwidth(setting.device))
    timing.settle_allocator()
    now = time.process_time if options.clock == "cpu" else time.perf_counter
    values = (op.observe or _milliseconds)({name: sets[0] for name, sets in steps.items()}, rounds, now)
    return _rows(op, setting, values, unit=f"cpu_{op.unit}" if options.clock == "cpu" and op.unit in TIMES else op.unit)


def _milliseconds(steps: "Mapping[str, Step]", rounds: int, now: "Clock") -> dict[str, list[float]]:
    """A step's time, averaged over a few calls where it is short."""
    from benchmarks import timing

    timing.warm_up(steps, WARM_UP_SECONDS)
    repeats = 1 if timing.host_clock(3)(next(iter(steps.values()))) > SMALL_STEP_MS else 5
    return timing.interleaved(steps, rounds, timing.host_clock(repeats, now))


def _rows(
    op: "Op", setting: "Setting", times: dict[str, list[float]], copy_bandwidth: float | None = None, unit: str = "ms"
) -> "list[Row]":
    from benchmarks import timing
    from benchmarks.results import Row

    ours = next(iter(times))
    common = (setting.mode, setting.size, str(setting.dtype).removeprefix("torch."))
    rows = []
    for name, values in times.items():
        summaries = {unit: timing.summarise(values), "ratio": timing.ratios(times, name, ours)}
        if copy_bandwidth and op.bytes_moved:
            summaries["copy_share"] = timing.summarise([op.bytes_moved(setting) / ms / copy_bandwidth for ms in values])
        for metric, summary in summaries.items():
            rows.append(Row(op.name, name, *common, metric, summary.median, summary.p20, summary.p80))
    return rows


def table(rows: "list[Row]", ours: str) -> str:
    """One line a provider: its value, how many times ours that is (20th and 80th percentiles), its share of copy bandwidth."""
    by_metric = {(row.provider, row.metric): row for row in rows}
    first = rows[0]
    unit = first.metric
    lines = [f"\n{first.op}, {first.size}, {first.dtype}, {first.mode}", f"{'provider':<34}{unit:>28}{f'times {ours}':>32}"]
    for name in dict.fromkeys(row.provider for row in rows):
        cells = [by_metric[name, metric] for metric in (unit, "ratio")]
        text = [f"{cell.median:.3f} [{cell.p20:.3f}, {cell.p80:.3f}]" for cell in cells]
        share = f"   {by_metric[name, 'copy_share'].median:.0%} of copy" if (name, "copy_share") in by_metric else ""
        lines.append(f"{name:<34}{text[0]:>28}{text[1]:>32}{share}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if options.isa:
        # Read once, when fm_fast is imported: hence the imports inside functions.
        os.environ["FM_FAST_CPU"] = options.isa
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
    path = options.out or results.default_path(options.op, surroundings)
    rows: list[Row] = []
    for setting in chosen:
        new = measure(op, setting, options)
        rows += new
        print(table(new, new[0].provider), flush=True)
        results.write(path, rows, surroundings)


if __name__ == "__main__":
    main()
