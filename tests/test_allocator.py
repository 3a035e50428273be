"""Memory that a step frees stays with the process, so that later steps fault no page in again."""

import os
import platform
import resource
import subprocess
import sys

import pytest

from fm_fast.train.execution import allocator

STEPS, BLOCK = 5, 40 << 20

# Steps that free two blocks at their end, and the page faults of those after the first, in which the heap finds its shape.
SCRIPT = f"""
import resource, torch
from fm_fast.train.execution.allocator import keep_freed_memory

def faults(steps):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(steps):
        kept = [torch.ones({BLOCK}, dtype=torch.uint8) for _ in range(2)]
        del kept
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print({{call}})
faults(3)
print(faults({STEPS}))
"""


def faults(call, **variables):
    """(what the call gave, page faults) in a process without settings of the user's but these."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    script = [sys.executable, "-c", SCRIPT.format(call=call)]
    run = subprocess.run(script, env=environment | variables, capture_output=True, text=True, check=True)
    given, found = run.stdout.split()[-2:]
    return given, int(found)


@pytest.fixture(scope="module")
def usual():
    """The page faults of glibc by itself: every page of every step, where the system's pages are small."""
    found = faults("None")[1]
    if found < STEPS * BLOCK // resource.getpagesize():
        pytest.skip("this system's allocator or large pages keep the memory anyway")
    return found


needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")


@needs_glibc
def test_later_steps_get_the_memory_of_the_first_back(usual):
    given, found = faults("keep_freed_memory()")
    assert given == "True" and found < usual / 10


@needs_glibc
@pytest.mark.parametrize(
    "variables",
    [
        *({name: "1000000"} for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")),
        {"MALLOC_MMAP_MAX_": "1000"},
        {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=1000000"},
    ],
    ids=lambda variables: next(iter(variables)),
)
def test_what_a_user_has_set_stays_in_force(usual, variables):
    given, found = faults("keep_freed_memory()", **variables)
    assert given == "False" and found > usual / 10


@pytest.mark.parametrize("library", [None, object()])
def test_other_c_libraries_are_left_alone(monkeypatch, library):
    monkeypatch.setattr(allocator, "_symbols", lambda: library)
    assert not allocator.keep_freed_memory()
