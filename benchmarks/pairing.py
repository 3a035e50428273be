"""What paired noise is worth: a small network on the paper's checkerboard, trained on independent and on optimal pairs.

    python -m benchmarks.pairing --seeds 0 1 2

Prints the evaluations of dopri5 at tolerances of 1e-5, the mean squared error of two steps of the midpoint rule, and the share of samples
in cells that have data. Some minutes a seed: the assignment of 256 points takes ten times as long as the rest of a step.
"""

import argparse
from collections.abc import Sequence

import torch

import fm_fast as fm
from fm_fast.reproduce.checkerboard import LEARNING_RATE, Network, checkerboard, is_inside

BATCH, TOLERANCE = 256, 1e-5
EXACT_STEPS, FEW_STEPS, MANY_STEPS = 500, 2, 40


def trained(seed: int, steps: int, paired: bool) -> Network:
    model = Network(seed)
    optimiser = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    for step in range(steps):
        x1 = checkerboard(BATCH, seed, step)
        ids = fm.couplings.optimal_ids(x1, seed=seed, step=step) if paired else None
        optimiser.zero_grad()
        fm.flow_matching_loss(model, x1, seed=seed, step=step, sample_ids=ids).backward()
        optimiser.step()
    return model.eval().requires_grad_(False)


def measured(model: Network, seed: int, samples: int = 1024, many: int = 20_000) -> tuple[int, float, float]:
    """(evaluations, mean squared error of few steps, share of samples inside), from noise that training has not seen."""
    x0, more = (fm.noise((count, 2), seed=seed, step=2**31) for count in (samples, many))
    adaptive = fm.sample(model, x0, method="dopri5", rtol=TOLERANCE, atol=TOLERANCE)
    exact, few = (fm.sample(model, x0, method="midpoint", steps=steps).x for steps in (EXACT_STEPS, FEW_STEPS))
    inside = is_inside(fm.sample(model, more, method="midpoint", steps=MANY_STEPS).x)
    return adaptive.nfe, float((few - exact).square().mean()), float(inside.double().mean())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pairing", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4000, help="training steps")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args(arguments)
    print(f"{'pairs':<14} seed  dopri5 NFE  midpoint MSE, {2 * FEW_STEPS} NFE  samples inside")
    for seed in options.seeds:
        for paired in (False, True):
            nfe, error, inside = measured(trained(seed, options.steps, paired), seed)
            print(f"{'optimal' if paired else 'independent':<14} {seed:<5} {nfe:<11} {error:<20.1e} {inside:.1%}", flush=True)


if __name__ == "__main__":
    main()
