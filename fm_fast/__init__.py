"""fm_fast: fused kernels for flow matching under a thin PyTorch API. Importing builds, downloads and prints nothing."""

import importlib
import pathlib
import pkgutil
from types import ModuleType

# A checkout in the working directory shadows the installed package. Its own kernels lie beside this folder; the native library lies
# in the installed package, further along the search path.
if not (pathlib.Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(pathlib.Path(__file__).parent.parent))
__path__ = pkgutil.extend_path(__path__, __name__)

from fm_fast import couplings, grids, objectives, paths, random, solvers, testing, time_samplers
from fm_fast._backends import info
from fm_fast._version import __version__
from fm_fast.bits import BitsPerDim, bits_per_dim
from fm_fast.conversions import convert
from fm_fast.likelihood import Divergence, Likelihood, SampleWithLogProb, divergence, log_likelihood, sample_with_log_prob
from fm_fast.loss import PathSample, flow_matching_loss, sample_path
from fm_fast.loss_module import FlowMatchingLoss
from fm_fast.paths import OT, VE, VP, Cosine
from fm_fast.random import noise
from fm_fast.sampling import Guidance, Sample, encode, sample
from fm_fast.time_samplers import LogitNormal, Stratified, Uniform

__all__ = [
    "OT",
    "VE",
    "VP",
    "BitsPerDim",
    "Cosine",
    "Divergence",
    "FlowMatchingLoss",
    "Guidance",
    "Likelihood",
    "LogitNormal",
    "PathSample",
    "Sample",
    "SampleWithLogProb",
    "Stratified",
    "Uniform",
    "__version__",
    "bits_per_dim",
    "convert",
    "couplings",
    "divergence",
    "encode",
    "flow_matching_loss",
    "grids",
    "info",
    "log_likelihood",
    "noise",
    "objectives",
    "paths",
    "random",
    "sample",
    "sample_path",
    "sample_with_log_prob",
    "solvers",
    "testing",
    "time_samplers",
]


def __getattr__(name: str) -> ModuleType:
    """The networks, the trainer and other libraries' calls, which are imported only where they are used."""
    if name in ("compat", "nn", "train"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
