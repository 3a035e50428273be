"""How many pages of memory the system hands out meanwhile: what is freed to it must be fetched, and set to zero, again."""

import pytest


def new_pages(compute, times=4):
    """Those of some calls of compute() after the first two, in which an allocator learns what to keep."""
    resource = pytest.importorskip("resource")
    compute(), compute()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        compute()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
