"""What one call draws and trains on, as a value that the public functions pass down to the ops."""

import itertools
from dataclasses import dataclass

from fm_fast import paths, time_samplers
from fm_fast._codes import ObjectiveCode, PathCode
from fm_fast.objectives import OBJECTIVES, Objective, as_objective, is_built_in, time_range
from fm_fast.paths import Path, as_path, kernel_form
from fm_fast.time_samplers import TimeSampler, as_time_sampler

DATA_AS_IS = (0.0, 256, False)  # flip, levels, dequantise
GIVEN = (PathCode.given.value, 0.0, 0.0)


@dataclass(frozen=True)
class PathSpec:
    """A path, an objective and the data map of one call; every field is checked when it is made by :func:`path_spec`."""

    path: Path
    objective: Objective
    t_sampler: TimeSampler
    t_range: tuple[float, float]
    flip: float = 0.0
    levels: int = 256
    dequantise: bool = False
    # (path code, a, b) and objective code by which kernels evaluate the coefficients
    kernel_path: tuple[int, float, float] = GIVEN
    kernel_objective: int = 0

    @property
    def data_map(self) -> tuple[float, int, bool]:
        return self.flip, self.levels, self.dequantise

    @property
    def known_to_kernels(self) -> bool:
        """Whether they can; else only Python knows the path or the objective."""
        return self.kernel_path[0] != PathCode.given


def path_spec(
    path: str | Path, objective: str | Objective, t_sampler: str | TimeSampler, flip: float, levels: int, dequantise: bool
) -> PathSpec:
    """The spec of a call's arguments, names resolved; unknown names and values out of range are errors."""
    if isinstance(path, str) and isinstance(objective, str) and isinstance(t_sampler, str) and (flip, levels, dequantise) == DATA_AS_IS:
        ready = _NAMED.get((path, objective, t_sampler))
        if ready is not None:
            return ready
    return _make_spec(path, objective, t_sampler, flip, levels, dequantise)


def _make_spec(
    path: str | Path, objective: str | Objective, t_sampler: str | TimeSampler, flip: float, levels: int, dequantise: bool
) -> PathSpec:
    chosen_path, chosen_objective = as_path(path), as_objective(objective)
    limits, sampler = time_range(chosen_path, chosen_objective), as_time_sampler(t_sampler)
    data_map = (float(flip), int(levels), bool(dequantise))
    if not is_built_in(chosen_objective):
        return PathSpec(chosen_path, chosen_objective, sampler, limits, *data_map)
    code = ObjectiveCode[chosen_objective.name].value
    return PathSpec(chosen_path, chosen_objective, sampler, limits, *data_map, kernel_form(chosen_path), code)


# Made once, because small training steps feel the microseconds.
_NAMED = {names: _make_spec(*names, *DATA_AS_IS) for names in itertools.product(paths.NAMED, OBJECTIVES, time_samplers.NAMED)}
