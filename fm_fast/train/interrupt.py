"""Ctrl-C and SIGTERM between steps instead of within one, where weights, moments and average would disagree."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


def stop(number: int) -> None:
    """End the run for that signal: KeyboardInterrupt for Ctrl-C, SystemExit(143) for SIGTERM (128 + 15, as shells report it)."""
    raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], int]]:
    """Yields a function that tells which signal asked the run to stop, 0 for none; the second one stops it at once.

    Outside the main thread, where Python delivers no signals, it always tells 0.
    """
    asked = [0]

    def note(number: int, frame: FrameType | None) -> None:
        if asked[0]:
            stop(number)
        asked[0] = number

    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked[0]
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
