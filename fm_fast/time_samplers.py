"""How training times are drawn: frozen value objects whose raw values in (0, 1] are spread over the path's own range."""

import math
from dataclasses import dataclass
from typing import ClassVar, get_args

from fm_fast import _checks


@dataclass(frozen=True)
class Uniform:
    """t ~ U(t_min, t_max), independently for every sample (equation 5)."""

    code: ClassVar[int] = 0
    mean: ClassVar[float] = 0.0
    std: ClassVar[float] = 1.0


@dataclass(frozen=True)
class Stratified:
    """Uniform times on an integer lattice with a random offset a step: any run of consecutive sample ids is well spread."""

    code: ClassVar[int] = 1
    mean: ClassVar[float] = 0.0
    std: ClassVar[float] = 1.0


@dataclass(frozen=True)
class LogitNormal:
    """t = 1 / (1 + exp(-(mean + std z))), z normal: more training at middle times."""

    mean: float = 0.0
    std: float = 1.0
    code: ClassVar[int] = 2

    def __post_init__(self) -> None:
        _checks.number("mean", self.mean)
        _checks.number("std", self.std)
        if not math.isfinite(self.mean):
            raise ValueError(f"mean must be finite, got {self.mean}")
        if not 0.0 < self.std < math.inf:
            raise ValueError(f"std must be positive and finite, got {self.std}")


TimeSampler = Uniform | Stratified | LogitNormal
NAMED: dict[str, TimeSampler] = {"uniform": Uniform(), "stratified": Stratified(), "logit-normal": LogitNormal()}


def as_time_sampler(t_sampler: str | TimeSampler) -> TimeSampler:
    """The sampler of that name; anything else is an error that lists the names."""
    if type(t_sampler) in get_args(TimeSampler):
        return t_sampler  # type: ignore[return-value]
    if not isinstance(t_sampler, str) or t_sampler not in NAMED:
        raise ValueError(f"t_sampler must be one of {', '.join(NAMED)} or a time sampler object, got {t_sampler!r}")
    return NAMED[t_sampler]
