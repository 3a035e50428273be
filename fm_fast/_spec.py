"""What one call draws and trains on, as a value that the public functions pass down to the ops."""

from dataclasses import dataclass

from fm_fast.objectives import Objective, as_objective, is_built_in, time_range
from fm_fast.paths import Path, as_path, kernel_form
from fm_fast.time_samplers import TimeSampler, as_time_sampler


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

    @property
    def kernel_path(self) -> tuple[int, float, float]:
        """(path code, a, b) by which kernels evaluate the coefficients; code -1 where only Python knows the path or objective."""
        return kernel_form(self.path) if is_built_in(self.objective) else (-1, 0.0, 0.0)


def path_spec(
    path: str | Path, objective: str | Objective, t_sampler: str | TimeSampler, flip: float, levels: int, dequantise: bool
) -> PathSpec:
    """The spec of a call's arguments, names resolved; unknown names and values out of range are errors."""
    chosen_path, chosen_objective = as_path(path), as_objective(objective)
    limits = time_range(chosen_path, chosen_objective)
    return PathSpec(chosen_path, chosen_objective, as_time_sampler(t_sampler), limits, float(flip), levels, bool(dequantise))
