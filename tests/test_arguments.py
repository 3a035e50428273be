"""Arguments beyond the plain case: NumPy's numbers, scalar ids, models that are none, settings that are checked early."""

import copy
import dataclasses
import pickle

import numpy as np
import pytest
import torch

import fm_fast as fm

X1 = torch.linspace(-2.0, 2.0, 24).reshape(4, 6)
SEEDED = {"seed": 3, "step": 2}


def model(x, t, **condition):
    return x * t[:, None]


def test_numpys_numbers_are_numbers():
    expected = fm.flow_matching_loss(model, X1, **SEEDED)
    assert torch.equal(fm.flow_matching_loss(model, X1, seed=np.int64(3), step=np.uint32(2)), expected)
    pixels, given = (X1 * 3).abs().to(torch.uint8), {"dtype": torch.float32, **SEEDED}
    assert torch.equal(
        fm.flow_matching_loss(model, pixels, t=np.float32(0.5), levels=np.int64(17), sample_ids=np.int64(5), **given),
        fm.flow_matching_loss(model, pixels, t=0.5, levels=17, sample_ids=5, **given),
    )
    solved = fm.log_likelihood(model, X1, steps=np.int64(3), probes=np.int64(2), seed=np.int64(1))
    assert torch.equal(solved.logp, fm.log_likelihood(model, X1, steps=3, probes=2, seed=1).logp)
    assert fm.sample(model, X1, method="dopri5", rtol=np.float32(0.125), atol=np.float64(0.125)).nfe > 0
    assert fm.OT(sigma_min=np.float32(0.5)) == fm.OT(sigma_min=0.5)


def test_a_scalar_tensor_is_the_first_id():
    expected = fm.flow_matching_loss(model, X1, sample_ids=7, **SEEDED)
    assert torch.equal(fm.flow_matching_loss(model, X1, sample_ids=torch.tensor(7), **SEEDED), expected)
    assert torch.equal(fm.noise((4, 6), seed=3, step=2, sample_ids=torch.tensor(7)), fm.noise((4, 6), seed=3, step=2, sample_ids=7))


def test_copied_objectives_are_the_built_in_ones():
    """Else their loss would be plain PyTorch's, and their solves would be planned anew each time."""
    for objective in fm.objectives.OBJECTIVES.values():
        assert fm.objectives.is_built_in(pickle.loads(pickle.dumps(objective))) and fm.objectives.is_built_in(copy.deepcopy(objective))
        assert not fm.objectives.is_built_in(dataclasses.replace(objective, target=lambda p: (p.da, p.ds, 1.0, 1.0)))


def test_names_of_paths_will_do_everywhere():
    assert fm.paths.prior_scale("ve") == fm.VE().prior_scale != 1.0
    assert fm.paths.time_limits("vp") == fm.paths.time_limits(fm.VP()) != (0.0, 1.0)
    data = fm.objectives.OBJECTIVES["data"]
    assert fm.objectives.velocity_range("ve", "data") == fm.objectives.velocity_range(fm.VE(), data) == (0.0, 1.0)
    assert fm.objectives.time_range("ot", "scoreflow")[1] < 1.0
    for function in (fm.paths.prior_scale, fm.paths.time_limits):
        with pytest.raises(ValueError, match="path must be one of ot, vp, ve, cosine or an object with alpha"):
            function("vpp")


def test_oracles_of_any_objective_can_be_pickled():
    oracle = fm.testing.GaussianMixture(torch.ones(2), torch.tensor([[-1.0], [1.0]]), torch.ones(2), path="vp")
    found = pickle.loads(pickle.dumps(oracle.model("noise")))(X1[:, :1], 0.5)
    assert torch.equal(found, oracle.model("noise")(X1[:, :1], 0.5))


def test_wrong_models_are_named():
    with pytest.raises(TypeError, match=r"model must return a torch.Tensor of the shape of x1, got tuple"):
        fm.flow_matching_loss(lambda x, t: (x,), X1, **SEEDED)
    with pytest.raises(ValueError, match=r"model must return the shape of x1, \(4, 6\), got \(4, 5\)"):
        fm.flow_matching_loss(lambda x, t: x[:, 1:], X1, **SEEDED)
    with pytest.raises(TypeError, match=r"the output of model must be float64, .*, got torch.int64"):
        fm.flow_matching_loss(lambda x, t: x.long(), X1, **SEEDED)
    with pytest.raises(ValueError, match=r"the output of model must be on the device of x1, cpu, got meta"):
        fm.flow_matching_loss(lambda x, t: x.to("meta"), X1, **SEEDED)
    with pytest.raises(TypeError, match=r"model must be callable as model\(x_t, t, \*\*cond\), got NoneType"):
        fm.flow_matching_loss(None, X1, **SEEDED)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"flip": 2.0}, r"flip must lie in \[0, 1\], got 2.0"),
        ({"levels": 300}, r"levels must be a whole number in \[2, 256\], got 300"),
        ({"dtype": "x"}, r"dtype must be one of .*, got 'x'"),
        ({"backend": "x"}, r"backend must be one of .*, got 'x'"),
    ],
)
def test_settings_are_checked_when_the_module_is_made(settings, message):
    with pytest.raises(ValueError, match=message):
        fm.FlowMatchingLoss(**settings)
