"""A make-believe driver for Triton: it compiles kernels as for a GPU where none is."""

import atexit
import contextlib
import ctypes
import functools
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

import pytest

COMPILER = shutil.which("gcc")
PYTHON_HEADER = Path(sysconfig.get_paths()["include"], "Python.h")
CAN_BUILD = COMPILER is not None and PYTHON_HEADER.is_file()
NEEDED = "Triton's launchers need gcc and Python.h"


@contextlib.contextmanager
def make_believe_driver(folder, capability=(9, 0)):
    """The stub of tests/native/driver_stub.c, as Triton's active driver; ``folder`` takes what is compiled for GPUs of that capability."""
    from triton.backends.nvidia import driver as nvidia
    from triton.runtime import driver as active

    stub = _stub()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(folder / "cache"))
        patch.setenv("TRITON_LIBCUDA_PATH", str(Path(stub._name).parent))
        nvidia.libcuda_dirs.cache_clear()
        nvidia.library_dirs.cache_clear()
        patch.setattr(active, "_active", _one_gpu(nvidia, capability))
        yield stub
    nvidia.libcuda_dirs.cache_clear()
    nvidia.library_dirs.cache_clear()


@functools.cache
def _stub():
    """One a process: whoever asks for a library of its name gets the first."""
    from triton.backends.nvidia import driver as nvidia

    folder, source = Path(tempfile.mkdtemp()), Path(__file__).parent / "native" / "driver_stub.c"
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    library, include = folder / "libcuda.so.1", f"-I{Path(nvidia.__file__).parent / 'include'}"
    subprocess.run([COMPILER, "-shared", "-fPIC", include, source, "-Wl,-soname,libcuda.so.1", "-o", library], check=True)
    stub = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    stub.stub_launched.restype = ctypes.c_char_p
    return stub


def _one_gpu(nvidia, capability):
    class OneGpu(nvidia.CudaDriver):
        def __init__(self):
            self.utils, self.launcher_cls = nvidia.CudaUtils(), nvidia.CudaLauncher
            self.get_device_capability = lambda device=0: capability
            self.get_current_device = lambda: capability[0]  # Triton keeps what it has compiled by this number
            self.get_current_stream = lambda device: 0

    return OneGpu()
