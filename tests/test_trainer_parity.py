"""The trainer's ops compiled, against torch's own functions in float64: C++ on the CPU, Triton on a GPU where there is one."""

import pytest
import torch
from adamw_cases import SETTINGS, TorchSteps, gradients, parameters
from norm_cases import LAYER, Case, assert_close, expected, inputs, key, uncancelled, with_gradients

from fm_fast import _backends, _ops
from fm_fast.train.optimiser.adamw_ema import AdamWEMA
from fm_fast.train.optimiser.averaging import power_function, warmed_up_decay

on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
OPS = ("group_norm_silu", "adamw_ema")
CASES = [
    Case(2, 6, groups=3, size=(5, 7)),
    Case(2, 12, 20, groups=4, size=(5, 3), dropout=0.3, ids=(7, 3)),  # a group lies in both inputs
    Case(17, 4, groups=2, size=(2, 2)),
    Case(1, 2, groups=1, size=(75, 75), dropout=0.2),
    # The U-Net's own: a level of 128 channels, the middle, and the way up with what the way down left.
    Case(8, 128, groups=32, size=(32, 32), layouts="lll", dropout=0.1),
    Case(8, 256, groups=32, size=(8, 8), layouts="lll"),
    Case(4, 256, 128, groups=32, size=(16, 16), layouts="lll"),
    Case(4, 256, 128, groups=32, size=(16, 16), layouts="ccc", modulated=False),
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=[("cpu", "cpp"), pytest.param(("cuda", "triton"), marks=on_gpu)], ids="-".join)
def place(request):
    for reason in (_backends.why_not(op, *request.param) for op in OPS):
        if reason is not None:
            pytest.skip(reason)
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_norm_and_its_gradients(place, case, dtype):
    device, backend = place
    case = Case(**{**case.__dict__, "dtype": dtype})
    settings = _ops.NormSettings(case.groups, 1e-5, case.activation, case.dropout, LAYER)
    tensors, grad_y = inputs(case)
    there = [None if t is None else t.to(device) for t in tensors]

    def run(*tensors):
        return _ops.group_norm_silu(tensors, key(case).to(device) if case.dropout else None, settings, backend)

    got = with_gradients(run, there, grad_y.to(device))
    assert_close({name: value.cpu() for name, value in got.items()}, expected(case, tensors, grad_y), uncancelled(case, tensors, grad_y))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_optimiser_and_its_averages(place, dtype):
    """Many steps; every fifth gradient is not finite, which torch's optimiser is not shown."""
    device, backend = place
    start = parameters(dtype)
    model, weights = TorchSteps(start, torch.float64), [torch.nn.Parameter(p.to(device)) for p in start]
    rate, *betas, epsilon, weight_decay, norm = SETTINGS
    averages = [warmed_up_decay(0.9), power_function(6.94)]
    optimiser = AdamWEMA(weights, rate, tuple(betas), epsilon, weight_decay, max_norm=norm, averages=averages, backend=backend)
    for step in range(20):
        grads = gradients(start, step)
        for p, g in zip(weights, grads, strict=True):
            p.grad = g.to(device)
        if step % 5 == 3:
            weights[-1].grad.view(-1)[0] = torch.inf
        else:
            model.step(grads)
        optimiser.step()
    assert (int(optimiser.updates), int(optimiser.skipped)) == (16, 4)
    tolerance = {"rtol": 1e-12, "atol": 1e-14} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-6}
    for i, p in enumerate(weights):
        torch.testing.assert_close(p.detach().cpu().double(), model.parameters[i].detach(), **tolerance)
        found = optimiser.state[p]["averages"].cpu().double()
        torch.testing.assert_close(found, torch.stack([average[i] for average in model.averages]), **tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_weights_are_their_masters_rounded(place, dtype):
    device, backend = place
    weights = [torch.nn.Parameter(p.to(device, dtype)) for p in parameters()]
    optimiser = AdamWEMA(weights, 1e-2, backend=backend)
    before = [p.detach().clone() for p in weights]
    for step in range(3):
        for p, g in zip(weights, gradients([p.detach().cpu() for p in weights], step), strict=True):
            p.grad = g.to(device)
        optimiser.step()
    for p, old in zip(weights, before, strict=True):
        assert torch.equal(p.detach(), optimiser.state[p]["master"].to(dtype))
        assert p.numel() == 0 or not torch.equal(p.detach(), old)
