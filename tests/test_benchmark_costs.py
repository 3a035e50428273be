"""What the benchmarks count of a step, against steps whose peak, kernels and memory passes are known by hand."""

import gc
import pathlib
import sys

import pytest
import torch

sys.path.append(str(pathlib.Path(__file__).parent.parent))

from benchmarks import costs, run
from benchmarks.op import Op, Provider, Setting, bytes_of_shape
from benchmarks.ops import adamw_ema, path_loss, sampler
from fm_fast import _backends

CPU = torch.device("cpu")
NATIVE = _backends.why_not("path_sample", "cpu", "cpp")
needs_native = pytest.mark.skipif(NATIVE is not None, reason=f"the C++ backend cannot run: {NATIVE}")
SIZE = 1 << 16
FULL = 4 * SIZE
SETTING = Setting(CPU, "test", (64, 4, 16, 16), torch.float32, "x0 drawn")


def of_step(step):
    step()
    return costs.of_step(step, CPU)


def test_a_chain_keeps_two_tensors_at_a_time():
    x = torch.ones(SIZE)

    def chain():
        y = x
        for _ in range(5):
            y = y.neg()  # the one before is freed as soon as this one is there
        return y

    assert of_step(chain) == costs.Costs(2 * FULL, 5, 10 * FULL)


def test_memory_from_before_does_not_count_on_the_cpu():
    """Neither while it is there nor when the step frees it."""
    x, kept = torch.ones(SIZE), []

    def step():
        kept.clear()
        kept.append(x.neg())
        more = [x.neg(), x.neg()]
        del more

    assert of_step(step).peak == 3 * FULL


def test_autograd_saves_what_backward_needs():
    """The results of exp and sigmoid, which their gradients need, and these two gradients, are there at once."""
    x = torch.ones(SIZE, requires_grad=True)
    found = of_step(lambda: torch.autograd.grad(x.exp().sigmoid(), x, torch.ones(()).expand(SIZE))[0])
    assert found.peak == 4 * FULL + 4


def test_views_and_allocations_are_no_kernels_and_a_broadcast_is_read_once():
    x, row = torch.ones(256, 256), torch.ones(256)

    def step():
        y = torch.empty_like(x)
        torch.add(x.t().t().reshape(256, 256), row.expand(256, 256), out=y)
        return y.view(-1)[:7].detach()

    assert of_step(step) == costs.Costs(FULL, 1, 2 * FULL + 1024)


@pytest.mark.parametrize(
    ("step", "passes"),
    [
        (lambda x: x.fill_(1.0), 1),
        (lambda x: x.copy_(x.new_zeros(())), 1),
        (lambda x: x.add_(1.0), 2),
        (lambda x: torch.mul(x, x), 2),
        (lambda x: torch.randn_like(x), 1),
        (lambda x: torch._foreach_mul_([x, x[:0]], 2.0), 2),
    ],
    ids=["overwritten", "copied", "changed", "twice the same", "shape alone", "foreach"],
)
def test_what_an_op_reads_and_writes(step, passes):
    x = torch.ones(SIZE)
    assert round(of_step(lambda: step(x)).traffic / FULL, 3) == passes


def test_the_naive_loss_by_hand():
    """randn 1; (1 - t) x0 and t x1 2 each, their sum 3; x1 - x0 3, o - that 3, its square 2, the mean 1. Backward: 1 / N 1, the error to
    the power of 1 2, twice that 2, the product 3. At the peak, backward, x0, x_t, the error and four on the way to the gradient."""
    found = of_step(_naive("naive eager"))
    assert round(found.traffic / FULL, 1) == 25.0
    # randn, rand, 1 - t, 2 products, sum, 2 differences, square, mean; ones, 1 / N, power, 2 products
    assert found.kernels == 15 and found.peak / FULL == pytest.approx(7.0, abs=0.01)


def test_the_fewest_passes_of_eager_pytorch_by_hand():
    """randn 1, lerp 3, difference 3, mse_loss 2, its gradient 3; and rand, ones."""
    found = of_step(_naive("best eager"))
    assert round(found.traffic / FULL, 1) == 12.0 and found.kernels == 7


def _naive(name):
    (provider,) = [provider for provider in path_loss.providers(SETTING) if provider.name == name]
    return provider.build(path_loss.inputs(SETTING), SETTING)


@needs_native
def test_the_fused_loss_stores_its_results_alone():
    """path_sample reads x1 and writes x_t; path_loss reads o, x1 and x_t and writes the gradient; ones for the gradient of the loss."""
    found = of_step(path_loss.providers(SETTING)[0].build(path_loss.inputs(SETTING), SETTING))
    assert round(found.traffic / FULL, 1) == 6.0 and found.kernels == 3 and found.peak / FULL == pytest.approx(2.0, abs=0.1)


@needs_native
def test_the_optimiser_in_passes_over_its_weights():
    """The gradient twice, and weights, two moments and an average in and out."""
    setting = Setting(CPU, "tiny", (32, 1, 1), torch.float32, "1 average")
    found = of_step(adamw_ema.providers(setting)[0].build(adamw_ema.inputs(setting), setting))
    assert found.traffic / adamw_ema.tensor_bytes(setting) == pytest.approx(10.0, abs=0.05)


@needs_native
def test_a_solver_step_is_counted_without_the_solve_around_it():
    """x and the velocity in, x out; the midpoint rule does that twice."""
    for mode, kernels in {"euler": 1, "midpoint": 2}.items():
        setting = Setting(CPU, "test", (64, 256), torch.float32, mode)
        found = sampler.costs_of_a_step(sampler.providers(setting)[0].build(sampler.inputs(setting), setting), CPU)
        assert found.kernels == kernels and found.traffic == pytest.approx(kernels * 3 * 64 * 256 * 4, rel=2e-3)


@pytest.mark.parametrize(("backend", "peak"), [("aot_eager", 2), pytest.param("inductor", 1, marks=pytest.mark.slow)])
def test_of_a_compiled_step_only_the_memory_is_known(backend, peak):
    """Fused, the sine is not stored."""
    compiled, x = torch.compile(lambda x: x.sin() + 1.0, dynamic=False, backend=backend), torch.ones(SIZE)
    found = of_step(lambda: compiled(x))
    assert found.kernels is None and found.traffic is None and found.peak == pytest.approx(peak * FULL, abs=64)


def test_an_error_leaves_the_collector_of_garbage_as_it_was():
    def broken():
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        costs.of_step(broken, CPU)
    assert gc.isenabled()


def test_rows_and_table_show_what_is_known():
    """A step of two kernels and one that is compiled, of one full-size tensor each."""
    x = torch.ones(64, 64)
    compiled = torch.compile(lambda y: y + 1.0, dynamic=False, backend="aot_eager")
    steps = {"fm_fast": lambda: x.neg().neg(), "compile": lambda: compiled(x)}
    providers = [Provider(name, lambda given, setting, step=step: step) for name, step in steps.items()]
    op = Op("test", {}, (), lambda setting: None, lambda setting: providers, lambda *arguments: None, tensor_bytes=bytes_of_shape)
    setting = Setting(CPU, "test", (64, 64), torch.float32, "mode")
    rows = run.measure(op, setting, run.parse(["--rounds", "1"]))
    found = {(row.provider, row.metric): row.median for row in rows}
    assert found["fm_fast", "kernels"] == 2 and found["fm_fast", "passes"] == 4
    assert found["fm_fast", "peak_mib"] == 2 / 64 and found["fm_fast", "peak_tensors"] == 2
    assert ("compile", "kernels") not in found and ("compile", "passes") not in found and found["compile", "peak_tensors"] < 1.01
    head, ours, other = run.table(rows, "fm_fast").splitlines()[2:]
    assert head.split()[-5:] == ["peak", "MiB", "tensors", "kernels", "passes"]
    assert ours.split()[-4:] == ["0.0312", "2", "2", "4"] and other.split()[-2:] == ["0.0156", "1"]
