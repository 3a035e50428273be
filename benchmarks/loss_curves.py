"""Whether our training step learns what torchcfm's does: both on the same (x1, x0, t) from the same weights, step after step.

    python -m benchmarks.loss_curves                             # network and size of op train_step: takes long
    python -m benchmarks.loss_curves --size 16x16 --seeds 0 1 --dtype bfloat16

The data are the shipped digits, enlarged and in three equal colours. The learning rate rises linearly over --warm-up steps, by default the
5000 of torchcfm's script for CIFAR-10. Prints the mean loss of the last fifth of the steps of each, and fails where ours differs by more
than TOLERANCE from torchcfm's.

Training amplifies rounding, where the rate rises faster to percents. A third run tells by how much: in float32, torchcfm's own step once
more, from weights times 1 + 2^-23, the least float32 knows. What torchcfm's two differ by, no other step can be asked to undercut.
In bfloat16 ours is compared with torchcfm's step under autocast and with the one in float32, its default.
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
from benchmarks.ops.train_step import RATE, Inputs, Trainer, our_trainer, torchcfm_network, torchcfm_trainer, unet_config
from fm_fast.nn import load_torchcfm
from fm_fast.train.data import DataOrder, digits

NAME = "loss_curves"
OURS, THEIRS, DISTURBED, AUTOCAST = "fm_fast", "torchcfm", "torchcfm, disturbed", "torchcfm, autocast"
SIZES = {"32x32": (64, 3, 32, 32), "16x16": (64, 3, 16, 16), "tiny": (8, 3, 8, 8)}
STEPS, WARM_UP, SEEDS = 300, 5000, (0, 1, 2)
LATE_SHARE, TOLERANCE = 0.2, 0.01
Triple = tuple[Tensor, Tensor, Tensor]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.loss_curves", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--size", default="32x32", choices=list(SIZES))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--warm-up", type=int, default=WARM_UP, help="steps until the learning rate is reached; 0: at once")
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


def trainers(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> dict[str, Trainer]:
    """Ours in the dtype, torchcfm's in float32 and the third run, from the weights that torchcfm's network starts with."""
    config = unet_config(shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        theirs = torchcfm_network(config)
    nothing = torch.empty(0)
    given = Inputs(nothing, nothing, nothing, load_torchcfm(theirs.state_dict(), config), theirs)
    found = {OURS: our_trainer(given, dtype), THEIRS: torchcfm_trainer(given, torch.float32)}
    if dtype == torch.float32:
        return found | {DISTURBED: torchcfm_trainer(replace(given, theirs=_disturbed(theirs)), torch.float32)}
    return found | {AUTOCAST: torchcfm_trainer(given, dtype)}


@torch.no_grad()
def _disturbed(network: nn.Module) -> nn.Module:
    """A copy whose weights are off by a unit in the last place."""
    network = copy.deepcopy(network)
    for parameter in network.parameters():
        parameter.mul_(1.0 + 2.0**-23)
    return network


def curves(shape: tuple[int, ...], steps: int, warm_up: int, seed: int, dtype: torch.dtype) -> dict[str, list[float]]:
    """The losses of every step by provider."""
    learners = trainers(shape, seed, dtype)
    losses: dict[str, list[float]] = {name: [] for name in learners}
    for step, triple in enumerate(triples(shape, steps, seed)):
        for name, trainer in learners.items():
            set_rate(trainer, RATE * warmed(step, warm_up))
            losses[name].append(float(trainer.learn(trainer.at(*triple))))
    return losses


def warmed(step: int, warm_up: int) -> float:
    """The share of the learning rate at a step, counted from 0."""
    return min(1.0, (step + 1) / warm_up) if warm_up else 1.0


def set_rate(trainer: Trainer, rate: float) -> None:
    for group in trainer.optimiser.param_groups:
        group["lr"] = rate


def late(losses: list[float]) -> float:
    """The mean of the last fifth."""
    last = losses[-max(1, round(LATE_SHARE * len(losses))) :]
    return sum(last) / len(last)


def rows(found: dict[str, list[float]], size: str, dtype: str, problem: str) -> list[results.Row]:
    """Over the seeds: the late losses, and those of each over ours."""
    entries = []
    for name, values in found.items():
        for metric, summary in (("late_loss", timing.summarise(values)), ("ratio", timing.ratios(found, name, OURS))):
            numbers = (summary.median, summary.p20, summary.p80)
            entries.append(results.Row(NAME, name, problem, size, dtype, metric, *numbers))
    return entries


def main() -> None:
    options = parse()
    if not peers.available(THEIRS):
        sys.exit(peers.remarks([THEIRS])[0])
    torch.set_num_threads(options.threads)
    surroundings = results.environment(torch.device("cpu"), options.threads)
    found = measured(options)
    largest = max(map(abs, apart(found)))
    if not largest <= TOLERANCE:
        sys.exit(f"the mean losses of the last fifth differ by {largest:.2e}, more than {TOLERANCE:.0%}")
    problem = f"{options.steps} steps, warm-up {options.warm_up}, {len(options.seeds)} seeds"
    path = options.out or results.default_path(NAME, surroundings, options.dtype)
    results.write(path, rows(found, options.size, options.dtype, problem), surroundings)


def measured(options: argparse.Namespace) -> dict[str, list[float]]:
    """The late losses of every seed by provider, printed as they come."""
    dtype, found = getattr(torch, options.dtype), {}
    third = DISTURBED if dtype == torch.float32 else AUTOCAST
    heads = ("first loss", OURS, THEIRS, third, "1st / 2nd - 1", "3rd / 2nd - 1")
    print(f"{options.size}, {options.dtype}, {options.steps} steps, warm-up {options.warm_up}")
    print(f"{'seed':>4}" + "".join(f"{head:>21}" for head in heads), flush=True)
    for seed in options.seeds:
        losses = curves(SIZES[options.size], options.steps, options.warm_up, seed, dtype)
        for name, values in losses.items():
            found.setdefault(name, []).append(late(values))
        ours, theirs, other = (found[name][-1] for name in (OURS, THEIRS, third))
        numbers = "".join(f"{number:>21.5f}" for number in (losses[THEIRS][0], ours, theirs, other))
        print(f"{seed:>4}{numbers}{ours / theirs - 1.0:>21.2e}{other / theirs - 1.0:>21.2e}", flush=True)
    return found


def apart(found: dict[str, list[float]]) -> list[float]:
    """By how much ours differs from each of torchcfm's steps that it is held against, for every seed."""
    others = [values for name, values in found.items() if name in (THEIRS, AUTOCAST)]
    return [ours / other - 1.0 for values in others for ours, other in zip(found[OURS], values, strict=True)]


if __name__ == "__main__":
    main()
