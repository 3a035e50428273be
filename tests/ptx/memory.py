"""Memory of a device: the tensors that a launch is given, nothing beside them; and the shared memory of blocks."""

import ctypes

import numpy as np

from ptx.values import UNSIGNED

ALIGNMENT = 16


class Fault(Exception):
    """What would be an error, or a wrong result, on a device."""


class GlobalMemory:
    """The bytes that tensors span. Accesses beside them, or not on the boundary of their size, are faults."""

    def __init__(self, spans):
        merged = []
        for begin, end in sorted(spans):
            if merged and begin <= merged[-1][1]:
                merged[-1][1] = max(end, merged[-1][1])
            else:
                merged.append([begin, end])
        self._begins, self._ends = (np.array([span[i] for span in merged], np.uint64) for i in (0, 1))

    def load(self, addresses, size, count):
        """count values of size bytes at each address [threads]: unsigned [count, threads]."""
        found = np.zeros((count, len(addresses)), UNSIGNED[size])
        for threads, view, places in self._places(addresses, size, count):
            for i in range(count):
                found[i, threads] = view[places + i]
        return found

    def store(self, addresses, values):
        size, count = values.dtype.itemsize, len(values)
        for threads, view, places in self._places(addresses, size, count):
            for i in range(count):
                view[places + i] = values[i, threads]

    def add(self, addresses, values):
        """Atomically, thread after thread: what was there before each."""
        found = np.zeros_like(values)
        for threads, view, places in self._places(addresses, values.dtype.itemsize, 1):
            for thread, place in zip(threads, places, strict=True):
                found[thread] = view[place]
                view[place] += values[thread]
        return found

    def _places(self, addresses, size, count):
        """For each span: the threads that go there, its memory as numbers of that size, and their places in it."""
        _check_boundary(addresses, size * count)
        span = np.searchsorted(self._begins, addresses, side="right").astype(np.int64) - 1
        outside = (span < 0) | (addresses + np.uint64(size * count) > self._ends[np.maximum(span, 0)])
        if outside.any():
            raise Fault(f"an access of {size * count} bytes outside of all tensors, by {int(outside.sum())} threads")
        for number in np.unique(span):
            base = int(self._begins[number]) // ALIGNMENT * ALIGNMENT
            length = (int(self._ends[number]) - base + size - 1) // size
            view = np.ctypeslib.as_array((ctypes.c_uint8 * (length * size)).from_address(base)).view(UNSIGNED[size])
            threads = np.nonzero(span == number)[0]
            yield threads, view, ((addresses[threads] - np.uint64(base)) // np.uint64(size)).astype(np.int64)


class SharedMemory:
    """Of some blocks, filled with what is no small number."""

    def __init__(self, blocks, size):
        self._bytes = np.full((blocks, size), 0xA5, np.uint8)

    def load(self, blocks, addresses, size, count):
        columns = self._columns(addresses, size * count)
        return np.ascontiguousarray(self._bytes[blocks[:, None], columns]).view(UNSIGNED[size]).T

    def store(self, blocks, addresses, values):
        columns = self._columns(addresses, values.dtype.itemsize * len(values))
        self._bytes[blocks[:, None], columns] = np.ascontiguousarray(values.T).view(np.uint8)

    def _columns(self, addresses, length):
        _check_boundary(addresses, length)
        places = addresses.astype(np.int64)
        if (places < 0).any() or (places + length > self._bytes.shape[1]).any():
            raise Fault(f"an access of {length} bytes outside of shared memory")
        return places[:, None] + np.arange(length)[None, :]


def _check_boundary(addresses, length):
    if (addresses % np.uint64(length)).any():
        raise Fault(f"an access of {length} bytes off their boundary")
