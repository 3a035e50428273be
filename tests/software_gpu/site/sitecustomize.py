"""Every Python process that has this folder on its path computes kernels of torch and Triton on the software GPU."""

import os
import sys
import traceback
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
sys.path.append(str(Path(__file__).resolve().parent.parent.parent))  # tests/: the package software_gpu, and what tests share

try:
    from software_gpu import torch_ops, triton_kernels

    kept = torch_ops.install()
    triton_kernels.install()
except BaseException:  # which Python would only mention
    traceback.print_exc()
    os._exit(1)
