"""Computations on a number of threads of their own, whatever the test run has."""

import contextlib

import torch


@contextlib.contextmanager
def threads(count):
    """That many threads meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def on_thread_counts(compute):
    """What compute() returns on one thread, on two and on three."""
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(compute())
    return results
