"""Peak memory of a divergence by torch's profiler: many probes one after another cost no more than a few."""

import gc
import weakref

import pytest
import torch
from peak_memory import peak_bytes

import fm_fast as fm
from fm_fast.nn import UNet, UNetConfig

SHAPE = (2, 3, 32, 32)


class Labelled(torch.nn.Module):
    """A U-Net of 0.9 million parameters, with every weight at work."""

    def __init__(self):
        super().__init__()
        settings = {"channels": 24, "multipliers": (1, 2, 2, 2), "blocks": 1, "attention_sizes": (8,), "groups": 8, "head_channels": 16}
        self.network = UNet(UNetConfig(image_size=32, image_channels=3, classes=10, dropout=0.0, **settings))
        for parameter in self.network.parameters():
            if not bool(parameter.any()):
                torch.nn.init.normal_(parameter, std=0.05)

    def forward(self, x, t):
        return self.network(x, t, y=torch.zeros(len(x), dtype=torch.int64))


@pytest.fixture(scope="module")
def peaks():
    torch.manual_seed(0)
    model, x = Labelled(), torch.randn(SHAPE)

    def divergence(probes, mode):
        return peak_bytes(lambda: fm.divergence(model, x, 0.5, probes=probes, kind="rademacher", mode=mode, seed=0))

    fm.divergence(model, x, 0.5, probes=1, kind="rademacher", seed=0)  # what only a first call allocates
    with torch.no_grad():
        forward = peak_bytes(lambda: model(x, torch.full((len(x),), 0.5)))
    ratios = {(probes, mode): divergence(probes, mode) / forward for probes, mode in ((4, "loop"), (16, "loop"), (16, "batched"))}
    return {**ratios, "auto": divergence(16, "auto") / forward}


def test_sixteen_probes_in_a_loop_take_at_most_five_forward_passes_of_memory(peaks):
    assert peaks[16, "loop"] <= 5.0


def test_probes_in_a_loop_do_not_add_up(peaks):
    """What they need is the graph of one forward pass; batched, every probe has memory of its own."""
    assert peaks[16, "loop"] < 1.01 * peaks[4, "loop"]
    assert peaks[16, "batched"] > 2 * peaks[16, "loop"]


def test_auto_does_not_batch_what_exceeds_its_budget(peaks):
    assert peaks["auto"] == pytest.approx(peaks[16, "loop"], rel=0.01)


def divergence(model, x, **options):
    return fm.divergence(model, x, 0.5, **options).div


def log_likelihood(model, x, **options):
    return fm.log_likelihood(model, x, method="midpoint", steps=2, **options).logp


@pytest.mark.parametrize("measure", [divergence, log_likelihood])
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("mode", ["auto", "batched", "loop"])
@pytest.mark.parametrize("kind", ["exact", "rademacher"])
def test_no_graph_outlives_its_call(measure, create_graph, mode, kind):
    """tanh keeps its own output for the backward pass: a hook that keeps the tensor itself closes a circle which no collector sees."""
    activations = []

    def model(x, t):
        activations.append(weakref.ref(h := torch.tanh(2.0 * x)))
        return h * x

    probes = {} if kind == "exact" else {"probes": 3, "seed": 0}
    measure(model, torch.randn(4, 3), create_graph=create_graph, mode=mode, kind=kind, **probes)
    gc.collect()
    assert activations and all(h() is None for h in activations)
