"""Where ported code looks for names: each that compat offers lies where it lies in the original, whose prefix alone is replaced."""

import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest
from copies import run_python

import fm_fast as fm

COMPAT = "fm_fast.compat."
LIBRARIES = ["flow_matching", "torchcfm"]
ROOT = Path(__file__).resolve().parents[1]
# A few of them as programs write them, for where the originals are not installed.
IMPORTS = [
    "from fm_fast.compat.flow_matching.solver import ODESolver, Solver",
    "from fm_fast.compat.flow_matching.solver.ode_solver import ODESolver",
    "from fm_fast.compat.flow_matching.solver.solver import Solver",
    "from fm_fast.compat.flow_matching.path import AffineProbPath, CondOTProbPath, PathSample, ProbPath",
    "from fm_fast.compat.flow_matching.path.affine import AffineProbPath, CondOTProbPath",
    "from fm_fast.compat.flow_matching.path.path import ProbPath",
    "from fm_fast.compat.flow_matching.path.path_sample import PathSample",
    "from fm_fast.compat.flow_matching.path.scheduler import CondOTScheduler, SchedulerOutput, VPScheduler",
    "from fm_fast.compat.flow_matching.path.scheduler import ConvexScheduler, ScheduleTransformedModel, Scheduler",
    "from fm_fast.compat.flow_matching.path.scheduler.scheduler import CondOTScheduler, ConvexScheduler, Scheduler",
    "from fm_fast.compat.flow_matching.path.scheduler.schedule_transform import ScheduleTransformedModel",
    "from fm_fast.compat.flow_matching.utils import ModelWrapper, expand_tensor_like",
    "from fm_fast.compat.flow_matching.utils.model_wrapper import ModelWrapper",
    "from fm_fast.compat.flow_matching.utils.utils import expand_tensor_like, gradient, unsqueeze_to_match",
    "from fm_fast.compat.torchcfm.conditional_flow_matching import *; TargetConditionalFlowMatcher, pad_t_like_x, OTPlanSampler",
    "from fm_fast.compat.torchcfm import ConditionalFlowMatcher, OTPlanSampler",
    "from fm_fast.compat.torchcfm.optimal_transport import OTPlanSampler, wasserstein",
    "from fm_fast.compat.torchcfm.utils import torch_wrapper",
    "from fm_fast.compat.torchdiffeq import odeint, odeint_adjoint",
    "from fm_fast.compat.transport import ModelType, PathType, Sampler, Transport, WeightType, create_transport",
    "from fm_fast.compat.transport.transport import ModelType, PathType, Sampler, Transport, WeightType",
    "from fm_fast.compat.transport.path import GVPCPlan, ICPlan, VPCPlan, expand_t_like_x",
]


@pytest.mark.parametrize("line", IMPORTS)
def test_imports_of_ported_programs(line):
    exec(line, {})


def modules(package):
    """All that can be imported here."""
    top = importlib.import_module(package)
    found = [package, *(module.name for module in pkgutil.walk_packages(top.__path__, f"{package}."))]
    return [module for module in map(imported, found) if module is not None]


def imported(name):
    try:
        return importlib.import_module(name)
    except ImportError:
        return None  # a module that wants a package which is not here


def offered(package):
    """The public names of a compat package."""
    return {name for module in modules(package) for name in getattr(module, "__all__", ()) if not inspect.ismodule(getattr(module, name))}


def shown(module):
    """The classes and functions that a program would import from a module."""
    own = {name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__}
    package = {name for name, value in vars(module).items() if inspect.isclass(value) or inspect.isfunction(value)}
    return own | (package if hasattr(module, "__path__") else set())


@pytest.mark.parametrize("library", LIBRARIES)
def test_every_name_lies_where_it_does_in_the_original(library):
    pytest.importorskip(library, exc_type=ImportError)
    names, found = offered(COMPAT + library), []
    for module in modules(library):
        for name in shown(module) & names:
            twin = imported(COMPAT + module.__name__)
            assert hasattr(twin, name), f"{module.__name__} has {name}, {COMPAT + module.__name__} has not"
            found.append(name)
    assert set(found) >= names - {"torch_wrapper"}, "the original has all these names"


@pytest.mark.parametrize("library", [*LIBRARIES, "transport"])
def test_every_package_is_installed(library):
    listed = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    packages = [module.__name__ for module in modules(COMPAT + library) if hasattr(module, "__path__")]
    assert packages and all(f'"{package}"' in listed for package in packages)


def test_compat_is_imported_where_it_is_used():
    code = """
import sys
import fm_fast as fm
assert not any(name.startswith("fm_fast.compat") for name in sys.modules)
assert fm.compat.torchdiffeq.odeint and fm.compat.torchcfm.ConditionalFlowMatcher and fm.compat.flow_matching.path.scheduler.VPScheduler
assert fm.compat.flow_matching.solver.ODESolver and fm.compat.torchcfm.optimal_transport.OTPlanSampler
assert fm.compat.transport.create_transport
assert not {"torchcfm", "flow_matching", "torchdiffeq", "ot"} & set(sys.modules)
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert fm.compat is importlib.import_module("fm_fast.compat")
