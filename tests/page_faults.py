"""How many pages of memory the system hands out meanwhile: what is freed to it must be fetched, and set to zero, again."""

import platform

import pytest


def new_pages(compute, times=4):
    """Those of some calls of compute() after the first two, in which glibc's allocator, the one known here, learns what to keep."""
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("the C library is not glibc")
    import resource

    compute(), compute()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        compute()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
