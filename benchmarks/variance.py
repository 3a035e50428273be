"""How much the draws of probes move log p, on a trained network at equal steps: ours against flow_matching and the kinds of probes.

    make bits                                              # trains out/digits-dequantised
    python -m benchmarks.variance out/digits-dequantised

Prints the variance of log p over repeated draws, the mean over a few test images, and its ratio to ours of the same row.
"""

import argparse

import torch
from torch import Tensor, nn

from benchmarks import log_prob, peers
from benchmarks.log_prob import LogProb
from fm_fast.random import noise
from fm_fast.train.data import load_dataset
from fm_fast.train.storage.weights import load_model

IMAGES, DRAWS = 4, 12


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.variance", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run", help="folder of a run on the digits, or a checkpoint of it")
    parser.add_argument("--steps", type=int, default=100, help="of the comparison with flow_matching")
    parser.add_argument("--kind-steps", type=int, default=20, help="of the comparison of kinds")
    return parser.parse_args()


def problem(run: str) -> tuple[nn.Module, Tensor]:
    """The labelled network and its data: each image DRAWS times, so that one call draws for all of them."""
    network, _ = load_model(run)
    images = load_dataset("digits", "test")
    u = noise((IMAGES, *images.images.shape[1:]), seed=0, step=0, stream="dequantise")
    x1 = 2.0 * (images.images[:IMAGES] + u) / images.levels - 1.0
    return _Labelled(network, images.labels[:IMAGES].repeat(DRAWS)), x1.repeat(DRAWS, 1, 1, 1)


class _Labelled(nn.Module):
    def __init__(self, network: nn.Module, labels: Tensor) -> None:
        super().__init__()
        self.network, self.labels = network, labels

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.network(x, t, y=self.labels)


def variance(model: nn.Module, x1: Tensor, log_p: LogProb, steps: int, probes: int) -> float:
    """Mean over the images of the variance over draws."""
    return float(log_p(model, x1, steps, probes).double().reshape(DRAWS, IMAGES).var(0).mean())


def main() -> None:
    options = parse()
    torch.manual_seed(0)
    torch.set_num_threads(2)
    model, x1 = problem(options.run)
    print(f"{IMAGES} images, {DRAWS} draws each; {peers.version('flow_matching') or 'no'} flow_matching")
    for method in ("midpoint", "euler"):
        ours = variance(model, x1, log_prob.ours(method), options.steps, 1)
        print(f"{method}, {options.steps} steps, 1 probe: fm_fast {ours:.3g}", end="", flush=True)
        if peers.available("flow_matching"):
            theirs = variance(model, x1, log_prob.flow_matching(method), options.steps, 1)
            print(f", flow_matching {theirs:.3g} ({theirs / ours:.1f} times)", end="")
        print()
    for probes in (4, 16):
        values = {
            kind: variance(model, x1, log_prob.ours("midpoint", kind), options.kind_steps, probes)
            for kind in ("rademacher", "hadamard", "coloured")
        }
        ratios = ", ".join(f"{kind} {value:.3g} ({values['rademacher'] / value:.2f} times lower)" for kind, value in values.items())
        print(f"midpoint, {options.kind_steps} steps, {probes} probes: {ratios}")


if __name__ == "__main__":
    main()
