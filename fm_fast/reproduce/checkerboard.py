"""The checkerboard of Figures 4 and 9, and Figure 10 for it: five objectives in two dimensions, one small network and one budget for all.

The paper gives the network's shape only (appendix E), so numbers are not comparable with it; the setting here is
4 layers of 128 SiLU units, batch 512, Adam at 1e-3, uniform times, and outputs as in the paper: no preconditioning.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fm_fast import sampling
from fm_fast._fields import require
from fm_fast.bits import standard_error
from fm_fast.likelihood import log_likelihood
from fm_fast.loss import flow_matching_loss
from fm_fast.random import noise
from fm_fast.reproduce.results import Parts, rounded, summary, write_json
from fm_fast.reproduce.threads import one_thread
from fm_fast.train.config import RECIPES, Recipe

NAMES = {"fm-ot": "FM w/ OT", "fm-vp": "FM w/ Diffusion", "ddpm": "DDPM", "score": "Score Matching", "scoreflow": "ScoreFlow"}
TRUE_NLL = math.log(8.0)
WIDTH, LAYERS, BATCH, LEARNING_RATE = 128, 4, 512, 1e-3
SNAPSHOTS = 8
SAMPLES = 1024
HELD_OUT, NLL_STEPS = 1024, 100
LATE_LOSSES = 300
COUNTS = (4, 6, 8, 12, 16, 24, 32, 48, 64)
REFERENCE_STEPS = 500
TOLERANCE = 1e-5
DENSITY_TIMES = (0.0, 0.25, 0.5, 0.75, 0.9)
MANY_SAMPLES, MANY_STEPS = 20_000, 40
BINS, EXTENT = 48, 3.0


@dataclass(frozen=True)
class ObjectiveResult:
    """One objective. NFE: of dopri5 at atol = rtol = 1e-5 on a batch of 1024 samples.

    snapshots, nfe_during: training steps and the NFE then. nll, nll_std_err: of held-out points, nats; the true value is ln 8.
    inside: share of 20000 samples in cells that have data. counts, mse: NFE of the midpoint rule and its mean squared error against 1000
    evaluations.
    loss_noise: standard deviation over mean of the last losses. densities: counts of samples in 48 x 48 bins over [-3, 3]^2 at
    DENSITY_TIMES and at the end, [times][rows of y][columns of x].
    """

    objective: str
    snapshots: tuple[int, ...]
    nfe_during: tuple[int, ...]
    nll: float
    nll_std_err: float
    inside: float
    counts: tuple[int, ...]
    mse: tuple[float, ...]
    loss_noise: float
    densities: tuple[tuple[tuple[float, ...], ...], ...]

    @property
    def nfe(self) -> int:
        """At the end of training."""
        return self.nfe_during[-1]

    def mse_at(self, count: int) -> float:
        """The midpoint rule's error with `count` evaluations."""
        return self.mse[self.counts.index(count)]


class Network(nn.Module):
    """(x [B, 2], t [B]) -> [B, 2] through layers of SiLU units; initial weights depend on the seed only."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            widths = [3, *[WIDTH] * LAYERS]
            layers = [part for i in range(LAYERS) for part in (nn.Linear(widths[i], widths[i + 1]), nn.SiLU())]
            self.layers = nn.Sequential(*layers, nn.Linear(WIDTH, 2))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layers(torch.cat([x, t[:, None]], dim=1))


def checkerboard(count: int, seed: int, step: int) -> Tensor:
    """Points uniform on the 8 cells of a 4 x 4 board over [-2, 2]^2 whose row and column numbers add up to an even number: [count, 2]."""
    u = noise((count, 3), seed=seed, step=step, index=1, kind="uniform")
    cell = (u[:, 0] * 8.0).long().clamp_max(7)
    row = cell // 2
    column = 2 * (cell % 2) + row % 2
    return torch.stack([column - 2.0 + u[:, 1], row - 2.0 + u[:, 2]], dim=1)


def is_inside(x: Tensor) -> Tensor:
    """Whether points [N, 2] lie in a cell that has data: bool [N]."""
    cells = torch.floor(x + 2.0)
    return ((cells >= 0) & (cells <= 3)).all(1) & (cells.sum(1) % 2 == 0)


def objective_result(objective: str, seed: int, steps: int) -> ObjectiveResult:
    """Train a network for one objective and measure it."""
    with one_thread():
        recipe, model = RECIPES[objective], Network(seed)
        snapshots = tuple(steps * (number + 1) // SNAPSHOTS for number in range(SNAPSHOTS))
        losses, counts = _train(model, recipe, seed, steps, snapshots)
        return _measure(objective, model.eval().requires_grad_(False), recipe, seed, snapshots, counts, losses)


def _train(model: nn.Module, recipe: Recipe, seed: int, steps: int, snapshots: Sequence[int]) -> tuple[Tensor, tuple[int, ...]]:
    """In place; returns the losses and the NFE at the snapshots."""
    optimiser, losses, counts = torch.optim.Adam(model.parameters(), LEARNING_RATE), [], []
    for step in range(steps):
        x1 = checkerboard(BATCH, seed, step)
        loss = flow_matching_loss(model, x1, path=recipe.path, objective=recipe.objective, seed=seed, step=step)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.detach())
        if step + 1 in snapshots:
            counts.append(_adaptive(model, recipe, seed).nfe)
    return torch.stack(losses), tuple(counts)


def _start(count: int, seed: int) -> Tensor:
    """Noise that training, whose steps are small numbers, has not seen."""
    return noise((count, 2), seed=seed, step=2**31)


def _adaptive(model: nn.Module, recipe: Recipe, seed: int) -> sampling.Sample:
    x0 = _start(SAMPLES, seed)
    return sampling.sample(
        model, x0, path=recipe.path, objective=recipe.objective, method="dopri5", rtol=TOLERANCE, atol=TOLERANCE
    )  # fmt: skip


def _midpoint(model: nn.Module, recipe: Recipe, x0: Tensor, steps: int, save: Sequence[float] | None = None) -> sampling.Sample:
    return sampling.sample(model, x0, path=recipe.path, objective=recipe.objective, method="midpoint", steps=steps, save=save)


def _measure(
    objective: str, model: nn.Module, recipe: Recipe, seed: int, snapshots: tuple[int, ...], nfe: tuple[int, ...], losses: Tensor
) -> ObjectiveResult:
    points = checkerboard(HELD_OUT, seed, 2**31)
    trained = {"path": recipe.path, "objective": recipe.objective}
    nll = -log_likelihood(model, points, method="rk4", steps=NLL_STEPS, kind="exact", **trained).logp
    x0 = _start(SAMPLES, seed)
    exact = _midpoint(model, recipe, x0, REFERENCE_STEPS).x
    errors = tuple(float((_midpoint(model, recipe, x0, count // 2).x - exact).square().mean()) for count in COUNTS)
    many = _midpoint(model, recipe, _start(MANY_SAMPLES, seed), MANY_STEPS, save=DENSITY_TIMES)
    late = losses[-LATE_LOSSES:]
    return ObjectiveResult(
        objective, snapshots, nfe, float(nll.mean()), standard_error(nll),
        float(is_inside(many.x).double().mean()), COUNTS, errors, float(late.std() / late.mean()), _densities(many),
    )  # fmt: skip


def _densities(solved: sampling.Sample) -> tuple[tuple[tuple[float, ...], ...], ...]:
    assert solved.saved is not None
    return rounded(torch.stack([histogram(x) for x in [*solved.saved, solved.x]]), digits=0)


def histogram(x: Tensor) -> Tensor:
    """Counts of points [N, 2] in BINS x BINS bins over [-EXTENT, EXTENT]^2; rows are y, columns x."""
    edges = torch.linspace(-EXTENT, EXTENT, BINS + 1, dtype=torch.float64)
    return torch.histogramdd(x.double().flip(1), [edges, edges]).hist


def reproduce_checkerboard(out: Path, seed: int, steps: int, jobs: int = 1) -> list[ObjectiveResult]:
    """All five objectives, `jobs` at a time; writes a part for each and checkerboard.json into `out`.

    Raises ValueError for fewer training steps than there are snapshots on the way.
    """
    require("steps", steps >= SNAPSHOTS, f"at least {SNAPSHOTS}, one for each measurement of NFE on the way", steps)
    parts = Parts(out / "parts", {"seed": seed, "steps": steps})
    arguments = {f"checkerboard-{name}": (name, seed, steps) for name in NAMES}
    results = parts.get_all(ObjectiveResult, objective_result, arguments, jobs)
    rows = [{name: value for name, value in asdict(result).items() if name != "densities"} for result in results]
    command = f"fm-fast reproduce checkerboard --seed {seed} --steps {steps}"
    write_json(out / "checkerboard.json", summary(command, parts.seconds(arguments), true_nll=TRUE_NLL, results=rows))
    return results


def as_text(results: Sequence[ObjectiveResult]) -> str:
    """A Markdown table."""
    lines = [
        f"| objective | dopri5 NFE | NLL, nats (true: {TRUE_NLL:.3f}) | samples inside | midpoint MSE, 16 / 32 NFE | loss noise |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {NAMES[r.objective]} | {r.nfe} | {r.nll:.3f} ± {r.nll_std_err:.3f} | {r.inside:.1%} | {r.mse_at(16):.1e} / {r.mse_at(32):.1e}"
        f" | {r.loss_noise:.3f} |"
        for r in results
    ]
    return "\n".join(lines)
