"""fm_fast: fused kernels for flow matching under a thin PyTorch API. Importing builds, downloads and prints nothing."""

import pathlib
import pkgutil

# A checkout in the working directory shadows the installed package, which alone holds the kernels and the native library; and
# in an uninstalled checkout the kernels lie beside this folder.
__path__ = pkgutil.extend_path(__path__, __name__)
_here = pathlib.Path(__file__).parent
if not any((pathlib.Path(entry) / "kernels").is_dir() for entry in __path__):
    __path__.append(str(_here.parent))

from fm_fast import objectives, paths, random, time_samplers  # noqa: E402
from fm_fast._backends import info  # noqa: E402
from fm_fast._version import __version__  # noqa: E402
from fm_fast.loss import FlowMatchingLoss, PathSample, flow_matching_loss, sample_path  # noqa: E402
from fm_fast.paths import OT, VE, VP, Cosine  # noqa: E402
from fm_fast.random import noise  # noqa: E402
from fm_fast.time_samplers import LogitNormal, Stratified, Uniform  # noqa: E402

__all__ = [
    "OT",
    "VE",
    "VP",
    "Cosine",
    "FlowMatchingLoss",
    "LogitNormal",
    "PathSample",
    "Stratified",
    "Uniform",
    "__version__",
    "flow_matching_loss",
    "info",
    "noise",
    "objectives",
    "paths",
    "random",
    "sample_path",
    "time_samplers",
]
