"""Figure 6 and the left of Figure 7 on exact flows of small images: when the noise goes, and the midpoint rule's error against NFE.

The paper draws them for networks trained on ImageNet. Here the velocity is the exact marginal field (equation 8) of a mixture of 256
images of 8x8 pixels, so that the paths are compared and nothing else.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from fm_fast import sampling
from fm_fast._fields import require
from fm_fast.random import noise
from fm_fast.reproduce.mixture import FastMixture, image_mixture
from fm_fast.reproduce.results import Parts, rounded, summary, write_json
from fm_fast.reproduce.threads import one_thread

PATHS = {"FM w/ OT": "ot", "FM w/ Diffusion": "vp"}
SAMPLES = 256
REFERENCE_STEPS = 500
LARGEST_NFE = 100
# Twice those of the finest solve that the reference judges, so that the reference's own error is about a fourth of that one's.
FEWEST_REFERENCE_STEPS = LARGEST_NFE
COUNTS = (*range(4, 40, 2), *range(40, LARGEST_NFE + 1, 4))
TIMES = tuple(number / 20 for number in range(20))
PICTURES = 3
PICTURE_TIMES = (0.0, 0.25, 0.5, 0.7, 0.8, 0.9)
TOLERANCES = (1e-3, 1e-5)


@dataclass(frozen=True)
class PathResult:
    """One path on one data set.

    nfe, mse: of the midpoint rule, mean squared error a pixel against the reference solution of the same noise; the mean has steps, where
    a sample that ended at another image first ends at the right one. median_mse: the same for the median sample. times, residual:
    E|x_t - x_1|^2 / E|x_0 - x_1|^2 along the flow. straightness: E|(x_1 - x_0) - v_t|^2 a dimension, 0 for straight lines.
    adaptive_nfe: of dopri5, at each of TOLERANCES. pictures: some samples at PICTURE_TIMES and at the end, [samples][times][64].
    """

    draw: int
    path: str
    nfe: tuple[int, ...]
    mse: tuple[float, ...]
    median_mse: tuple[float, ...]
    times: tuple[float, ...]
    residual: tuple[float, ...]
    straightness: float
    adaptive_nfe: tuple[int, ...]
    pictures: tuple[tuple[tuple[float, ...], ...], ...]

    def nfe_for(self, error: float) -> int | None:
        """The fewest evaluations from which on every midpoint solve stays at or below this error; None if none does."""
        enough = None
        for count, mse in zip(reversed(self.nfe), reversed(self.mse), strict=True):
            if mse > error:
                break
            enough = count
        return enough


def path_result(
    draw: int, path: str, seed: int, reference_steps: int = REFERENCE_STEPS, samples: int = SAMPLES, counts: Sequence[int] = COUNTS
) -> PathResult:
    """Solve the exact flow from the same noise in every way; counts: NFE of the midpoint solves."""
    with one_thread():
        return _path_result(draw, path, seed, reference_steps, samples, tuple(counts))


def _path_result(draw: int, path: str, seed: int, reference_steps: int, samples: int, counts: tuple[int, ...]) -> PathResult:
    field = image_mixture(draw, path)
    x0 = noise((samples, field.dimension), seed=seed, step=0, dtype=torch.float64)
    wanted = sorted({*TIMES, *PICTURE_TIMES})
    solved = sampling.sample(field, x0, path=path, steps=reference_steps, save=wanted)
    assert solved.saved is not None
    states = dict(zip(wanted, solved.saved, strict=True))
    errors = [_errors(field, x0, path, solved.x, count) for count in counts]
    mean, median = tuple(float(error.mean()) for error in errors), tuple(float(error.median()) for error in errors)
    return PathResult(
        draw, path, counts, mean, median, TIMES, _residuals(states, solved.x), _straightness(field, states, x0, solved.x),
        _adaptive_nfe(field, x0, path), _pictures(states, solved.x),
    )  # fmt: skip


def _errors(field: FastMixture, x0: Tensor, path: str, reference: Tensor, count: int) -> Tensor:
    """Mean squared error a pixel of each sample, [B]."""
    return (sampling.sample(field, x0, path=path, method="midpoint", steps=count // 2).x - reference).square().mean(1)


def _residuals(states: dict[float, Tensor], end: Tensor) -> tuple[float, ...]:
    whole = (states[0.0] - end).square().mean()
    return tuple(float((states[t] - end).square().mean() / whole) for t in TIMES)


def _straightness(field: FastMixture, states: dict[float, Tensor], x0: Tensor, end: Tensor) -> float:
    return float(torch.stack([(end - x0 - field(states[t], t)).square().mean() for t in TIMES]).mean())


def _adaptive_nfe(field: FastMixture, x0: Tensor, path: str) -> tuple[int, ...]:
    return tuple(sampling.sample(field, x0, path=path, method="dopri5", rtol=value, atol=value).nfe for value in TOLERANCES)


def _pictures(states: dict[float, Tensor], end: Tensor) -> tuple[tuple[tuple[float, ...], ...], ...]:
    frames = torch.stack([*(states[t][:PICTURES] for t in PICTURE_TIMES), end[:PICTURES]], dim=1)
    return rounded(frames, digits=3)


def reproduce_figures(out: Path, seed: int, steps: int, draws: int, jobs: int = 1) -> list[PathResult]:
    """All data sets and paths, `jobs` at a time; writes a part for each and figures.json into `out`.

    steps: of the reference solution, two evaluations each. Raises ValueError for fewer than the finest judged solve calls for.
    """
    require("steps", steps >= FEWEST_REFERENCE_STEPS, f"at least {FEWEST_REFERENCE_STEPS} for a reference that others are judged by", steps)
    parts = Parts(out / "parts", {"seed": seed, "steps": steps})
    cases = [(draw, path) for draw in range(1, draws + 1) for path in PATHS.values()]
    arguments = {f"figures-draw{draw}-{path}": (draw, path, seed, steps) for draw, path in cases}
    results = parts.get_all(PathResult, path_result, arguments, jobs)
    command = f"fm-fast reproduce figures --seed {seed} --steps {steps} --draws {draws}"
    rows = [{name: value for name, value in asdict(result).items() if name != "pictures"} for result in results]
    write_json(out / "figures.json", summary(command, parts.seconds(arguments), tolerances=TOLERANCES, results=rows))
    return results


def as_text(results: Sequence[PathResult]) -> str:
    """The numbers behind the figures as a Markdown table."""
    lines = [
        "| data set | path | NFE for MSE 1e-3 / 3e-4 / 1e-4 | dopri5 NFE, 1e-3 / 1e-5 | residual at t = 1/2 | straightness |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        counts = " / ".join(str(result.nfe_for(error) or f"> {LARGEST_NFE}") for error in (1e-3, 3e-4, 1e-4))
        adaptive = " / ".join(map(str, result.adaptive_nfe))
        middle = result.residual[result.times.index(0.5)]
        lines.append(f"| {result.draw} | {result.path} | {counts} | {adaptive} | {middle:.3f} | {result.straightness:.3f} |")
    return "\n".join(lines)
