"""``CondOTProbPath`` and ``AffineProbPath``, ``ProbPath``, their base, and the ``PathSample`` that they give."""

from fm_fast.compat.flow_matching.path import scheduler
from fm_fast.compat.flow_matching.path.affine import AffineProbPath, CondOTProbPath
from fm_fast.compat.flow_matching.path.path import ProbPath
from fm_fast.compat.flow_matching.path.path_sample import PathSample

__all__ = ["AffineProbPath", "CondOTProbPath", "PathSample", "ProbPath", "scheduler"]
