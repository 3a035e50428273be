"""Runs that are killed, at random and while they write, go on in a fresh process bit by bit as if nothing had happened."""

import contextlib
import json
import os
import pty
import random
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import killed_run
import pytest
import torch
from copies import run_python
from thread_counts import threads
from torch.utils import _pytree as pytree
from trainer_helpers import tiny

from fm_fast.cli import main
from fm_fast.train import loop, train
from fm_fast.train.execution.interrupt import deferred_interrupt
from fm_fast.train.storage.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("one_thread")
DEADLINE = 120  # seconds, so that a process that hangs fails the test


def start(folder, *arguments):
    """killed_run.py in a fresh process."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(Path(killed_run.__file__)), str(folder), *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@contextlib.contextmanager
def running(folder, *arguments):
    process = start(folder, *arguments)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def last_logged(folder):
    log = RunFolder(folder).log
    return len(log.read_text().splitlines()) if log.is_file() else 0


def kill_at_random(folder, delay):
    """End the process without farewell, some time after its first checkpoint."""
    with running(folder) as process:
        until = time.monotonic() + DEADLINE
        while last_logged(folder) < 5 and process.poll() is None and time.monotonic() < until:
            time.sleep(0.002)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        output, _ = process.communicate(timeout=DEADLINE)
        assert process.returncode in (-signal.SIGKILL, 0), output
    return last_logged(folder)


def run(folder, *arguments):
    """killed_run.py to its end."""
    code = f"import runpy; runpy.run_path({killed_run.__file__!r}, run_name='__main__')"
    return run_python(code, folder, *arguments, path=sys.path)


def finish(folder, keep):
    done = run(folder, "--keep", keep)
    assert done.returncode == 0, done.stderr
    return torch.load(keep, weights_only=True), done.stdout


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    with threads(1):
        yield killed_run.run(tmp_path_factory.mktemp("straight"))


def assert_same_values(one, two):
    """Nested dictionaries and lists of tensors and plain values are equal, tensors bit by bit."""
    leaves, others = pytree.tree_flatten(one), pytree.tree_flatten(two)
    assert leaves[1] == others[1] and len(leaves[0]) > 0
    assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(leaves[0], others[0], strict=True))


def test_killed_while_writing_a_checkpoint(uninterrupted, tmp_path):
    assert run(tmp_path, "--kill-at-save", 4).returncode == -signal.SIGKILL
    written = {file.name for file in tmp_path.glob("checkpoint*.pt")}
    assert written == {"checkpoint-00000006.pt", "checkpoint-00000009.pt"} and last_logged(tmp_path) == 12
    assert [file.stat().st_size > 20_000 for file in tmp_path.glob("*.tmp")] == [True], "it was in the middle of the fourth"
    resumed, output = finish(tmp_path, tmp_path / "ending.pt")
    assert "steps 9..20" in output and not list(tmp_path.glob("*.tmp"))
    assert set(resumed) == {"model", "average", "optimiser", "step", "next_batch"} and resumed["step"] == 20
    assert_same_values(uninterrupted, resumed)
    assert [json.loads(line)["step"] for line in RunFolder(tmp_path).log.read_text().splitlines()] == list(range(1, 21))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_killed_at_random_moments(seed, uninterrupted, tmp_path):
    delays = random.Random(seed)
    for _ in range(2):
        kill_at_random(tmp_path, delays.uniform(0.0, 0.5))
    resumed, _ = finish(tmp_path, tmp_path / "ending.pt")
    assert_same_values(uninterrupted, resumed)


def signal_after(monkeypatch, steps, number):
    """Send this process a signal in the middle of that step."""
    original = loop.training_step

    def training_step(state, *arguments, **options):
        if state.step == steps - 1:
            os.kill(os.getpid(), number)
        return original(state, *arguments, **options)

    monkeypatch.setattr(loop, "training_step", training_step)


@pytest.fixture
def hang_ups_are_heard():
    """As in a process that was not started by nohup, whatever started the tests."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_lets_the_step_finish_and_saves(number, code, tmp_path, monkeypatch, capsys, hang_ups_are_heard):
    settings = {**killed_run.SETTINGS, "steps": 6, "checkpoint_every": 0}
    straight = train(tiny(out=str(tmp_path / "a"), **settings))
    with monkeypatch.context() as patch:
        signal_after(patch, 4, number)
        patch.setattr("fm_fast.cli.train.config_from", lambda options: tiny(out=str(tmp_path / "b"), **settings))
        before = signal.getsignal(number)
        try:
            assert main(["train", "digits"]) == code
        except SystemExit as ending:
            assert ending.code == code
        assert signal.getsignal(number) is before
    assert "interrupted after step 4; continue with --resume" in capsys.readouterr().out
    assert [file.name for file in (tmp_path / "b").glob("checkpoint*")] == ["checkpoint-00000004.pt"]
    resumed = train(tiny(out=str(tmp_path / "b"), **settings), resuming=True)
    assert_same_values(killed_run.ended_with(straight.state, straight.config), killed_run.ended_with(resumed.state, resumed.config))


def test_a_run_whose_terminal_closes_saves(tmp_path):
    """What it prints from then on has nowhere to go."""
    ours, theirs = pty.openpty()
    command = [sys.executable, str(Path(killed_run.__file__)), str(tmp_path), "--hang-up-after", "4"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=theirs, stderr=theirs)
    os.close(theirs)
    try:
        until = time.monotonic() + DEADLINE
        while last_logged(tmp_path) < 3 and process.poll() is None and time.monotonic() < until:
            if select.select([ours], [], [], 0.05)[0]:
                os.read(ours, 10_000)
        os.close(ours)
        process.communicate(b"\n", timeout=DEADLINE)  # which the run waits for in the middle of the fourth step
    finally:
        process.kill()
    assert process.returncode == 129
    assert RunFolder(tmp_path).checkpoint(4).is_file()


@pytest.fixture
def broken_pipe(monkeypatch):
    """A stdout that nobody reads any more."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        yield
        monkeypatch.undo()


def test_a_run_that_nobody_listens_to_goes_on(broken_pipe, tmp_path):
    """As under ``| head``."""
    settings = {**killed_run.SETTINGS, "steps": 3, "checkpoint_every": 0}
    assert train(tiny(out=str(tmp_path), **settings)).state.step == 3
    assert RunFolder(tmp_path).checkpoint(3).is_file() and last_logged(tmp_path) == 3


def test_ctrl_c_that_ends_the_other_side_of_a_pipe_first(broken_pipe, tmp_path, monkeypatch):
    """As under ``| tee``: the step after which it comes would print its loss before the checkpoint is written."""
    signal_after(monkeypatch, 2, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(tiny(out=str(tmp_path), **{**killed_run.SETTINGS, "steps": 5, "checkpoint_every": 0}))
    assert RunFolder(tmp_path).checkpoint(2).is_file()


def test_under_nohup_a_run_goes_on(tmp_path, monkeypatch):
    settings = {**killed_run.SETTINGS, "steps": 3, "checkpoint_every": 0}
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        signal_after(monkeypatch, 2, signal.SIGHUP)
        assert train(tiny(out=str(tmp_path), **settings)).state.step == 3
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_signals_that_others_handle_stay_theirs(monkeypatch):
    handled = signal.getsignal
    monkeypatch.setattr(signal, "getsignal", lambda number: None if number == signal.SIGTERM else handled(number))
    before, interrupt = handled(signal.SIGTERM), handled(signal.SIGINT)  # which is ignored in jobs that a script put in the background
    with deferred_interrupt():
        assert handled(signal.SIGTERM) is before and handled(signal.SIGINT) is not interrupt
    assert handled(signal.SIGINT) is interrupt
