"""Whether our training step learns what torchcfm's does: both on the same (x1, x0, t) from the same weights, step after step.

    python -m benchmarks.loss_curves                             # network and size of op train_step: takes long
    python -m benchmarks.loss_curves --size 16x16 --seeds 0 1

The data are the shipped digits, enlarged and in three equal colours. Prints the mean loss of the last fifth of the steps of either, and
fails where they differ by more than TOLERANCE. Training amplifies rounding. A third run tells by how much: torchcfm's own step once more,
from weights times 1 + 2^-23, the least that float32 knows. What torchcfm's two differ by, no other step can be asked to undercut.
"""

import argparse
import copy
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fm_fast as fm
from benchmarks import peers, results, timing
from benchmarks.ops.train_step import Inputs, Trainer, our_trainer, torchcfm_network, torchcfm_trainer, unet_config
from fm_fast.nn import load_torchcfm
from fm_fast.train.data import DataOrder, digits

NAME = "loss_curves"
OURS, THEIRS, DISTURBED = "fm_fast", "torchcfm", "torchcfm, disturbed"
SIZES = {"32x32": (64, 3, 32, 32), "16x16": (64, 3, 16, 16), "tiny": (8, 3, 8, 8)}
STEPS, SEEDS = 300, (0, 1, 2)
LATE_SHARE, TOLERANCE = 0.2, 0.01
Triple = tuple[Tensor, Tensor, Tensor]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.loss_curves", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--size", default="32x32", choices=list(SIZES))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="of the initial weights, the order of the data, x0 and t")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSON file of the rows; a CSV is written beside it (default: benchmarks/results/)")
    return parser.parse_args()


def triples(shape: tuple[int, ...], steps: int, seed: int) -> Iterator[Triple]:
    """(x1, x0, t) of each step."""
    data, (batch, colours, *size) = digits(), shape
    order = DataOrder(len(data), seed)
    for step in range(steps):
        images = data.images[order.indices(step * batch, batch)].float()
        enlarged = F.interpolate(2.0 * (images + 0.5) / data.levels - 1.0, size=size, mode="bilinear")
        t = fm.noise((batch,), seed=seed, step=step, stream="t")
        yield enlarged.expand(-1, colours, -1, -1).contiguous(), fm.noise(shape, seed=seed, step=step), t


def trainers(shape: tuple[int, ...], seed: int) -> dict[str, Trainer]:
    """Ours and torchcfm's, with the weights that torchcfm's network starts with, and torchcfm's with nearly these weights."""
    config = unet_config(shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        theirs = torchcfm_network(config)
    nothing = torch.empty(0)
    given = Inputs(nothing, nothing, nothing, load_torchcfm(theirs.state_dict(), config), theirs)
    other = replace(given, theirs=_disturbed(theirs))
    return {
        OURS: our_trainer(given, torch.float32),
        THEIRS: torchcfm_trainer(given, torch.float32),
        DISTURBED: torchcfm_trainer(other, torch.float32),
    }


@torch.no_grad()
def _disturbed(network: nn.Module) -> nn.Module:
    """A copy whose weights are off by a unit in the last place."""
    network = copy.deepcopy(network)
    for parameter in network.parameters():
        parameter.mul_(1.0 + 2.0**-23)
    return network


def curves(shape: tuple[int, ...], steps: int, seed: int) -> dict[str, list[float]]:
    """The losses of every step by provider."""
    learners = trainers(shape, seed)
    losses: dict[str, list[float]] = {name: [] for name in learners}
    for triple in triples(shape, steps, seed):
        for name, trainer in learners.items():
            losses[name].append(float(trainer.learn(trainer.at(*triple))))
    return losses


def late(losses: list[float]) -> float:
    """The mean of the last fifth."""
    last = losses[-max(1, round(LATE_SHARE * len(losses))) :]
    return sum(last) / len(last)


def rows(found: dict[str, list[float]], size: str, steps: int) -> list[results.Row]:
    """Over the seeds: the late losses, and those of either over ours."""
    entries = []
    for name, values in found.items():
        for metric, summary in (("late_loss", timing.summarise(values)), ("ratio", timing.ratios(found, name, OURS))):
            numbers = (summary.median, summary.p20, summary.p80)
            entries.append(results.Row(NAME, name, f"{steps} steps, {len(values)} seeds", size, "float32", metric, *numbers))
    return entries


def main() -> None:
    options = parse()
    if not peers.available(THEIRS):
        sys.exit(peers.remarks([THEIRS])[0])
    torch.set_num_threads(options.threads)
    surroundings = results.environment(torch.device("cpu"), options.threads)
    found: dict[str, list[float]] = {OURS: [], THEIRS: [], DISTURBED: []}
    heads = ("first loss", OURS, THEIRS, "difference", "of torchcfm's two")
    print(f"{options.size}, {options.steps} steps\n{'seed':>4}" + "".join(f"{head:>20}" for head in heads), flush=True)
    for seed in options.seeds:
        losses = curves(SIZES[options.size], options.steps, seed)
        for name, values in losses.items():
            found[name].append(late(values))
        ours, theirs, disturbed = (values[-1] for values in found.values())
        numbers = "".join(f"{number:>20.5f}" for number in (losses[OURS][0], ours, theirs))
        print(f"{seed:>4}{numbers}{ours / theirs - 1.0:>20.2e}{disturbed / theirs - 1.0:>20.2e}", flush=True)
    differences = [abs(ours / theirs - 1.0) for ours, theirs in zip(found[OURS], found[THEIRS], strict=True)]
    if not max(differences) <= TOLERANCE:
        sys.exit(f"the mean losses of the last fifth differ by {max(differences):.2e}, more than {TOLERANCE:.0%}")
    results.write(options.out or results.default_path(NAME, surroundings), rows(found, options.size, options.steps), surroundings)


if __name__ == "__main__":
    main()
