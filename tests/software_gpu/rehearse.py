"""Runs a command of this environment with GPUs made of software: ``python tests/software_gpu/rehearse.py pytest -m gpu tests/test_gpu.py``.

Torch must be a CUDA build, and fm_fast installed. What torch, Triton, the CUDA kernels of csrc/cuda and the host's code around them do on a
GPU, they do here: devices, streams, events, graphs, pinned memory and torch's allocator are used as they are there, by torch's own CUDA
code. What a kernel computes, the CPU computes, much more slowly and as late as the program allows:

* runtime.cpp, streams.cpp: CUDA's runtime, whose devices are memory of the process; state.h: the order of work. The driver is that of
  tests/native/driver_stub.c;
* runtime.h: launches of the kernels of csrc/cuda, which tests/native/cuda_emulation.h runs thread by thread;
* torch_ops.py: torch's own ops, by its CPU kernels;
* triton_kernels.py: Triton's kernels, by its interpreter;
* build.py: the libraries, for the torch that is there.

No GPU is needed and none is used. Two rehearsals must not begin at the same time: they build in the same folder.
With SOFTWARE_GPU_ORDER=others-first, streams that wait for others have them finished before their own earlier work.
"""

import os
import subprocess
import sys
from pathlib import Path

from build import HERE, RUNTIME, build

SCRATCH = HERE.parent.parent / "build" / "software_gpu"
PACKAGES = SCRATCH / "packages"
TRIVIAL = "import torch; assert torch.cuda.get_device_name() == 'software GPU'; assert torch.ones(2, device='cuda').sum().item() == 2"


def environment() -> dict[str, str]:
    """Torch finds these libraries before NVIDIA's of the same names, and Python this fm_fast before the installed one."""
    search = os.pathsep.join([str(HERE / "site"), str(PACKAGES), *filter(None, [os.environ.get("PYTHONPATH")])])
    given = {"LD_PRELOAD": str(SCRATCH / RUNTIME), "LD_LIBRARY_PATH": str(SCRATCH), "PYTHONPATH": search, "OMP_NUM_THREADS": "1"}
    return {**os.environ, **given}


def main(command: list[str]) -> None:
    if not command:
        sys.exit(f"usage: {sys.argv[0]} command [argument ...]")
    build(SCRATCH, PACKAGES)
    if subprocess.run([sys.executable, "-c", TRIVIAL], env=environment(), cwd=HERE).returncode:
        sys.exit("the software GPU does not work in this environment")
    beside = Path(sys.executable).parent / command[0]
    program = str(beside) if beside.is_file() else command[0]
    os.execvpe(program, [program, *command[1:]], environment())


if __name__ == "__main__":
    main(sys.argv[1:])
