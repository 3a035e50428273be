"""Every op has a benchmark whose providers agree with float64, and which a wrong result of ours stops; parts of a step are timed alone."""

import json
import pathlib
import sys
from dataclasses import replace

import pytest
import torch

sys.path.append(str(pathlib.Path(__file__).parent.parent))

from benchmarks import costs, registry, run
from benchmarks.op import Inexact, Setting, keeping_graphs
from benchmarks.ops import divergence_step, group_norm_silu, path_loss, sampler
from fm_fast import _backends
from fm_fast._schemas import SCHEMAS

CPU = torch.device("cpu")
# A benchmark of one name times both; that of couplings times their assignment.
WITH_OTHERS = {"path_loss_backward", "group_norm_silu_backward", "attention_backward", "adamw_ema_norm", "assignment"}
SINGLE_OPS = ("noise", "path_sample", "linear_step", "step_error", "probe", "divergence_step", "conv3x3", "conv_weight_grad", "attention")
TINY = {
    "path_sample": (64, 3, 5, 7),
    "step_control": (64,),
    "probe": (16, 33),
    "conv3x3": (3, 16, 32, 5),
    "conv_weight_grad": (3, 16, 32, 5),
    "attention": (3, 25, 2, 16),
}
PROBLEMS = [(name, mode) for name in SINGLE_OPS for mode in registry.find(name).modes]


def setting_of(name, mode, dtype=torch.float32):
    return Setting(CPU, "tiny", TINY.get(name, (8, 3, 5, 7)), dtype, mode)


def test_every_op_has_a_benchmark():
    assert set(SCHEMAS) - WITH_OTHERS <= set(registry.NAMES)
    assert all(registry.find(name).name == name for name in registry.NAMES)


HALVES = (torch.bfloat16, torch.float16)
TYPED = [(*problem, torch.float32) for problem in PROBLEMS]
TYPED += [(name, mode, dtype) for name, mode in PROBLEMS for dtype in HALVES if not name.startswith("conv")]
OTHERS = ["eager", "torch, ", "NumPy", "matmul", "floor", "torchcfm", "flow"]


@pytest.mark.parametrize(("name", "mode", "dtype"), TYPED, ids=str)
def test_every_eager_provider_passes(name, mode, dtype):
    steps = run.gate(registry.find(name), setting_of(name, mode, dtype), OTHERS).steps
    assert next(iter(steps)).startswith("fm_fast") and len(steps) >= 4


def test_the_providers_of_step_control_pass():
    for mode in registry.find("step_control").modes:
        assert len(run.gate(registry.find("step_control"), setting_of("step_control", mode), ["eager", "compile"]).steps) == 3


@pytest.mark.parametrize("name", ["noise", "path_sample", "linear_step", "step_error", "probe"])
def test_compiled_providers_pass(name):
    op = registry.find(name)
    assert any("compile" in step for step in run.gate(op, setting_of(name, op.modes[-1]), ["compile"]).steps)


def _spoiled(kernel, number):
    """The kernel, but what it writes into the argument of that number is off by a thousandth."""

    def wrong(*arguments):
        kernel(*arguments)
        arguments[number].mul_(1.0 + 1e-3)

    return wrong


@pytest.mark.skipif(_backends.resolve("path_sample", CPU) == "reference", reason="no kernel runs here")
@pytest.mark.parametrize(("name", "mode"), [*PROBLEMS, ("step_control", "one part")])
def test_a_wrong_kernel_stops_the_run(name, mode, monkeypatch):
    kernels = getattr(sys.modules[f"fm_fast._ops.{name}"], f"_{name}")
    for backend in list(kernels):
        monkeypatch.setitem(kernels, backend, _spoiled(kernels[backend], 0))
    with pytest.raises(SystemExit, match=r"fm_fast cpp is wrong, so nothing is timed: "):
        run.gate(registry.find(name), setting_of(name, mode), [])


def test_numbers_of_another_step_stop_the_run(monkeypatch):
    """Normal, and fresh, but not those that the contract names."""
    import fm_fast as fm

    right = fm.noise
    monkeypatch.setattr(fm, "noise", lambda shape, seed, step, **settings: right(shape, seed=seed, step=step + 1, **settings))
    with pytest.raises(SystemExit, match=r"fm_fast \w+ is wrong, so nothing is timed: the numbers are off by"):
        run.gate(registry.find("noise"), setting_of("noise", "normal"), [])


PARTS = ("full", "forward", "backward")


@pytest.mark.parametrize("op", [path_loss.OP, group_norm_silu.OP], ids=lambda op: op.name)
def test_parts_are_timed_alone_and_named(op, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run, "WARM_UP_SECONDS", 0.01)
    file, (mode, *_) = tmp_path / "rows.json", op.modes
    size = {"path_loss": "robotics", "group_norm_silu": "8x8"}[op.name]
    words = ["--op", op.name, "--size", size, "--mode", mode, "--part", *PARTS, "--rounds", "1", "--only", "eager"]
    run.main([*words, "--out", str(file), "--threads", str(torch.get_num_threads())])
    rows = json.loads(file.read_text())
    modes = list(dict.fromkeys(row["mode"] for row in rows if row["mode"].split(", ")[0] == mode))
    assert modes == [mode, f"{mode}, forward", f"{mode}, backward"]
    assert f"{mode}, backward\n" in capsys.readouterr().out


@pytest.mark.parametrize("part", ["full", "call"])
def test_a_solvers_time_is_that_beyond_the_models_calls(part):
    """On a clock that stands still but in the solver, for 7 seconds, and 2 more for each step."""
    time = [0.0]

    def solve(model, noise, steps):
        time[0] += 7.0 + 2.0 * steps
        return noise

    setting = Setting(CPU, "tiny", (1, 2), torch.float32, "euler", part)
    solver = sampler._build(solve, 1)(sampler.Inputs(torch.zeros(1, 2), lambda x, t: x), setting)
    assert sampler._overhead(solver, lambda: time[0]) == (2.0 if part == "full" else 7.0 + 2.0 * sampler.FEW_STEPS)


def test_a_part_that_an_op_has_not_is_named():
    with pytest.raises(SystemExit, match="--part must be some of full for op noise, got backward"):
        list(run.settings(registry.find("noise"), run.parse(["--op", "noise", "--part", "full", "backward"])))


@pytest.mark.parametrize("part", PARTS)
def test_a_wrong_gradient_stops_all_but_the_forward_pass(part, monkeypatch):
    setting = Setting(CPU, "tiny", (64, 3, 5, 7), torch.float32, "x0 drawn", part)
    right = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *arguments, **settings: [1.001 * g for g in right(*arguments, **settings)])
    if part == "forward":
        assert run.gate(path_loss.OP, setting, []).steps
        return
    with pytest.raises(SystemExit, match=r"is wrong, so nothing is timed: gradient is off by 1.0e-03"):
        run.gate(path_loss.OP, setting, [])


def test_a_backward_pass_repeats_and_saves_what_forward_made():
    """The compiled one too: its saved tensors' memory is not given away."""
    setting = Setting(CPU, "tiny", (64, 3, 5, 7), torch.float32, "x0 given", "backward")
    for name, (step,) in run.gate(path_loss.OP, setting, ["naive", "inside"]).steps.items():
        first = step().grad.clone()
        assert torch.equal(step().grad, first), name


def test_what_a_compiled_backward_pass_runs_is_not_counted():
    x = torch.randn(1000, requires_grad=True)
    with keeping_graphs():
        y = torch.compile(lambda x: (x.sin() ** 2).mean(), dynamic=False)(x)
    found = costs.of_step(lambda: torch.autograd.grad(y, x, retain_graph=True)[0], CPU)
    assert found.kernels is None and found.traffic is None and found.peak >= 4000


def test_further_sizes_are_for_a_gpu(monkeypatch):
    op = replace(path_loss.OP, gpu_sizes={"huge": (1, 2)})
    asked = {device: run.parse(["--device", device]) for device in ("cpu", "cuda")}
    sizes = {device: {setting.size for setting in run.settings(op, options)} for device, options in asked.items()}
    assert sizes["cuda"] - sizes["cpu"] == {"huge"}


def test_a_variance_that_float32_sums_round_away_is_inexact_and_a_worse_one_wrong():
    setting = Setting(CPU, "large", (2, 196608), torch.float32, "16 probes")
    given = divergence_step.inputs(setting)
    exact = divergence_step._formula(given.z.double(), given.products.double(), torch.zeros(2, 2, dtype=torch.float64))
    bound = divergence_step._rounded_away(given)
    assert divergence_step.TOLERANCE < bound < 2e-4

    def off_by(error):
        return lambda: torch.stack([exact[0], exact[1] * (1.0 + error)])

    divergence_step.check(given, setting, off_by(0.9 * divergence_step.TOLERANCE))
    with pytest.raises(Inexact):
        divergence_step.check(given, setting, off_by(0.9 * bound))
    with pytest.raises(AssertionError) as found:
        divergence_step.check(given, setting, off_by(1.1 * bound))
    assert not isinstance(found.value, Inexact)


def test_pairs_that_are_not_optimal_stop_the_run(monkeypatch):
    import fm_fast as fm

    op, setting = registry.find("coupling"), Setting(CPU, "tiny", (32, 3, 2, 2), torch.float32, "exact")
    assert list(run.gate(op, setting, ["naive", "torchcfm"]).steps)[:2] == ["fm_fast", "naive: cdist, SciPy"]
    monkeypatch.setattr(fm.couplings, "optimal_ids", lambda x1, seed, step: torch.arange(len(x1)))
    with pytest.raises(SystemExit, match=r"fm_fast is wrong, so nothing is timed: \d+ of 32 pairs are not optimal"):
        run.gate(op, setting, [])
