"""Freed memory stays with the process, because the next step asks for it again.

By itself glibc returns what is free at the end of its heap to the system once that is more than 64 MiB, and takes every block above
32 MiB from the system alone. On a CPU all that a step has kept for its gradient is freed at its end, so each step would be handed the
same memory anew, page by page and zeroed: a tenth of the time of a small U-Net's step.
"""

import ctypes
import os

# Parameters of mallopt, as malloc.h numbers them.
TRIM_THRESHOLD, MMAP_MAX = -1, -4
NO_LIMIT = -1


def keep_freed_memory() -> bool:
    """Tell the C library's allocator that what this thread frees is kept until the process ends; whether it is.

    False, and nothing is changed, where the user has set MALLOC_TRIM_THRESHOLD_, MALLOC_MMAP_THRESHOLD_, MALLOC_MMAP_MAX_ or a
    ``glibc.malloc`` tunable, and where the C library is another one. Call it once the data are in place, or what loading them took is
    kept, too. Large blocks share the heap with small ones then, which may take a few per cent more memory at the peak.
    """
    if _decided_by_user():
        return False
    mallopt = getattr(_symbols(), "mallopt", None)
    return mallopt is not None and all([mallopt(TRIM_THRESHOLD, NO_LIMIT), mallopt(MMAP_MAX, 0)])


def _decided_by_user() -> bool:
    """By glibc's own settings of the same things."""
    thresholds = "MALLOC_TRIM_THRESHOLD_" in os.environ or "MALLOC_MMAP_THRESHOLD_" in os.environ
    return thresholds or "MALLOC_MMAP_MAX_" in os.environ or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")


def _symbols() -> ctypes.CDLL | None:
    """All that the process has loaded; None where there is no such thing, as on Windows."""
    try:
        return ctypes.CDLL(None)
    except (OSError, TypeError):
        return None
