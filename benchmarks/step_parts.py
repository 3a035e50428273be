"""Where the time of a training step goes: ours and torchcfm's in the same parts, interleaved.

    python -m benchmarks.step_parts --size 32x32

The step is that of op train_step, without anything added: the output is cut from the loss, and its gradient handed on. Prints the median
milliseconds of each part and the median of torchcfm's over ours, paired within rounds, and writes them like those of benchmarks.run.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import peers, results, timing
from benchmarks.op import Setting
from benchmarks.ops import train_step
from benchmarks.ops.train_step import OP, Trainer

NAME = "train_step_parts"
OURS = "fm_fast"
WHOLE = "all"
Times = dict[str, float]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step_parts", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--size", default="32x32", choices=list(train_step.SIZES))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSON file of the rows; a CSV is written beside it (default: benchmarks/results/)")
    return parser.parse_args()


class Laps:
    """A stopwatch: milliseconds since the call before."""

    def __init__(self) -> None:
        self.times: Times = {}
        self._begin = time.perf_counter()

    def __call__(self, name: str) -> None:
        now = time.perf_counter()
        self.times[name], self._begin = (now - self._begin) * 1e3, now


def timed_step(trainer: Trainer) -> Times:
    """One step: milliseconds of its parts, and of all of them."""
    lap = Laps()
    point = trainer.draw()
    lap("noise, t, x_t")
    output = trainer.model(point.x_t, point.t)
    lap("network, forward")
    leaf = output.detach().requires_grad_()
    point.loss(leaf).backward()
    lap("loss and its gradient")
    output.backward(leaf.grad)
    lap("network, backward")
    for update in trainer.updates.values():
        update()
    lap("clipping, Adam, average")
    return {**lap.times, WHOLE: sum(lap.times.values())}


def measure(setting: Setting, rounds: int) -> dict[str, list[Times]]:
    """The times of every round, by provider: ours with the fused and the plain layers, and torchcfm's."""
    given = OP.inputs(setting)
    trainers: dict[str, Any] = {provider.name: provider.build(given, setting) for provider in OP.providers(setting)}
    for trainer in trainers.values():
        OP.check(given, setting, trainer)
    timing.keep_freed_memory()
    timing.warm_up(trainers, 0.5)
    found: dict[str, list[Times]] = {name: [] for name in trainers}

    def clock(name: str) -> float:
        found[name].append(timed_step(trainers[name]))
        return found[name][-1][WHOLE]

    timing.interleaved({name: name for name in trainers}, rounds, clock)
    return found


def rows(setting: Setting, measured: dict[str, list[Times]]) -> list[results.Row]:
    """A part is a mode of the op."""
    found, dtype = [], str(setting.dtype).removeprefix("torch.")
    for part in measured[OURS][0]:
        times = {name: [step[part] for step in steps] for name, steps in measured.items()}
        for name, values in times.items():
            for metric, summary in (("ms", timing.summarise(values)), ("ratio", timing.ratios(times, name, OURS))):
                found.append(results.Row(NAME, name, part, setting.size, dtype, metric, summary.median, summary.p20, summary.p80))
    return found


def table(found: list[results.Row]) -> str:
    """A line a part: each provider's milliseconds, and in brackets how many times ours that is."""
    cells = {(row.mode, row.provider, row.metric): row.median for row in found}
    providers, parts = (list(dict.fromkeys(getattr(row, name) for row in found)) for name in ("provider", "mode"))
    lines = [f"{'ms (times fm_fast)':<26}" + "".join(f"{name:>26}" for name in providers)]
    for part in parts:
        texts = [f"{cells[part, name, 'ms']:.2f} ({cells[part, name, 'ratio']:.2f})" for name in providers]
        lines.append(f"{part:<26}" + "".join(f"{text:>26}" for text in texts))
    return "\n".join(lines)


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    setting = Setting(torch.device("cpu"), options.size, train_step.SIZES[options.size], getattr(torch, options.dtype), "")
    surroundings = results.environment(setting.device, options.threads)
    for remark in peers.remarks(OP.peers):
        print(remark, flush=True)
    found = rows(setting, measure(setting, options.rounds))
    print(table(found))
    results.write(options.out or results.default_path(NAME, surroundings, options.dtype), found, surroundings)


if __name__ == "__main__":
    main()
