"""What every test file may use: the backends of this machine, and outputs poisoned before a kernel writes them."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores: several teams of threads on them wait for each other, ten times as long as they compute.
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from thread_counts import threads

from fm_fast import _backends

IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ
if IS_WORKER:
    torch.set_num_threads(1)  # a plugin of pytest's that imports torch has done so before the variable was set

CPU_BACKENDS = [name for name in ("reference", "cpp") if _backends.why_not("path_sample", "cpu", name) is None]


@pytest.fixture(params=CPU_BACKENDS)
def backend(request):
    """Each backend that can run on the CPU here."""
    return request.param


@pytest.fixture(autouse=True)
def working_gpu(request):
    """A GPU does not recover from an illegal access in this process: one of several ends, and the others' tests are not lost with it."""
    yield
    if request.node.get_closest_marker("gpu") is None:
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        if IS_WORKER:
            print(error, flush=True)
            os._exit(1)
        raise


@pytest.fixture
def poisoned_outputs():
    """Let torch fill new memory with NaN (its deterministic mode does), so that an output which a kernel does not write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def one_thread():
    """For many operations on small tensors, which threads only make slower on a busy machine."""
    with threads(1):
        yield
