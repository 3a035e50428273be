"""What every test file may use: the backends of this machine, and outputs poisoned before a kernel writes them."""

import pytest
import torch

from fm_fast import _backends

CPU_BACKENDS = [name for name in ("reference", "cpp") if _backends.why_not("path_sample", "cpu", name) is None]


@pytest.fixture(params=CPU_BACKENDS)
def backend(request):
    """Each backend that can run on the CPU here."""
    return request.param


@pytest.fixture
def poisoned_outputs():
    """Let torch fill new memory with NaN (its deterministic mode does), so that an output which a kernel does not write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def one_thread():
    """For many operations on small tensors, which threads only make slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
