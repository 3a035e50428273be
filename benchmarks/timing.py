"""Interleaved timing: every round runs each candidate once, in random order, so that a busy moment of the machine hits all alike."""

import ctypes
import math
import random
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # parameters of mallopt, as malloc.h numbers them

Step = Callable[[], object]
# Seconds, of the wall or of the process's CPU time
Clock = Callable[[], float]


@dataclass(frozen=True)
class Summary:
    """Median and the 20th and 80th percentile."""

    median: float
    p20: float
    p80: float


def summarise(values: list[float]) -> Summary:
    ordered = sorted(values)
    last = len(ordered) - 1
    return Summary(ordered[round(last * 0.5)], ordered[round(last * 0.2)], ordered[round(last * 0.8)])


def ratios(times: Mapping[str, list[float]], name: str, base: str) -> Summary:
    """``name``'s time over ``base``'s, paired within each round."""
    return summarise([a / b for a, b in zip(times[name], times[base], strict=True)])


def keep_freed_memory() -> None:
    """For every provider alike, as `fm-fast train` does (fm_fast/train/execution/allocator.py, which another commit's package may lack)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(TRIM_THRESHOLD, -1)
        mallopt(MMAP_MAX, 0)


def now(device: torch.device, kind: str) -> Clock:
    """The clock of a kind, "wall" or "cpu", that tells the time when the device has finished."""
    clock = time.process_time if kind == "cpu" else time.perf_counter
    if device.type == "cpu":
        return clock

    def finished() -> float:
        torch.cuda.synchronize(device)
        return clock()

    return finished


def warm_up(steps: Mapping[str, Step], seconds: float, finish: Step = lambda: None) -> None:
    """Run every step for a while: by time, not by count, so that clocks and caches settle whatever a step costs.

    finish: what waits for a step's work; else a GPU would get more of it than it does in that time, and be busy with the rest later.
    """
    for step in steps.values():
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            step()
            finish()


def interleaved(steps: Mapping[str, Any], rounds: int, clock: Callable[[Any], float], seed: int = 0) -> dict[str, list[float]]:
    """What the clock says of each step in each round."""
    order, shuffle = list(steps), random.Random(seed).shuffle
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            times[name].append(clock(steps[name]))
    return times


def seconds(step: Step, now: Clock) -> float:
    """Of a single call."""
    start = now()
    step()
    return now() - start


def host_clock(repeats: int, now: Clock = time.perf_counter) -> Callable[[Step], float]:
    """Milliseconds a call, averaged over a few calls in a row; ``now=time.process_time`` counts the process's CPU time instead."""

    def clock(step: Step) -> float:
        start = now()
        for _ in range(repeats):
            step()
        return (now() - start) * 1e3 / repeats

    return clock


def captured(steps: list[Step]) -> Step:
    """A replay of all the steps in one CUDA graph: no launch gaps, and one input set after another, so that the cache stays cold.

    The steps' results are kept until the end of the capture, so that each has memory of its own: otherwise all would be written to the
    same, which then lies in the cache.
    """
    from fm_fast.train.execution.graph import leave_failed_capture  # which older packages, with which this compares, have not

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for step in steps * 3:
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph, current, pool = torch.cuda.CUDAGraph(), torch.cuda.current_stream(), torch.cuda.graph_pool_handle()
    try:
        with torch.cuda.graph(graph, pool=pool):
            results = [step() for step in steps]
        del results
    except BaseException:
        leave_failed_capture(current, pool)
        raise
    return graph.replay


SAMPLE_MS = 2.0  # at least, between two events


def device_clock(repeats: int) -> Callable[[Step], float]:
    """Milliseconds of a step, of which a replay holds ``repeats``.

    Over so many replays in a row that the microseconds until the first one starts do not count.
    """
    replays: dict[Step, int] = {}

    def clock(replay: Step) -> float:
        if replay not in replays:
            replays[replay] = max(1, math.ceil(SAMPLE_MS / max(_between_events(replay, 1), 1e-3)))
        return _between_events(replay, replays[replay]) / (replays[replay] * repeats)

    return clock


def _between_events(replay: Step, count: int) -> float:
    """Milliseconds that the device takes for so many replays."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(count):
        replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def copy_bandwidth(device: torch.device, size: int = 1 << 30) -> float:
    """Bytes a millisecond, read and written, of a large copy on the device: the ceiling of any memory-bound kernel."""
    source, target = torch.ones(2, size, dtype=torch.uint8, device=device)
    copies = captured([lambda: target.copy_(source)] * 4)
    return 2 * size / summarise([device_clock(4)(copies) for _ in range(20)]).median
