"""Every op on the CPU at two sizes, beside its plain reference: ``make bench-regression`` compares a run with the one before it.

A group holds the backend that runs by default and the reference, on the same inputs, whose results must agree before they are timed.
Nothing is asserted of times: compare medians, and the change of ours with that of the reference, which tells what the machine did.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import fm_fast as fm
from fm_fast import _backends, _ops
from fm_fast.nn.norm import GroupNormSiLU
from fm_fast.random import make_key
from fm_fast.train.optimiser.adamw_ema import AdamWEMA
from fm_fast.train.optimiser.averaging import fixed_decay

THREADS = 2
PROBES = 4
# Coefficients of x and of four model outputs, as in the last update of a step of RK4.
RK4_ROW = (1.0, 1 / 60, 1 / 30, 1 / 30, 1 / 60)
CPU = torch.device("cpu")
SMALL, LARGE = (128, 3, 32, 32), (16, 3, 256, 256)

Step = Callable[[], Tensor]


@dataclass(frozen=True)
class Case:
    """An op: from (backend, shape) to a step that returns a tensor to compare; the sizes that it runs at."""

    build: Callable[[str, tuple[int, ...]], Step]
    sizes: tuple[tuple[int, ...], ...] = (SMALL, LARGE)


def _data(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _path_sample(backend: str, shape: tuple[int, ...]) -> Step:
    x1 = _data(*shape)
    return lambda: fm.sample_path(x1, seed=0, step=1, backend=backend).x_t


def _path_loss(backend: str, shape: tuple[int, ...]) -> Step:
    """Loss and gradient."""
    sample, o = fm.sample_path(_data(*shape), seed=0, step=1, backend=backend), _data(*shape, seed=1).requires_grad_()
    return lambda: torch.autograd.grad(sample.loss(o), o)[0]


def _linear_step(backend: str, shape: tuple[int, ...]) -> Step:
    x, outputs = _data(*shape), [_data(*shape, seed=1 + i) for i in range(len(RK4_ROW) - 1)]
    op, out, table, no_copy = _ops.linear_step(backend), torch.empty_like(x), torch.tensor([RK4_ROW], dtype=torch.float64), torch.empty(0)

    def step() -> Tensor:
        op(out, no_copy, x, outputs, table, 0, 1.0)
        return out

    return step


def _step_error(backend: str, shape: tuple[int, ...]) -> Step:
    y, end, *slopes = (_data(*shape, seed=i) for i in range(8))
    means, coefficients = torch.empty(shape[0], dtype=torch.float64), torch.arange(1.0, 7.0, dtype=torch.float64)

    def step() -> Tensor:
        _ops.step_error(backend)(means, y, end, slopes, coefficients, 1e-3, 1e-3)
        return means

    return step


def _probe_set(batch: int) -> _ops.ProbeSet:
    words = torch.empty(0, dtype=torch.int64)
    return _ops.ProbeSet(make_key(0, 1, None, batch, CPU), words, words, 0, PROBES, 1, normal=False)


def _probe(backend: str, shape: tuple[int, ...]) -> Step:
    like, probes = _data(*shape), _probe_set(shape[0])
    return lambda: _ops.probe(like, probes, 0, PROBES, backend)


def _divergence_step(backend: str, shape: tuple[int, ...]) -> Step:
    products, probes = _data(PROBES, *shape), _probe_set(shape[0])
    sums, dots = torch.zeros(2, shape[0], dtype=torch.float64), torch.empty(PROBES, shape[0], dtype=torch.float64)

    def step() -> Tensor:
        _ops.divergence_step(sums.zero_(), dots, products, probes, 0, 0.0, 1.0, backend)
        return dots

    return step


def _group_norm_silu(backend: str, shape: tuple[int, ...]) -> Step:
    """Forward and backward; the gradient of x."""
    layer, grad_y = GroupNormSiLU(32, shape[1], fused=backend != "reference"), _data(*shape, seed=1)
    x = _data(*shape).requires_grad_()
    return lambda: torch.autograd.grad(layer(x), [x, *layer.parameters()], grad_y)[0]


def _adamw_ema(backend: str, shape: tuple[int, ...]) -> Step:
    """Clipping, AdamW and one average of ``shape[0]`` parameters of ``shape[1]`` elements; the first parameter."""
    parameters = [nn.Parameter(_data(shape[1], seed=i)) for i in range(shape[0])]
    for i, p in enumerate(parameters):
        p.grad = _data(shape[1], seed=shape[0] + i)
    optimiser = AdamWEMA(parameters, max_norm=1.0, averages=[fixed_decay(0.999)], backend=backend)

    def step() -> Tensor:
        optimiser.step()
        return parameters[0].detach()

    return step


def _conv_weight_grad(backend: str, shape: tuple[int, ...]) -> Step:
    """Of a 3x3 convolution that keeps the number of channels; the gradient of its weight, of the size of the data."""
    x, grad_y = (_data(*shape, seed=i).contiguous(memory_format=torch.channels_last) for i in range(2))
    weight = torch.empty(shape[1], shape[1], 3, 3)
    grad_y /= (shape[0] * shape[2] * shape[3]) ** 0.5
    return lambda: _ops.conv_weight_grad(grad_y, x, weight, True, backend)[0]


CASES = {
    "path_sample": Case(_path_sample),
    "path_loss": Case(_path_loss),
    "linear_step": Case(_linear_step),
    "step_error": Case(_step_error),
    "divergence_step": Case(_divergence_step),
    "probe": Case(_probe),
    "group_norm_silu": Case(_group_norm_silu, ((64, 128, 8, 8), (64, 32, 32, 32))),
    "conv_weight_grad": Case(_conv_weight_grad, ((64, 128, 8, 8), (64, 32, 32, 32))),
    "adamw_ema": Case(_adamw_ema, ((50, 1_000), (50, 40_000))),
}
PROBLEMS = [(op, shape) for op, case in CASES.items() for shape in case.sizes]
NAMES = [f"{op}-{'x'.join(map(str, shape))}" for op, shape in PROBLEMS]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("kind", ["ours", "reference"])
@pytest.mark.parametrize(("op", "shape"), PROBLEMS, ids=NAMES)
def test_speed(benchmark, op: str, shape: tuple[int, ...], kind: str) -> None:
    ours = _backends.resolve(op, CPU)
    assert ours != "reference", f"{op} has no kernel here: build the C++ library first"
    case = CASES[op]
    step = case.build(ours if kind == "ours" else "reference", shape)
    torch.testing.assert_close(step(), case.build("reference", shape)(), rtol=1e-4, atol=1e-4)
    benchmark.group = f"{op} {'x'.join(map(str, shape))}"
    benchmark(step)
