"""How training times are drawn: frozen value objects whose raw values in (0, 1] are spread over the path's own range."""

from dataclasses import dataclass
from typing import ClassVar, get_args

from fm_fast import _checks
from fm_fast._codes import TimeCode


@dataclass(frozen=True)
class Uniform:
    """t ~ U(t_min, t_max), independently for every sample (equation 5)."""

    code: ClassVar[int] = TimeCode.uniform.value
    mean: ClassVar[float] = 0.0
    std: ClassVar[float] = 1.0


@dataclass(frozen=True)
class Stratified:
    """Uniform times on an integer lattice with a random offset a step: any run of consecutive sample ids is well spread.

    Not in the paper; the noise contract (``fm_fast/random.py``) defines it.
    """

    code: ClassVar[int] = TimeCode.stratified.value
    mean: ClassVar[float] = 0.0
    std: ClassVar[float] = 1.0


@dataclass(frozen=True)
class LogitNormal:
    """t = 1 / (1 + exp(-(mean + std z))), z normal: more training at middle times (Esser et al., 2024)."""

    mean: float = 0.0
    std: float = 1.0
    code: ClassVar[int] = TimeCode.logit_normal.value

    def __post_init__(self) -> None:
        _checks.finite_number("mean", self.mean)
        _checks.positive_number("std", self.std)


TimeSampler = Uniform | Stratified | LogitNormal
NAMED: dict[str, TimeSampler] = {"uniform": Uniform(), "stratified": Stratified(), "logit-normal": LogitNormal()}


def as_time_sampler(t_sampler: str | TimeSampler) -> TimeSampler:
    """The sampler of that name; anything else is an error that lists the names."""
    if type(t_sampler) in get_args(TimeSampler):
        return t_sampler  # type: ignore[return-value]
    if not isinstance(t_sampler, str) or t_sampler not in NAMED:
        kinds = ", ".join(kind.__name__ for kind in get_args(TimeSampler))
        raise ValueError(f"t_sampler must be one of {', '.join(NAMED)}, or a {kinds}; give other times as t=, got {t_sampler!r}")
    return NAMED[t_sampler]
