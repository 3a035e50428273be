"""A training run as a program of its own, for tests that kill it: `python killed_run.py FOLDER [--kill-at-save N] [--keep FILE]`.

Trains the tiny network with everything random switched on, or goes on where it was; --kill-at-save N ends the process without any
farewell in the middle of writing its N-th checkpoint; --keep writes what the run ended with. --hang-up-after N: in the middle of the N-th
step it waits for a line on stdin, then gets SIGHUP.
"""

import argparse
import os
import signal
from pathlib import Path

import torch
from trainer_helpers import tiny

from fm_fast.train import loop, train
from fm_fast.train.data import DataOrder, digits
from fm_fast.train.storage.run_folder import RunFolder

SETTINGS = {
    "steps": 20, "batch_size": 8, "label_drop": 0.3, "flip": 0.5, "dequantise": True,
    "sample_every": 0, "sample_steps": 1, "samples_per_class": 1, "evaluate": False, "checkpoint_every": 3, "log_every": 1,
}  # fmt: skip


def ended_with(state, config):
    """Everything that a resumed run must have in common with an uninterrupted one, the next batch included."""
    order = DataOrder(len(digits()), config.seed)
    return {**state.state_dict(), "next_batch": order.indices(state.step * config.batch_size, config.batch_size)}


def run(folder):
    result = train(tiny(out=str(folder), **SETTINGS), resuming=bool(RunFolder(folder).checkpoints()))
    return ended_with(result.state, result.config)


def kill_in_save(number):
    original, count = torch.save, [0]

    def save(content, file):
        count[0] += 1
        if count[0] < number:
            return original(content, file)
        original(content, half := HalfFile(file))
        raise AssertionError(f"not killed after {half.written} bytes")

    torch.save = save


def hang_up_after(steps):
    original = loop.training_step
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup

    def training_step(state, *arguments, **options):
        if state.step == steps - 1:
            input()
            os.kill(os.getpid(), signal.SIGHUP)
        return original(state, *arguments, **options)

    loop.training_step = training_step


class HalfFile:
    """Takes some thousand bytes, then the process is gone."""

    def __init__(self, file):
        self.file, self.written = file, 0

    def write(self, data):
        self.file.write(data)
        self.written += len(data)
        if self.written > 20_000:
            self.file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return len(data)

    def flush(self):
        self.file.flush()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kill-at-save", type=int)
    parser.add_argument("--hang-up-after", type=int)
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.kill_at_save:
        kill_in_save(options.kill_at_save)
    if options.hang_up_after:
        hang_up_after(options.hang_up_after)
    ending = run(options.folder)
    if options.keep:
        torch.save(ending, options.keep)
