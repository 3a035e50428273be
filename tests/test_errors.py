"""Wrong input is refused with a message that names the argument, what was expected and what came."""

import math

import pytest
import torch

import fm_fast as fm

X1 = torch.zeros(4, 3, 8, 8)
SEEDED = {"seed": 1, "step": 2}

BAD_SAMPLE_ARGUMENTS = [
    ({"x1": [1.0]}, TypeError, r"x1 must be a torch.Tensor, got list"),
    ({"x1": torch.zeros(4, 3, dtype=torch.int32)}, TypeError, r"x1 must be float64, .* uint8, got torch.int32"),
    ({"x1": torch.zeros(4, 3, dtype=torch.complex64)}, TypeError, r"x1 must be .*, got torch.complex64"),
    ({"x1": torch.tensor(1.0)}, ValueError, r"x1 must have a batch dimension"),
    ({"x0": torch.zeros(4, 3, 8, 1)}, ValueError, r"x0 must have the shape of x1, \(4, 3, 8, 8\), got \(4, 3, 8, 1\)"),
    ({"x0": torch.zeros(4, 3, 8, 8, dtype=torch.int64)}, TypeError, r"x0 must be float64, .*, got torch.int64"),
    ({"x0": torch.zeros(4, 3, 8, 8, device="meta")}, ValueError, r"x0 must be on the device of x1, cpu, got meta"),
    ({"t": torch.zeros(3)}, ValueError, r"t must be a number, a scalar tensor or have shape \[4\], got \(3,\)"),
    ({"t": torch.zeros(4, 1)}, ValueError, r"t must be .* shape \[4\], got \(4, 1\)"),
    ({"t": 1.5}, ValueError, r"t must lie in \[0, 1\], got 1.5"),
    ({"t": float("nan")}, ValueError, r"t must lie in \[0, 1\], got nan"),
    ({"t": torch.tensor([0.0, 0.5, 1.0, 1.01])}, ValueError, r"t must lie in \[0, 1\], got values from 0.0 to 1.0"),
    ({"t": torch.tensor([0.0, 0.5, 1.0, float("nan")])}, ValueError, r"t must lie in \[0, 1\]"),
    ({"t": torch.zeros(4, dtype=torch.int64)}, TypeError, r"t must be a floating tensor, got torch.int64"),
    ({"t": "half"}, TypeError, r"t must be a torch.Tensor, got str"),
    ({"path": "linear"}, ValueError, r"path must be one of ot, vp, ve, cosine or an object .*, got 'linear'"),
    ({"path": 3.5}, ValueError, r"path must be one of .* or an object"),
    ({"objective": "eps"}, ValueError, r"objective must be one of velocity, noise, score, scoreflow, data, got 'eps'"),
    (
        {"t_sampler": "sobol"},
        ValueError,
        r"t_sampler must be one of uniform, stratified, logit-normal, or .* as t=, got 'sobol'",
    ),
    ({"dtype": torch.int8}, ValueError, r"dtype must be one of .*, got torch.int8"),
    ({"flip": 1.5}, ValueError, r"flip must lie in \[0, 1\], got 1.5"),
    ({"x1": torch.zeros(4, 3), "flip": 0.5}, ValueError, r"flip mirrors the last dimension .* got x1 of shape \(4, 3\)"),
    ({"levels": 1}, ValueError, r"levels must be a whole number in \[2, 256\], got 1"),
    ({"levels": 17.9}, ValueError, r"levels must be a whole number in \[2, 256\], got 17.9"),
    ({"levels": 17}, ValueError, r"levels is for uint8 x1, which it maps to \[-1, 1\], got 17 for torch.float32"),
    (
        {"x1": torch.full((4, 3), 255, dtype=torch.uint8), "levels": 17},
        ValueError,
        r"x1 must lie in 0..16 for levels=17, got values up to 255",
    ),
    ({"dequantise": True}, ValueError, r"dequantise needs uint8 x1, got torch.float32"),
    ({"seed": -1}, ValueError, r"seed must lie in \[0, 9223372036854775808\), got -1"),
    ({"seed": 2**63}, ValueError, r"seed must lie in"),
    ({"seed": 1.0}, TypeError, r"seed must be a whole number or an int64 scalar tensor, got float"),
    ({"seed": True}, TypeError, r"seed must be a whole number .*, got bool"),
    ({"seed": torch.tensor(1.0)}, TypeError, r"seed must be a whole number or an int64 scalar tensor, got torch.float32"),
    ({"step": 2**32}, ValueError, r"step must lie in \[0, 4294967296\), got 4294967296"),
    ({"seed": torch.tensor(-1)}, ValueError, r"seed must lie in .*, got -1"),
    ({"step": torch.tensor(2**32)}, ValueError, r"step must lie in .*, got 4294967296"),
    ({"sample_ids": 2**32 - 2}, ValueError, r"sample_ids must lie in \[0, 4294967293\), got 4294967294"),
    ({"x0": X1, "t": 0.5, "step": None, "flip": 0.5}, ValueError, r"seed was given without a step"),
    ({"path": fm.OT}, ValueError, r"path must be one of .*, got <class"),
    ({"step": None}, ValueError, r"seed was given without a step"),
    ({"seed": None}, ValueError, r"step was given without a seed"),
    ({"sample_ids": -1}, ValueError, r"sample_ids must lie in"),
    (
        {"sample_ids": torch.arange(3)},
        ValueError,
        r"sample_ids must be a whole number or int64 of shape \[4\], got torch.int64 of shape \(3,\)",
    ),
    ({"sample_ids": [0, 1, 2, 3]}, TypeError, r"sample_ids must be a whole number or an int64 tensor \[\] or \[4\], got list"),
    ({"sample_ids": 2.5}, TypeError, r"sample_ids must be a whole number or an int64 tensor \[\] or \[4\], got float"),
    ({"sample_ids": torch.tensor(-1)}, ValueError, r"sample_ids must lie in .*, got -1"),
    ({"flip": "a"}, TypeError, r"flip must be a number, got str"),
    ({"flip": math.nan}, ValueError, r"flip must be finite, got nan"),
    ({"x1": X1.to_sparse()}, TypeError, r"x1 must be a dense tensor, got torch.sparse_coo; use x1.to_dense\(\)"),
    (
        {"x1": torch.nested.nested_tensor([X1[0], X1[1, :2]], layout=torch.jagged)},
        TypeError,
        r"x1 must be a dense tensor, got a nested one; pad it, and give a",
    ),
    ({"x0": X1.to_sparse()}, TypeError, r"x0 must be a dense tensor, got torch.sparse_coo"),
    ({"dequantise": "no"}, TypeError, r"dequantise must be True or False, got 'no'"),
    ({"t": True}, TypeError, r"t must be a torch.Tensor, got bool"),
    ({"levels": True}, ValueError, r"levels must be a whole number in \[2, 256\], got True"),
    ({"levels": 17.0}, ValueError, r"levels must be a whole number in \[2, 256\], got 17.0"),
    ({"sample_ids": torch.zeros(4)}, ValueError, r"sample_ids must be .*, got torch.float32"),
    ({"sample_ids": torch.tensor([0, 1, 2, -3])}, ValueError, r"sample_ids must lie in .* from -3 to 2"),
    ({"backend": "opencl"}, ValueError, r"backend must be one of reference, cpp, cuda, triton, got 'opencl'"),
    ({"backend": "cuda"}, RuntimeError, r"backend='cuda' can't run path_sample on cpu: it runs on cuda, not on cpu"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_SAMPLE_ARGUMENTS, ids=lambda v: str(v)[:60] if isinstance(v, dict) else "")
def test_bad_arguments_of_sample_path(change, error, message):
    arguments = {"x1": X1, **SEEDED, **change}
    x1 = arguments.pop("x1")
    with pytest.raises(error, match=message):
        fm.sample_path(x1, **arguments)
    with pytest.raises(error, match=message):
        fm.flow_matching_loss(lambda x, t: x, x1, **arguments)


BAD_LOSS_ARGUMENTS = [
    ({"o": None}, TypeError, r"o must be a torch.Tensor, got NoneType"),
    ({"o": torch.zeros(4, 3, 8, 1)}, ValueError, r"o must have the shape of x1, \(4, 3, 8, 8\), got \(4, 3, 8, 1\)"),
    ({"o": torch.zeros(4, 3, 8, 8, dtype=torch.int64)}, TypeError, r"o must be float64, .*, got torch.int64"),
    ({"reduction": "average"}, ValueError, r"reduction must be one of mean, sum, none, weighted_mean, got 'average'"),
    ({"o": X1.to_sparse()}, TypeError, r"o must be a dense tensor, got torch.sparse_coo"),
    ({"weight": torch.ones(4).to_sparse()}, TypeError, r"weight must be a dense tensor, got torch.sparse_coo"),
    ({"weight": torch.ones(4) * 1j}, TypeError, r"weight must be real, got torch.complex64"),
    ({"weight": 2.0}, TypeError, r"weight must be a torch.Tensor, got float"),
    (
        {"weight": len},
        TypeError,
        r"weight must be a torch.Tensor, got builtin.*; weights of t are computed from the t of sample_path",
    ),
    ({"weight": torch.ones(8)}, ValueError, r"weight must have shape \[4\] or 4 dimensions that broadcast to \(4, 3, 8, 8\), got \(8,\)"),
    (
        {"weight": torch.ones(4, 3, 8, 7)},
        ValueError,
        r"weight must have shape \[4\] or 4 dimensions that broadcast to .*, got \(4, 3, 8, 7\)",
    ),
    ({"weight": torch.ones(4, device="meta")}, ValueError, r"weight must be on the device of x1, cpu, got meta"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_LOSS_ARGUMENTS, ids=lambda v: str(v)[:60] if isinstance(v, dict) else "")
def test_bad_arguments_of_the_loss(change, error, message, backend):
    sample = fm.sample_path(X1, backend=backend, **SEEDED)
    with pytest.raises(error, match=message):
        sample.loss(**{"o": X1, **change})


def test_unknown_keywords_are_errors():
    with pytest.raises(TypeError, match="n_probes"):
        fm.sample_path(X1, n_probes=4, **SEEDED)
    with pytest.raises(TypeError, match="reduce"):
        fm.flow_matching_loss(lambda x, t: x, X1, reduce="mean", **SEEDED)
    with pytest.raises(TypeError, match=r"unknown settings pth; known are backend, cond"):
        fm.FlowMatchingLoss(pth="vp")


def test_a_seed_alone_is_enough_when_nothing_is_drawn():
    s = fm.sample_path(X1, x0=X1, t=0.5, seed=1)
    assert s.x_t.shape == X1.shape


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"stream": "eps"}, ValueError, r"stream must be one of x0, t, probe"),
        ({"kind": "gauss"}, ValueError, r"kind must be one of normal, uniform, sign, word, got 'gauss'"),
        ({"index": torch.tensor(1)}, TypeError, r"index must be a whole number, got a tensor"),
        ({"index": 2**24}, ValueError, r"index must lie in \[0, 16777216\), got 16777216"),
        ({"shape": 3}, TypeError, r"shape must be a tuple of whole numbers, got 3"),
        ({"shape": torch.zeros(3)}, TypeError, r"shape must be a tuple of whole numbers, got Tensor"),
        ({"shape": (2, None)}, TypeError, r"shape must be a tuple of whole numbers, got \(2, None\)"),
        ({"shape": (2.0, 3)}, TypeError, r"shape must be a tuple of whole numbers, got \(2.0, 3\)"),
        ({"shape": ()}, ValueError, r"shape must be \[B, ...\] of whole numbers, got \(\)"),
        ({"shape": (2, -1)}, ValueError, r"shape must be \[B, ...\] of whole numbers, got \(2, -1\)"),
        ({"dtype": torch.int8}, ValueError, r"dtype must be one of"),
        ({"seed": None}, TypeError, r"seed must be a whole number"),
        ({"step": None}, TypeError, r"step must be a whole number"),
    ],
    ids=lambda v: str(v)[:40] if isinstance(v, dict) else "",
)
def test_bad_arguments_of_noise(arguments, error, message):
    with pytest.raises(error, match=message):
        fm.noise(**{"shape": (2, 3), "seed": 1, "step": 2, **arguments})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fm.OT(sigma_min=-0.1), r"sigma_min must lie in \[0, 1\), got -0.1"),
        (lambda: fm.VP(beta_min=0.0), r"beta_min and beta_max must satisfy 0 < beta_min <= beta_max, got 0.0 and 20.0"),
        (lambda: fm.VE(sigma_min=3.0, sigma_max=2.0), r"sigma_min and sigma_max must satisfy 0 < sigma_min < sigma_max, got 3.0 and 2.0"),
        (lambda: fm.VE(sigma_max=float("inf")), r"sigma_max must be finite, got inf"),
        (lambda: fm.LogitNormal(mean=float("nan")), r"mean must be finite, got nan"),
        (lambda: fm.LogitNormal(std=0.0), r"std must be positive, got 0.0"),
        (lambda: fm.objectives.velocity_coefficients("ot", "velocity", 5.0), r"t must lie in \[0, 1\], got 5.0"),
        (lambda: fm.FlowMatchingLoss(path="typo"), r"path must be one of"),
        (lambda: fm.FlowMatchingLoss(reduction="average"), r"reduction must be one of"),
    ],
)
def test_bad_parameters_of_value_objects(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", ["mean", "std"])
def test_parameters_of_a_time_sampler_are_numbers(name):
    with pytest.raises(TypeError, match=f"{name} must be a number, got str"):
        fm.LogitNormal(**{name: "a"})


def test_a_velocity_that_is_nowhere_finite_is_an_error():
    class Standing(fm.OT):
        def alpha(self, t):
            return torch.zeros_like(t)

    with pytest.raises(ValueError, match="no finite velocity"):
        fm.objectives.velocity_coefficients(Standing(), "noise", 0.5)


@pytest.mark.parametrize(
    ("low", "high", "error", "message"),
    [
        (0.8, 0.2, ValueError, r"t_min and t_max of a path must satisfy 0 <= t_min < t_max <= 1, got 0.8 and 0.2"),
        (-2.0, 5.0, ValueError, r"must satisfy 0 <= t_min < t_max <= 1, got -2.0 and 5.0"),
        (math.nan, 1.0, ValueError, r"t_min of a path must be finite, got nan"),
        (0.0, "late", TypeError, r"t_max of a path must be a number, got str"),
    ],
)
def test_the_range_of_a_path_is_checked(low, high, error, message):
    class Limited(fm.OT):
        t_min, t_max = low, high

    with pytest.raises(error, match=message):
        fm.sample_path(X1, path=Limited(), **SEEDED)
    with pytest.raises(error, match=message):
        fm.sample(lambda x, t: x, X1, path=Limited(), steps=2)


def test_parameters_of_built_in_paths_are_numbers():
    with pytest.raises(TypeError, match="beta_min must be a number, got Tensor; write a path object of your own to train it"):
        fm.VP(beta_min=torch.tensor(0.1, requires_grad=True))


def test_a_condition_must_be_keyword_arguments():
    with pytest.raises(TypeError, match="cond must be a mapping of keyword arguments of the model, got Tensor"):
        fm.flow_matching_loss(lambda x, t: x, X1, cond=torch.arange(4), **SEEDED)


def test_no_noise_but_noise_is_no_path():
    with pytest.raises(ValueError, match=r"sigma_min must lie in \[0, 1\), got 1.0"):
        fm.OT(sigma_min=1.0)


def test_a_ve_path_needs_two_scales():
    with pytest.raises(ValueError, match=r"0 < sigma_min < sigma_max, got 2.0 and 2.0"):
        fm.VE(2.0, 2.0)


def test_a_path_needs_a_range_of_times():
    class Limited(fm.OT):
        t_min = t_max = 0.5

    with pytest.raises(ValueError, match=r"0 <= t_min < t_max <= 1, got 0.5 and 0.5"):
        fm.sample_path(X1, path=Limited(), seed=1, step=2)


def test_times_that_are_no_numbers_are_outside():
    with pytest.raises(ValueError, match=r"t must lie in \[0, 1\], got nan"):
        fm.objectives.velocity_coefficients("ot", "velocity", float("nan"))
