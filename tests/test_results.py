"""Results print what their tensors are, not all that is in them."""

import torch

import fm_fast as fm


def network(x, t, **cond):
    return -x


X = torch.ones(4, 3, 2, 2)


def test_what_results_print():
    assert repr(fm.sample(network, X, steps=2)) == (
        "Sample(x=float32[4, 3, 2, 2], nfe=4, saved=None, saved_t=None, finite=bool[4], nfe_of_each=None)"
    )
    assert repr(fm.divergence(network, X.double(), 0.5, kind="exact")) == (
        "Divergence(v=float64[4, 3, 2, 2], div=float64[4], std_err=float64[4])"
    )
    likelihood = fm.log_likelihood(network, X, steps=2, seed=0)
    assert repr(likelihood) == (
        "Likelihood(logp=float64[4], std_err=None, disc_err=None, x0=float32[4, 3, 2, 2], nfe=4, nvjp=2, nfe_of_each=None)"
    )
    bits = fm.bits_per_dim(network, torch.zeros(4, 3, 2, 2, dtype=torch.uint8), steps=2, draws=3, seed=0)
    assert repr(bits) == "BitsPerDim(bpd=float64[4], std_err=None, logp=float64[3, 4], nfe=12, nvjp=6)"


def test_a_point_of_the_path_does_not_print_what_it_keeps():
    assert repr(fm.sample_path(X, seed=0, step=0)) == "PathSample(x_t=float32[4, 3, 2, 2], t=float32[4], coef=float32[4, 6])"
