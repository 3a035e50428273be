"""Steps by replay: a tape that repeats operations as a CUDA graph would, against steps one by one; and where a graph is refused.

The same on a GPU is in tests/test_gpu.py.
"""

import dataclasses

import pytest
import torch
from tape import Tape
from torch import nn
from trainer_helpers import CPU, TINY_NET, advance, assert_same_state, flat, tiny

from fm_fast import _ops
from fm_fast.nn.convolution import PYTORCH
from fm_fast.train.data import DataOrder, digits
from fm_fast.train.execution.graph import CudaRecorder, GraphedStep, is_wanted
from fm_fast.train.loop import train
from fm_fast.train.step import new_state, training_step

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = {"label_drop": 0.3, "flip": 0.5, "dequantise": True, "ema_widths": (0.1,)}
CUDA = torch.device("cuda")
WARM_UPS, REPLAYS = 1, 3
DROPPING = dataclasses.replace(TINY_NET, dropout=0.5)


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """Checks look at no values there, and convolutions are PyTorch's. And one warm-up is enough here."""
    monkeypatch.setattr("fm_fast.nn.convolution._kernels", lambda x, weight: PYTORCH)
    monkeypatch.setattr("fm_fast._modes.values_readable", lambda *x: False)
    monkeypatch.setattr("fm_fast.train.execution.graph.WARM_UP_STEPS", WARM_UPS)


def test_a_capture_that_fails_is_left_by_another(monkeypatch):
    """The current stream is what it was, the allocator is told, and a capture that follows tells torch's generator that none is running."""
    done = []

    class Graph:
        def __init__(self, graph, stream, pool=None):
            self.stream = stream

        def __enter__(self):
            done.append("begun")

        def __exit__(self, *error):
            done.append("ended")
            if len(done) == 2:
                raise RuntimeError("operation not permitted when stream is capturing")

    class Stream:
        device = torch.device("cuda", 1)

        def __init__(self, device=None):
            pass

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", Graph)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: done.append(stream))
    current = Stream()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 7))
    monkeypatch.setattr(torch, "zeros", lambda *size, device: None)
    for name, call in {"end": "_cuda_endAllocateToPool", "release": "_cuda_releasePool"}.items():
        monkeypatch.setattr(torch._C, call, lambda device, pool, name=name: done.append((name, device, pool)), raising=False)
    with pytest.raises(RuntimeError, match="not permitted"):
        CudaRecorder(CPU).record(lambda: None)
    assert done == ["begun", "ended", current, ("end", 1, (0, 7)), ("release", 1, (0, 7)), "begun", "ended", current]


def graphed(config, data, state, steps, recorder, **options):
    step = GraphedStep(state, config, data, DataOrder(len(data), config.seed), recorder=recorder, **options)
    return [step().mean for _ in range(steps)]


@pytest.mark.parametrize(
    "changes",
    [{}, {"objective": "scoreflow", "micro_batch": 5}, {"precision": "bfloat16"}, {"model": DROPPING}, {"coupling": "optimal"}],
    ids=["plain", "importance times, micro-batches", "bfloat16", "dropout", "paired noise"],
)
def test_replays_are_the_steps(changes):
    """New images (across the end of an epoch), noise, labels, masks and learning rates at every replay: the bits of single steps."""
    config, tape = tiny(**SETTINGS | changes), Tape()
    data = dataclasses.replace(digits(), images=digits().images[:40], labels=digits().labels[:40])
    eager, replayed = new_state(config, CPU), new_state(config, CPU)
    advance(replayed, config, data, 1)
    wanted = advance(eager, config, data, 1 + WARM_UPS + REPLAYS)
    found = graphed(config, data, replayed, WARM_UPS + REPLAYS, tape)
    assert (tape.warmed, tape.replays) == (WARM_UPS, REPLAYS)
    assert torch.equal(torch.stack(found), torch.stack(wanted[1:]))
    assert_same_state(eager, replayed)
    groups = [state.optimiser.state_dict()["param_groups"] for state in (eager, replayed)]
    assert groups[0] == groups[1]
    advance(eager, config, data, 1), advance(replayed, config, data, 1)
    assert_same_state(eager, replayed)


def test_replays_copy_real_numbers():
    """Data without grey levels, in their own dtype."""
    values = torch.randn(40, 1, 8, 8, generator=torch.Generator().manual_seed(0)).half()
    data = dataclasses.replace(digits(), images=values, labels=digits().labels[:40], levels=None)
    config = tiny(**SETTINGS | {"dequantise": False, "coupling": "optimal"})
    eager, replayed = new_state(config, CPU), new_state(config, CPU)
    advance(replayed, config, data, 1)
    wanted = advance(eager, config, data, 1 + WARM_UPS + REPLAYS)
    assert torch.equal(torch.stack(graphed(config, data, replayed, WARM_UPS + REPLAYS, Tape())), torch.stack(wanted[1:]))
    assert_same_state(eager, replayed)


def test_weights_written_between_replays_reach_their_masters():
    config, data = tiny(precision="bfloat16"), digits()
    eager, replayed = new_state(config, CPU), new_state(config, CPU)
    order = DataOrder(len(data), config.seed)
    step = GraphedStep(replayed, config, data, order, recorder=Tape())
    for number in range(WARM_UPS + REPLAYS):
        for state in (eager, replayed):
            with torch.no_grad():
                state.model.head.bias.fill_(number)
        advance(eager, config, data, 1), step()
        assert replayed.model.head.bias[0].item() == pytest.approx(number, abs=0.01)
    assert_same_state(eager, replayed)


def test_gradients_are_always_in_the_same_memory(monkeypatch):
    """The kernels' table of addresses is then that of the steps before: it cannot be made while a graph is recorded."""
    seen, norm = [], _ops.adamw_ema_norm
    monkeypatch.setattr(_ops, "adamw_ema_norm", lambda total, g, backend: (seen.append([x.data_ptr() for x in g]), norm(total, g, backend)))
    config, data = tiny(), digits()
    state = new_state(config, CPU)
    graphed(config, data, state, WARM_UPS + 1, Tape())
    assert len(seen) == WARM_UPS + 1 and all(addresses == seen[0] for addresses in seen)
    assert not set(seen[0]) & {p.data_ptr() for p in state.model.parameters()}


def test_losses_by_quartile_are_replayed_too():
    config, data = tiny(), digits()
    step = GraphedStep(new_state(config, CPU), config, data, DataOrder(len(data), 0), recorder=Tape())
    losses = [step() for _ in range(WARM_UPS + 2)]
    for loss in losses:
        sums, counts = loss.by_quartile
        assert int(counts.sum()) == 16
        torch.testing.assert_close(sums.sum() / 16, loss.mean)


def test_norms_of_gradients_are_replayed_too():
    config, data = tiny(clip=0.01), digits()
    order, eager = DataOrder(len(data), 0), new_state(config, CPU)
    step = GraphedStep(new_state(config, CPU), config, data, order, recorder=Tape())
    found = [step().gradient_norm for _ in range(WARM_UPS + REPLAYS)]
    wanted = [training_step(eager, config, data, order).gradient_norm for _ in found]
    assert torch.equal(torch.stack(found), torch.stack(wanted)) and len(set(map(float, found))) == len(found)


def test_a_step_that_is_not_finite_is_skipped_by_a_replay():
    config, data = tiny(), digits()
    state, number = new_state(config, CPU), torch.ones(())
    step = GraphedStep(state, config, data, DataOrder(len(data), 0), Scaled(state.model, number), recorder=Tape())
    for _ in range(WARM_UPS + 1):
        step()
    before = flat(state.model).clone()
    number.fill_(torch.nan)
    step()
    assert torch.equal(flat(state.model), before) and int(state.optimiser.skipped) == 1
    number.fill_(1.0)
    step()
    assert not torch.equal(flat(state.model), before) and int(state.optimiser.updates) == WARM_UPS + 2


class Scaled(nn.Module):
    def __init__(self, model, factor):
        super().__init__()
        self.model, self.factor = model, factor

    def forward(self, *arguments, **conditions):
        return self.factor * self.model(*arguments, **conditions)


def test_the_tape_repeats_the_host_and_reads_the_device():
    x, y, number, tape = torch.ones(2), torch.zeros(2), 3.0, Tape()
    replay = tape.record(lambda: y.add_(x * number))
    assert y.tolist() == [0.0, 0.0]
    number = 5.0
    x.fill_(2.0)
    replay(), replay()
    assert y.tolist() == [12.0, 12.0]
    with pytest.raises(RuntimeError, match=r"aten\._local_scalar_dense\.default would wait"):
        tape.record(lambda: y.add_(float(x[0])))
    with pytest.raises(RuntimeError, match=r"aten\.lift_fresh\.default would wait"):
        tape.record(lambda: y.add_(torch.tensor([1.0, 2.0])))


class Refusing(Tape):
    def record(self, work):
        raise RuntimeError("operation not permitted")


def test_work_that_cannot_be_recorded():
    data, said = digits(), []
    config = tiny(cuda_graph="auto")
    eager, state = new_state(config, CPU), new_state(config, CPU)
    graphed(config, data, state, WARM_UPS + 2, Refusing(), say=said.append)
    advance(eager, config, data, WARM_UPS + 2)
    assert_same_state(eager, state)
    assert said == ["cuda_graph: the step could not be recorded and goes on without: operation not permitted"]
    config = tiny(cuda_graph="on")
    with pytest.raises(RuntimeError, match="cuda_graph: 'on' was asked for, but the step could not be recorded: operation not permitted"):
        graphed(config, data, new_state(config, CPU), WARM_UPS + 1, Refusing())


@pytest.mark.parametrize(
    ("changes", "device", "world", "reason"),
    [
        ({}, CPU, 1, "the run is on cpu"),
        ({}, CUDA, 2, "2 processes share a batch"),
        ({"compile": True}, CUDA, 1, "the network runs through torch.compile"),
    ],
)
def test_where_there_is_no_graph(changes, device, world, reason):
    assert not is_wanted(tiny(cuda_graph="auto", **changes), device, world)
    assert not is_wanted(tiny(cuda_graph="off", **changes), device, world)
    with pytest.raises(ValueError, match=f"cuda_graph: 'on' was asked for, but {reason}"):
        is_wanted(tiny(cuda_graph="on", **changes), device, world)


def test_where_there_is_one():
    assert is_wanted(tiny(cuda_graph="on"), CUDA, 1) and is_wanted(tiny(cuda_graph="auto"), CUDA, 1)
    assert not is_wanted(tiny(), CUDA, 1), "not before it has run on a GPU"
    with pytest.raises(ValueError, match="cuda_graph: expected one of auto, on, off, got 'yes'"):
        tiny(cuda_graph="yes")


def test_a_run_that_insists_on_a_graph_needs_a_gpu(tmp_path):
    with pytest.raises(ValueError, match="cuda_graph: 'on' was asked for, but the run is on cpu"):
        train(tiny(cuda_graph="on", device="cpu", out=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()
