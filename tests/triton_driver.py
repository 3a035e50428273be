"""A make-believe driver for Triton: it compiles kernels as for a GPU where none is."""

import contextlib
import ctypes
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

COMPILER = shutil.which("gcc")
PYTHON_HEADER = Path(sysconfig.get_paths()["include"], "Python.h")
CAN_BUILD = COMPILER is not None and PYTHON_HEADER.is_file()
NEEDED = "Triton's launchers need gcc and Python.h"


@contextlib.contextmanager
def make_believe_driver(folder):
    """The stub of tests/native/driver_stub.c, as Triton's active driver; ``folder`` takes it and the compiled kernels."""
    from triton.backends.nvidia import driver as nvidia
    from triton.runtime import driver as active

    library, source = folder / "libcuda.so.1", Path(__file__).parent / "native" / "driver_stub.c"
    include = f"-I{Path(nvidia.__file__).parent / 'include'}"
    subprocess.run([COMPILER, "-shared", "-fPIC", include, source, "-Wl,-soname,libcuda.so.1", "-o", library], check=True)
    stub = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)  # which later ones of this name then are
    stub.stub_launched.restype = ctypes.c_char_p
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(folder / "cache"))
        patch.setenv("TRITON_LIBCUDA_PATH", str(folder))
        nvidia.libcuda_dirs.cache_clear()
        nvidia.library_dirs.cache_clear()
        patch.setattr(active, "_active", _one_gpu(nvidia))
        yield stub
    nvidia.libcuda_dirs.cache_clear()
    nvidia.library_dirs.cache_clear()


def _one_gpu(nvidia):
    class OneGpu(nvidia.CudaDriver):
        def __init__(self):
            self.utils, self.launcher_cls = nvidia.CudaUtils(), nvidia.CudaLauncher
            self.get_device_capability = lambda device=0: (9, 0)
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device: 0

    return OneGpu()
