"""fm_fast: fused kernels for flow matching under a thin PyTorch API. Importing builds, downloads and prints nothing."""

import pathlib
import pkgutil

# A checkout in the working directory shadows the installed package. Its own kernels lie beside this folder; the native library lies
# in the installed package, further along the search path.
if not (pathlib.Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(pathlib.Path(__file__).parent.parent))
__path__ = pkgutil.extend_path(__path__, __name__)

from fm_fast import objectives, paths, random, time_samplers
from fm_fast._backends import info
from fm_fast._version import __version__
from fm_fast.loss import FlowMatchingLoss, PathSample, flow_matching_loss, sample_path
from fm_fast.paths import OT, VE, VP, Cosine
from fm_fast.random import noise
from fm_fast.time_samplers import LogitNormal, Stratified, Uniform

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
