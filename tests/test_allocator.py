"""Memory that a step frees stays with the process: `fm-fast` tells glibc so, and counts no page twice."""

import os
import platform
import subprocess
import sys

import pytest

from fm_fast.train import allocator

STEPS, MIB = 5, 1 << 20
PAGES = 2 * 40 * MIB // 4096  # of what a step allocates

# Steps that free 80 MiB at their end, and the page faults of those after the first, in which the heap finds its shape.
SCRIPT = f"""
import resource, torch
from fm_fast import cli
from fm_fast.train.allocator import keep_freed_memory

def faults(steps):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(steps):
        kept = [torch.ones(40 * {MIB}, dtype=torch.uint8) for _ in range(2)]
        del kept
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

{{start}}
faults(3)
print(faults({STEPS}))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
@pytest.mark.parametrize(
    ("start", "variables", "repeated"),
    [
        ("", {}, True),
        ("assert keep_freed_memory()", {}, False),
        ("cli.main(['info'])", {}, False),
        ("assert not keep_freed_memory()", {"MALLOC_MMAP_THRESHOLD_": "1000000"}, True),
        ("assert not keep_freed_memory()", {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=1000000"}, True),
    ],
)
def test_later_steps_get_the_memory_of_the_first_back(start, variables, repeated):
    """A user's own setting, by either way of glibc, stays in force."""
    script = [sys.executable, "-c", SCRIPT.format(start=start)]
    run = subprocess.run(script, env=os.environ | variables, capture_output=True, text=True, check=True)
    found = int(run.stdout.split()[-1])
    assert found >= STEPS * PAGES if repeated else found < PAGES / 10


@pytest.mark.parametrize("library", [None, object()])
def test_other_c_libraries_are_left_alone(monkeypatch, library):
    monkeypatch.setattr(allocator, "_symbols", lambda: library)
    assert not allocator.keep_freed_memory()
