"""The numbers of a solve stay on the host, whatever torch's default device: the results are those without one."""

import pytest
import torch
from sampling_helpers import noise64

import fm_fast as fm

X = noise64(3, 2, 4)
WHOLE = torch.arange(24, dtype=torch.uint8).reshape(3, 8)


def network(x, t):
    return torch.sin(2 * x) - x.roll(1, -1) * t.reshape(-1, *[1] * (x.dim() - 1))


def likelihood(**arguments):
    found = fm.log_likelihood(network, X, steps=4, seed=1, **arguments)
    return found.logp, found.x0


CALLS = {
    "sample": lambda: fm.sample(network, X, steps=3).x,
    "encode": lambda: fm.encode(network, X, method="rk4", steps=3, path="vp", objective="noise").x,
    "ab3": lambda: fm.sample(network, X, method="ab3", steps=5, objective="data").x,
    "karras": lambda: fm.sample(network, X, steps=3, grid="karras").x,
    "saved": lambda: fm.sample(network, X, steps=3, save=[0.1, 0.5]).saved,
    "with gradients": lambda: fm.sample(network, X, steps=3, grad="direct").x,
    "dopri5": lambda: fm.sample(network, X, method="dopri5").x,
    "divergence": lambda: fm.divergence(network, X, 0.3, kind="rademacher", probes=2, seed=1).div,
    "rademacher": lambda: likelihood(kind="rademacher", probes=2),
    "hadamard": lambda: likelihood(kind="hadamard", probes=4),
    "coloured": lambda: likelihood(kind="coloured", probes=2),
    "error estimate": lambda: likelihood(kind="rademacher", error_estimate=True),
    "with a graph": lambda: likelihood(kind="exact", create_graph=True),
    "sample_with_log_prob": lambda: fm.sample_with_log_prob(network, X, steps=3, seed=1).logp,
    "bits_per_dim": lambda: fm.bits_per_dim(network, WHOLE, steps=3, seed=1).bpd,
    "velocity": lambda: fm.objectives.velocity_coefficients("vp", "noise", 0.3),
}


@pytest.mark.filterwarnings("ignore:the finite number of steps")
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_the_default_device_does_not_matter(call):
    expected = call()
    with torch.device("meta"):
        found = call()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
