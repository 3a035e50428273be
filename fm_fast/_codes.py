"""The numbers by which the kernels of every backend know paths, objectives and time samplers; csrc/path.h has the same."""

from enum import IntEnum


class PathCode(IntEnum):
    """given: only Python knows the path or the objective, and the op is handed coefficients."""

    given = -1
    ot = 0
    vp = 1
    ve = 2
    cosine = 3


class ObjectiveCode(IntEnum):
    velocity = 0
    noise = 1
    score = 2
    scoreflow = 3
    data = 4


class TimeCode(IntEnum):
    """given: the op clamps the times that it is handed, and draws none."""

    given = -1
    uniform = 0
    stratified = 1
    logit_normal = 2
