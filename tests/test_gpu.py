"""Every backend of a CUDA device on a real GPU, through the public functions: parity, CUDA graphs, repeatability, streams, size."""

import itertools
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import control_cases
import device_parity as parity
import pytest
import torch
from copies import run_python
from device_parity import SEED, STEP, array, data, sample_path
from trainer_helpers import advance, tiny

import fm_fast as fm
from fm_fast import _backends, _ops, random
from fm_fast.train.data import DataOrder, OrderAhead, digits
from fm_fast.train.execution.graph import WARM_UP_STEPS, CudaRecorder, GraphedStep
from fm_fast.train.step import new_state

# In one process of several: each looks for free memory first, and another must not take it meanwhile.
large = pytest.mark.xdist_group("memory")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(params=["cuda", "triton"])
def place(request):
    reason = _backends.why_not("path_loss", "cuda", request.param)
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return parity.Place("cuda", request.param)


@pytest.mark.parametrize("shape", parity.SHAPES, ids=str)
@pytest.mark.parametrize("dtype", parity.DTYPES, ids=str)
def test_training_ops_match_the_model(place, shape, dtype):
    parity.check_training_ops(place, shape, dtype)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("shape", [(300, 2), (7, 40), (2, 5000), (3, 3, 16, 16)], ids=str)
def test_reductions_match_the_model(place, shape, reduction):
    parity.check_training_ops(place, shape, torch.float32, reduction)


@pytest.mark.parametrize("path", parity.PATHS)
@pytest.mark.parametrize("objective", parity.OBJECTIVES)
def test_every_path_matches_the_model(place, path, objective):
    parity.check_path_and_objective(place, path, objective)


@pytest.mark.parametrize("sampler", ["uniform", "stratified", "logit-normal"])
def test_times_match_the_model(place, sampler):
    parity.check_times(place, sampler)


@pytest.mark.parametrize("dtype", parity.DTYPES, ids=str)
def test_given_noise_times_and_weights_match_the_model(place, dtype):
    parity.check_given(place, dtype)


@pytest.mark.parametrize("x1_dtype", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "layouts", [("contiguous", "channels_last"), ("channels_last", "every second"), ("misaligned", "misaligned")], ids=str
)
def test_mixed_dtypes_and_layouts_match_the_model(place, x1_dtype, layouts):
    parity.check_layouts(place, x1_dtype, torch.bfloat16, layouts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(5, 3, 16, 16), (3, 3, 9, 7)], ids=str)
def test_data_map_matches_the_model(place, dtype, shape):
    parity.check_data_map(place, torch.uint8, dtype, shape, flip=0.5, levels=17, dequantise=True)
    parity.check_data_map(place, torch.float32, dtype, shape, flip=0.5)


def test_noise_matches_the_model(place):
    parity.check_noise(place)
    parity.check_noise_is_the_reference_noise(place)


def test_noise_on_a_device_without_an_index_takes_ids_that_are_there():
    ids = torch.arange(5, 9, device="cuda")
    torch.testing.assert_close(
        fm.noise((4, 3), seed=1, step=2, device="cuda", sample_ids=ids).cpu(), fm.noise((4, 3), seed=1, step=2, sample_ids=5)
    )


def test_empty_batches_match_the_reference(place):
    parity.check_empty(place)


def test_half_precision_gradient_matches_the_model_under_a_loss_scale(place):
    parity.check_half_precision_gradient(place)


@pytest.mark.parametrize("dtype", parity.DTYPES, ids=str)
def test_the_device_finishes_the_gradient(place, dtype):
    parity.check_finished_gradient(place, dtype)


@pytest.mark.parametrize("shape", [(4, 3, 8, 8), (5, 7), (2, 3, 5, 5)], ids=str)
def test_a_finished_gradient_is_left_alone(place, shape):
    backward = sys.modules["fm_fast._ops.path_loss"]._path_loss_backward[place.backend]
    parity.check_early_exit(place, backward, shape)


def test_loss_and_gradient_repeat_bit_for_bit(place):
    parity.check_repeats(place)


@pytest.mark.parametrize("shape", parity.SHAPES, ids=str)
@pytest.mark.parametrize("dtype", parity.DTYPES, ids=str)
@pytest.mark.parametrize("terms", [1, 2, 4, 9])
def test_linear_step_matches_the_model(place, shape, dtype, terms):
    parity.check_linear_step(place, shape, dtype, terms)


@pytest.mark.parametrize("shape", parity.SHAPES, ids=str)
@pytest.mark.parametrize("dtype", parity.DTYPES, ids=str)
@pytest.mark.parametrize("terms", [1, 6])
def test_linear_step_keeps_the_last_term(place, shape, dtype, terms):
    parity.check_linear_step_keeps(place, shape, dtype, terms)


@pytest.mark.parametrize("dtype", parity.DTYPES, ids=str)
def test_linear_step_in_mixed_layouts_matches_itself(place, dtype):
    parity.check_linear_step_in_mixed_layouts(place, dtype)


@pytest.mark.parametrize("shape", parity.SHAPES, ids=str)
@pytest.mark.parametrize("dtype", parity.DTYPES, ids=str)
@pytest.mark.parametrize("terms", [1, 6])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_step_error_matches_the_model(place, shape, dtype, terms, layout):
    parity.check_step_error(place, shape, dtype, terms, layout)


def test_step_error_of_what_is_not_finite(place):
    parity.check_step_error_of_what_is_not_finite(place)


@pytest.mark.parametrize("name", control_cases.CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_step_control_matches_the_model(place, name, dtype):
    parity.check_step_control(place, name, dtype)


@pytest.mark.parametrize("shape", parity.SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["rademacher", "hadamard"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_probe_matches_the_model(place, shape, kind, channels_last):
    parity.check_probe(place, shape, kind, channels_last)


@pytest.mark.parametrize("shape", [*parity.SHAPES, (2, 3, 256, 256)], ids=str)
@pytest.mark.parametrize("kind", ["rademacher", "hadamard", "gaussian"])
def test_divergence_step_matches_the_model_and_repeats(place, shape, kind):
    parity.check_divergence_step(place, shape, kind)


def test_backends_agree():
    """The two backends of a CUDA device on the same numbers: the same words, and floats within a few roundings."""
    reasons = [_backends.why_not("path_loss", "cuda", name) for name in ("cuda", "triton")]
    if any(reasons):
        pytest.skip(str(reasons))
    x1, o = data(parity.Place("cuda", "cuda"), (32, 3, 32, 32)), data(parity.Place("cuda", "cuda"), (32, 3, 32, 32), seed=2)
    s, t = (fm.sample_path(x1, seed=SEED, step=STEP, backend=name) for name in ("cuda", "triton"))
    assert torch.equal(s.t, t.t)
    torch.testing.assert_close(s.x_t, t.x_t, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(s.loss(o), t.loss(o), rtol=2e-6, atol=0.0)


@pytest.mark.parametrize("words", [(0, 0, 0), (7, 0, 0), (2**63 - 2, 2**32 - 1, 2**32 - 9), (3, 5, 0)])
def test_keys_of_numbers_and_of_tensors(words):
    device, (seed, step, first) = torch.device("cuda", 0), words
    assert random.make_key(*words, 8, device).tolist() == [*words]
    for one, other in itertools.product(*[(word, torch.tensor(word, device=device)) for word in (seed, step)]):
        assert random.make_key(one, other, first, 8, device).tolist() == [*words]


def test_a_captured_graph_draws_new_noise_at_each_replay(place):
    x1, o = data(place, (8, 3, 32, 32)), data(place, (8, 3, 32, 32), seed=2).requires_grad_()
    step = torch.zeros((), dtype=torch.int64, device="cuda")

    def once():
        step.add_(1)
        s = fm.sample_path(x1, seed=SEED, step=step, backend=place.backend)
        loss = s.loss(o)
        return s.x_t, loss.detach(), torch.autograd.grad(loss, o)[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        once()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = once()
    for _ in range(3):
        graph.replay()
        s = fm.sample_path(x1, seed=SEED, step=int(step), backend=place.backend)
        loss = s.loss(o)
        eager = s.x_t, loss.detach(), torch.autograd.grad(loss, o)[0]
        assert all(torch.equal(a, b) for a, b in zip(captured, eager, strict=True))


def test_the_first_call_of_a_process_may_be_captured(place):
    """The compiled kernels are loaded while the graph is recorded."""
    if place.backend == "triton":
        pytest.skip("Triton's kernels are compiled by a call before")
    done = run_python("import test_gpu; test_gpu.capture_before_any_other_call()", folder=Path(__file__).parent, path=sys.path)
    assert done.returncode == 0, done.stderr[-2000:]


def capture_before_any_other_call():
    x1, step = torch.zeros(8, 3, 32, 32, device="cuda"), torch.ones((), dtype=torch.int64, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = fm.sample_path(x1, seed=SEED, step=step, backend="cuda").x_t
    graph.replay()
    assert torch.equal(captured, fm.sample_path(x1, seed=SEED, step=1, backend="cuda").x_t)


def test_no_step_waits_for_the_device(place):
    x1, o = data(place, (8, 3, 32, 32)), data(place, (8, 3, 32, 32), seed=2).requires_grad_()
    sample_path(place, x1).loss(o).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        sample_path(place, x1).loss(o).backward()
        fm.sample_path(x1, backend=place.backend).loss(o).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_work_goes_to_the_current_stream(place):
    """What a side stream computes waits for that stream's own work, and for no other's."""
    stream, x1 = torch.cuda.Stream(), torch.zeros(64, 3, 64, 64, device="cuda")
    wanted = sample_path(place, torch.full_like(x1, 2.0)).x_t
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        x1.fill_(2.0)
        found = sample_path(place, x1).x_t
    stream.synchronize()
    assert torch.equal(found, wanted)


def test_the_device_of_the_tensors_runs_the_op(place):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x1 = data(place, (4, 3, 8, 8))
    wanted, there = sample_path(place, x1).x_t, sample_path(place, x1.to("cuda:1")).x_t
    assert there.device.index == 1 and torch.cuda.current_device() == 0
    assert torch.equal(there.cpu(), wanted.cpu())


@large
def test_more_than_two_to_the_31_elements(place):
    batch, size = 2**31 // 3072 + 4, (3, 32, 32)
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free GPU memory")
    x1 = torch.zeros(1, *size, dtype=torch.bfloat16, device="cuda").expand(batch, *size).contiguous()
    s = sample_path(place, x1)
    last = sample_path(place, x1[-2:], sample_ids=batch - 2)
    assert torch.equal(s.x_t[-2:], last.x_t)
    losses = s.loss(torch.zeros_like(x1), reduction="none")
    assert torch.equal(losses[-2:], last.loss(torch.zeros_like(x1[-2:]), reduction="none"))


def test_solver_and_divergence_neither_wait_nor_resist_a_graph(place):
    """One captured step replays to the same numbers; nothing in it waits for the device."""
    shape, probes = (8, 3, 32, 32), parity.probe_set(place, "hadamard", (8, 3, 32, 32), 4, share=4)
    x, k = data(place, shape), [data(place, (16, *shape[1:]), torch.bfloat16, seed=2)]
    table = parity.table_of(place, [1.0, 0.5])
    copy, dots = torch.empty(16, *shape[1:], dtype=torch.bfloat16, device="cuda"), torch.empty(4, 8, dtype=torch.float64, device="cuda")
    sums = torch.zeros(2, 8, dtype=torch.float64, device="cuda")
    end, means = data(place, shape, seed=3), torch.zeros(8, dtype=torch.float64, device="cuda")

    def once():
        with torch.no_grad():
            _ops.linear_step(place.backend)(x, copy, x, k, table, 0, 1.5)
            _ops.step_error(place.backend)(means, x, end, [x, end], table[0], 0.5, 0.25)
            z = _ops.probe(x, probes, 0, 4, place.backend)
            _ops.divergence_step(sums, dots, z, probes, 0, 0.0, 1.0, place.backend)

    once()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        once()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    start = x.clone()
    once()
    wanted = x.clone(), copy.clone(), means.clone()
    assert torch.equal(dots, torch.full_like(dots, 3072.0))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        once()
    x.copy_(start)
    before = sums.clone()
    graph.replay()
    assert torch.equal(x, wanted[0]) and torch.equal(copy, wanted[1]) and torch.equal(means, wanted[2])
    assert torch.equal(sums[0], before[0] + 3072.0)


@pytest.mark.parametrize("settings", [{"method": "euler"}, {"method": "midpoint", "path": "vp", "objective": "noise"}, {"method": "ab2"}])
def test_a_whole_solve_neither_waits_nor_resists_a_graph(settings, place):
    """Once a solve has brought its times and tables to the device; what is marked, not raised, is not looked at."""
    noise = data(place, (8, 3, 16, 16))

    def solve():
        model = lambda x, t: torch.tanh(x) * t.view(-1, 1, 1, 1)  # noqa: E731
        return fm.sample(model, noise, steps=5, on_nonfinite="mark", backend=place.backend, **settings).x

    wanted = solve()
    torch.cuda.set_sync_debug_mode("error")
    try:
        solve()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = solve()
    graph.replay()
    assert torch.equal(found, wanted)


def counting_waits(solve):
    """What a solve gives, and how often it waited for the device."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = solve()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return found, sum("synchronizing" in str(warning.message) for warning in said)


@pytest.mark.parametrize("settings", [{}, {"path": "cosine", "objective": "noise", "t0": 0.2, "t1": 0.9}])
def test_adaptive_steps_are_those_of_the_cpu_and_wait_once_each(settings, place):
    noise = data(place, (8, 3, 16, 16), torch.float64)

    def solve(x0, backend):
        model = lambda x, t: torch.tanh(x) * torch.cos(5 * t).view(-1, 1, 1, 1)  # noqa: E731
        return fm.sample(model, x0, method="dopri5", on_nonfinite="mark", backend=backend, **settings)

    wanted, _ = solve(noise.cpu(), "reference"), solve(noise, place.backend)
    found, waits = counting_waits(lambda: solve(noise, place.backend))
    assert found.nfe == wanted.nfe
    torch.testing.assert_close(found.x.cpu(), wanted.x, rtol=1e-10, atol=1e-10)
    assert waits <= 3 + (found.nfe - 2) // 6, "three for the first step's length, and one a step"


@pytest.mark.parametrize("per_sample", [True, "shrink"])
def test_steps_of_each_samples_own_are_those_of_the_cpu_and_wait_once_each(per_sample, place):
    noise = data(place, (8, 3, 16, 16), torch.float64)
    speeds = {device: torch.arange(1.0, 9.0, dtype=torch.float64, device=device) for device in ("cpu", "cuda")}

    def solve(x0, backend):
        model = lambda x, t, speed: torch.tanh(x) * torch.cos(speed * t).view(-1, 1, 1, 1)  # noqa: E731
        options = {"cond": {"speed": speeds[x0.device.type]}, "per_sample": per_sample, "on_nonfinite": "mark"}
        return fm.sample(model, x0, method="dopri5", backend=backend, **options)

    wanted, _ = solve(noise.cpu(), "reference"), solve(noise, place.backend)
    found, waits = counting_waits(lambda: solve(noise, place.backend))
    assert found.nfe_of_each.tolist() == wanted.nfe_of_each.tolist() and len(set(wanted.nfe_of_each.tolist())) > 2
    torch.testing.assert_close(found.x.cpu(), wanted.x, rtol=1e-10, atol=1e-10)
    if per_sample is True:  # what leaves the batch is counted on the host
        assert waits <= 1 + (found.nfe - 2) // 6, "one for the first step's length, and one a step"


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("objective", ["fm-ot", "scoreflow"])
def test_replayed_training_steps_are_the_steps(objective, precision):
    """The losses of steps one by one, up to the order in which convolutions add; and no replay waits for the device."""
    # "on": what cannot be recorded is an error.
    settings = {"batch_size": 4, "label_drop": 0.3, "flip": 0.5, "dequantise": True, "cuda_graph": "on"}
    config, device = tiny(objective=objective, precision=precision, **settings), torch.device("cuda")
    images, replayed = digits().to(device), new_state(config, device)
    wanted = torch.stack(advance(new_state(config, device), config, images, WARM_UP_STEPS + 8))
    step = GraphedStep(replayed, config, images, DataOrder(len(images), config.seed))
    found = [step().mean for _ in range(WARM_UP_STEPS + 1)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        found += [step().mean for _ in range(7)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(torch.stack(found), wanted, rtol=1e-3 if precision == "float32" else 5e-2, atol=0)
    assert int(replayed.optimiser.updates) == replayed.step == WARM_UP_STEPS + 8


def test_batches_of_a_mapped_file_do_not_wait_for_the_device():
    """They are those of images in memory, and go to the device from memory that it reads by itself."""
    device, images = torch.device("cuda"), digits()
    mapped, wanted, found = replace(images, mapped=True).to(device), DataOrder(len(images), 3), OrderAhead(len(images), 3, stride=64)
    assert mapped.room_for(5).is_pinned() and mapped.images.device.type == "cpu"
    found.read(mapped, 0, 64)
    torch.cuda.set_sync_debug_mode("error")
    try:
        batches = [found.read(mapped, 64 * step, 64) for step in range(1, 9)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for step, batch in enumerate(batches, 1):
        for there, here in zip(batch, wanted.read(images, 64 * step, 64), strict=True):
            assert there.device.type == "cuda" and torch.equal(there.cpu(), here)


def test_a_capture_that_fails_leaves_no_trace():
    """In a process of its own: if it does, the tests after it must not suffer."""
    done = run_python("import test_gpu; test_gpu.capture_after_a_failed_one()", folder=Path(__file__).parent, path=sys.path)
    assert done.returncode == 0, done.stderr[-2000:]


def capture_after_a_failed_one():
    """Random numbers and further captures; the sum is waited for, which no graph can hold."""
    x, recorder = torch.ones(1, device="cuda"), CudaRecorder(torch.device("cuda"))
    before = torch.cuda.current_stream()
    with pytest.raises(RuntimeError):
        recorder.record(lambda: x.item())
    assert torch.cuda.current_stream() == before and bool(torch.randn(4, device="cuda").isfinite().all())
    replay = recorder.record(lambda: x.add_(1))
    replay()
    assert float(x) == 2.0


@large
def test_linear_step_on_more_than_two_to_the_31_elements(place):
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GiB of free GPU memory")
    x = torch.zeros(2**31 + 4096, dtype=torch.bfloat16, device="cuda")
    k = torch.ones_like(x)
    parity.step(place, x, [k], [1.0, 0.5], out=x)
    assert bool((x[-8192:] == 0.5).all()) and bool((x[:8192] == 0.5).all())
    assert array(x[:1]) == 0.5
