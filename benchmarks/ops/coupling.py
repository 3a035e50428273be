"""coupling: noise for a batch, paired with the data by minibatch optimal transport.

fm_fast, the naive form and torchebm take every sample once. torchcfm draws pairs from the optimal plan with replacement, as is its default.
torchebm stops at a sum within 1e-4 of the least, so that some of its pairs may be others.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import fm_fast as fm
from benchmarks import peers
from benchmarks.op import Inexact, Op, Provider, Setting
from benchmarks.points import SIZES, Counter

MODES = ("exact",)
NEARLY = 1e-6  # what the costs of another's pairs may exceed the least by


class Pairs(NamedTuple):
    """x0: the noise that was drawn. paired_x0, paired_x1: what goes together."""

    x0: Tensor
    paired_x0: Tensor
    paired_x1: Tensor


Step = Callable[[], Pairs]


def inputs(setting: Setting) -> Tensor:
    return 0.5 * torch.randn(setting.shape, dtype=setting.dtype, device=setting.device)


def _ours(x1: Tensor, setting: Setting) -> Step:
    """Only the ids: a training step draws their noise in its kernels. The noise itself is for the check, and is drawn once more."""
    counter = Counter(setting.device)

    def step() -> Pairs:
        drawn = {"seed": counter.seed, "step": counter.next()}
        ids = fm.couplings.optimal_ids(x1, **drawn)
        x0 = fm.noise(tuple(x1.shape), **drawn)
        return Pairs(x0, x0[ids], x1)

    return step


def _naive(x1: Tensor, setting: Setting) -> Step:
    from scipy.optimize import linear_sum_assignment

    def step() -> Pairs:
        x0 = torch.randn_like(x1)
        order = linear_sum_assignment(torch.cdist(x1.flatten(1), x0.flatten(1)) ** 2)[1]
        return Pairs(x0, x0[torch.from_numpy(order)], x1)

    return step


def _torchcfm(x1: Tensor, setting: Setting) -> Step:
    from torchcfm.optimal_transport import OTPlanSampler

    sampler = OTPlanSampler("exact")

    def step() -> Pairs:
        x0 = torch.randn_like(x1)
        return Pairs(x0, *sampler.sample_plan(x0, x1))

    return step


def _torchebm(x1: Tensor, setting: Setting) -> Step:
    from torchebm.couplings import ExactOTCoupling

    couple = ExactOTCoupling()

    def step() -> Pairs:
        x0 = torch.randn_like(x1)
        paired = couple(x0, x1)
        return Pairs(x0, paired.x0, paired.x1)

    return step


PEERS = {"torchcfm": _torchcfm, "torchebm": _torchebm}


def providers(setting: Setting) -> list[Provider]:
    found = [Provider("fm_fast", _ours), Provider("naive: cdist, SciPy", _naive)]
    return [*found, *(Provider(name, PEERS[name]) for name in PEERS if peers.available(name))]


def check(x1: Tensor, setting: Setting, step: Step) -> None:
    """Every pair is one of the optimal assignment, solved again in float64."""
    from scipy.optimize import linear_sum_assignment

    found = step()
    distances = torch.cdist(x1.double().flatten(1), found.x0.double().flatten(1)).square()
    optimal = linear_sum_assignment(distances)[1]
    rows, columns = _place(found.paired_x1, x1), _place(found.paired_x0, found.x0)
    wrong = int((optimal[rows] != columns).sum())
    if wrong and float(distances[rows, columns].mean()) <= (1.0 + NEARLY) * float(distances[range(len(optimal)), optimal].mean()):
        raise Inexact(f"{wrong} of {len(rows)} pairs are not optimal", wrong / len(rows))
    assert wrong == 0, f"{wrong} of {len(rows)} pairs are not optimal"


def _place(chosen: Tensor, among: Tensor) -> np.ndarray:
    """Which rows they are."""
    return torch.cdist(chosen.flatten(1), among.flatten(1), compute_mode="donot_use_mm_for_euclid_dist").argmin(1).numpy()


OP = Op(
    "coupling", {name: SIZES[name] for name in ("small", "2-D", "tabular", "latents")}, MODES, inputs, providers, check,
    devices=("cpu",), peers=tuple(PEERS),
)  # fmt: skip
