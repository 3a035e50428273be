"""Ctrl-C, SIGTERM and SIGHUP between steps instead of within one, where weights, moments and average would disagree."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

OUTPUTS = (1, 2)  # descriptors of stdout and stderr


def stop(number: int) -> None:
    """End the run for that signal: KeyboardInterrupt for Ctrl-C, else SystemExit(128 + number), as shells report it: SIGTERM's is 143."""
    raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], int]]:
    """Yields a function that tells which signal asked the run to stop, 0 for none; the second one stops it at once.

    Outside the main thread, where Python delivers no signals, it always tells 0.
    """
    asked = [0]
    terminals = [output for output in OUTPUTS if os.isatty(output)]

    def note(number: int, frame: FrameType | None) -> None:
        if asked[0]:
            stop(number)
        asked[0] = number
        _leave(terminals)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    previous = {number: signal.signal(number, note) for number in _signals()}
    try:
        yield lambda: asked[0]
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _signals() -> list[int]:
    """SIGHUP comes when a terminal closes, where the platform has it; a run under nohup was told to ignore it.

    Not those that a program in which Python is embedded handles, whose handlers Python could not give back.
    """
    hang_up: int | None = getattr(signal, "SIGHUP", None)
    heeded = [] if hang_up is None or signal.getsignal(hang_up) == signal.SIG_IGN else [hang_up]
    return [number for number in (signal.SIGINT, signal.SIGTERM, *heeded) if signal.getsignal(number) is not None]


def _leave(terminals: list[int]) -> None:
    """What is printed to a terminal that has closed would be an error, before the checkpoint is written."""
    say_nothing_more([output for output in terminals if not os.isatty(output)])


def say_nothing_more(outputs: list[int]) -> None:
    """What is written to these descriptors from now on is lost."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for output in outputs:
        os.dup2(nowhere, output)
    os.close(nowhere)
