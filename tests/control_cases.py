"""Samples in every situation that step_control tells apart, and the check of what an implementation makes of them."""

from dataclasses import dataclass

import numpy as np
import oracle
import torch

DOPRI5 = (0.0, 0.2, 0.3, 0.8, 8 / 9, 1.0, 1.0)
# Mean squares of errors beside the tolerance: 1 is accepted, the numbers around it grow by factors inside of the limits and at them.
SQUARES = (0.0, 1e-300, 1e-12, 0.03, 0.5, 0.95, 1.0, 1.0 + 1e-9, 1.3, 40.0, 1e12, 1e300, float("inf"), float("nan"))


@dataclass(frozen=True)
class Case:
    """Arguments of a call; as many samples as situations, or the first of them again and again."""

    numbers: np.ndarray
    counts: np.ndarray
    means: np.ndarray
    stops: np.ndarray
    nodes: np.ndarray
    order: int = 5
    evaluations: int = 6


def case(batch, parts=1, stops=(0.0, 0.25, 1.0), nodes=DOPRI5, **others):
    """A step of every length before every stop, with every error; samples at their ends or given up among them."""
    stops, direction = np.array(stops), np.sign(stops[-1] - stops[0])
    samples = np.arange(batch)
    stop = 1 + samples % (len(stops) - 1)
    left = np.array([0.1, 0.01, 0.25, 1e-9])[samples // 3 % 4]
    length = np.array([0.05, 0.1, 0.4, 1e-3, 1e-25])[samples // 5 % 5]
    status = np.where(samples % 11 == 3, 0, np.where(samples % 13 == 5, 2, 1))
    tried = np.where(status == 1, np.minimum(left, length), 0.0)
    numbers = np.stack([stops[stop] - direction * left, direction * length, direction * tried])
    means = np.array(SQUARES)[(samples + 5 * np.arange(parts)[:, None]) % len(SQUARES)]
    return Case(numbers, np.stack([stop, 7 + samples % 3, status]), means, stops, np.array(nodes), **others)


CASES = {
    "nothing tried": case(40, parts=0),
    "one part": case(1100),
    "two parts": case(700, parts=2),
    "backwards": case(300, stops=(0.9, 0.5, 0.4, 0.1)),
    "one stop": case(200, stops=(0.2, 0.7), order=3, nodes=(0.0, 0.5, 1.0)),
    "nodes outside of the step": case(100, stops=(0.0, 1.0), nodes=(-0.5, 1.5), order=2),
    "one sample": case(1),
    "no samples": case(0),
}


def controlled(op, given, dtype, device="cpu"):
    """What the op leaves in (numbers, counts, totals, accepted, times, factors); what it only writes was poisoned."""
    batch, stages = given.numbers.shape[1], len(given.nodes)
    numbers, counts, means, stops, nodes = (
        torch.tensor(x, device=device) for x in (given.numbers, given.counts, given.means, given.stops, given.nodes)
    )
    totals = torch.tensor([100, 200, 300], device=device)
    accepted = torch.full((batch,), 77, dtype=torch.uint8, device=device)
    times = torch.full((stages, batch), float("nan"), dtype=torch.float64, device=device)
    factors = torch.full((2, batch), float("nan"), dtype=dtype, device=device)
    with torch.no_grad():
        op(numbers, counts, totals, accepted, times, factors, means, stops, nodes, given.order, given.evaluations)
    return numbers, counts, totals - torch.tensor([100, 200, 300], device=device), accepted, times, factors


def check(op, given, dtype, device="cpu"):
    """Against the float64 model: whole numbers exactly; powers and products to a few roundings."""
    found = [x.cpu().numpy() for x in controlled(op, given, dtype, device)]
    wanted = oracle.step_control(given.numbers, given.counts, given.means, given.stops, given.nodes, given.order, given.evaluations)
    for place in (1, 2, 3):
        np.testing.assert_array_equal(found[place], wanted[place])
    for place, rounding, least in ((0, 1e-13, 0.0), (4, 1e-15, 1e-16), (5, 1e-13 if dtype == torch.float64 else 1e-7, 0.0)):
        np.testing.assert_allclose(found[place], wanted[place], rtol=rounding, atol=least)
