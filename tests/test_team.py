"""Two gloo processes against one with the whole batch: equal losses and weights, one writer, resuming with another number of them."""

import atexit
import copy
import gc
import json
import os
import shutil
import signal
import warnings
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from copies import two_processes
from thread_counts import threads
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from trainer_helpers import CPU, advance, tiny

from fm_fast.train import loop, train
from fm_fast.train.config import TrainConfig
from fm_fast.train.data import digits
from fm_fast.train.execution.distributed import Team
from fm_fast.train.step import new_state
from fm_fast.train.storage.checkpoint import read_checkpoint
from fm_fast.train.storage.run_folder import RunFolder

STEPS, MIDDLE = 8, 4
SETTINGS = {
    "steps": STEPS, "batch_size": 16, "label_drop": 0.3, "flip": 0.5, "dequantise": True, "ema_widths": (0.1,), "clip": 0.5,
    "sample_every": 0, "sample_steps": 1, "samples_per_class": 1, "evaluate": False, "checkpoint_every": MIDDLE, "log_every": 1,
    "device": "cpu",
}  # fmt: skip


def config(folder, **changes):
    return tiny(**{**SETTINGS, "out": str(folder), **changes})


# What each of two processes does. The second one's folder must never appear.


def straight(folder, parallel):
    """At the interpreter's end a network in shards goes before the collection that is too late for the threads of the group it owns."""
    at_exit = []
    with warnings.catch_warnings(), mock.patch.object(atexit, "register", lambda function, *arguments: at_exit.append(function)):
        warnings.filterwarnings("error", message=".*deprecated|Grad strides")
        train(config(folder / parallel, parallel=parallel))
    for function in at_exit:
        if function is gc.collect:
            function()
    assert not [each for each in gc.get_objects() if FSDPModule in type(each).__mro__]


def resumed(folder, parallel):
    """Go on from the middle of the run of one process."""
    train(config(folder / f"resumed-{parallel}", parallel=parallel), resuming=True)


def begun(folder, parallel):
    """Begin with the weights of the run of one process, which both processes read."""
    source = next(place / "source" for place in (folder, folder.parent) if (place / "source").is_dir())
    train(config(folder / f"begun-{parallel}", parallel=parallel, init_from=str(source)))


def stopped(folder, parallel):
    """The second process alone is asked to stop; both do, after the same step, and let go of what could block their end."""
    original, networks = loop.training_step, []

    def training_step(state, config, dataset, order, share, network):
        networks.append(network)
        if state.step == 2 and int(os.environ["RANK"]) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(state, config, dataset, order, share, network)

    loop.training_step = training_step
    try:
        with pytest.raises(SystemExit, match="143"):
            train(config(folder / f"stopped-{parallel}", parallel=parallel, steps=100, checkpoint_every=0))
    finally:
        loop.training_step = original
    assert isinstance(networks[-1], DistributedDataParallel) and not hasattr(networks[-1], "reducer")


FAST = [(straight, "ddp"), (resumed, "ddp"), (stopped, "ddp")]
SLOW = [(straight, "fsdp"), (resumed, "fsdp"), (begun, "fsdp")]


def work(rank, scenarios, port, folder):
    """One training after another, as torchrun's processes: they meet in a store that outlives a training, and what one has left there must
    not reach the next."""
    torch.set_num_threads(1)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", **place)
    for scenario, parallel in scenarios:
        scenario(folder if rank == 0 else folder / "second", parallel)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder of a run of one process."""
    place = tmp_path_factory.mktemp("runs") / "alone"
    with threads(1):
        train(config(place))
    return place


def of_two(place, alone, scenarios):
    """Let two processes go through the scenarios; `resumed` finds the checkpoint in the middle of the run of one."""
    for scenario, parallel in scenarios:
        if scenario is resumed:
            copy_middle(alone, place / f"resumed-{parallel}")
        if scenario is begun:
            shutil.copytree(alone, place / "source")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    two_processes(work, (scenarios, store.port, place))
    return place


def copy_middle(source, target):
    target.mkdir(exist_ok=True)
    middle = RunFolder(source).checkpoint(MIDDLE)
    (target / middle.name).write_bytes(middle.read_bytes())


@pytest.fixture(scope="module")
def ddp(tmp_path_factory, alone):
    return of_two(tmp_path_factory.mktemp("ddp"), alone, FAST)


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory, alone):
    return of_two(tmp_path_factory.mktemp("fsdp"), alone, SLOW)


def losses(folder):
    records = [json.loads(line) for line in RunFolder(folder).log.read_text().splitlines()]
    return {record["step"]: [record["loss"], *record["loss_by_quartile"], record["gradient_norm"]] for record in records}


def assert_same_run(found: Path, expected: Path):
    """Losses by quartile, norms of gradients, weights, moments and averages, up to the order in which float32 numbers were added."""
    one, other = losses(found), losses(expected)
    for step, values in one.items():
        assert values == pytest.approx(other[step], rel=1e-4), step
    stored, reference = (read_checkpoint(RunFolder(place).checkpoint(STEPS))["state"] for place in (found, expected))
    for part in ("model", "average"):
        assert set(stored[part]) == set(reference[part])
        for name, value in reference[part].items():
            torch.testing.assert_close(stored[part][name], value, rtol=1e-3, atol=2e-4)
    for i, entry in reference["optimiser"]["state"].items():
        assert set(stored["optimiser"]["state"][i]) == set(entry)
        for name, value in entry.items():
            found_value = stored["optimiser"]["state"][i][name]
            assert found_value.shape == value.shape and found_value.dtype == value.dtype
            torch.testing.assert_close(found_value, value, rtol=1e-3, atol=2e-4 if name == "averages" else 1e-3 * float(value.abs().max()))


PARALLEL = ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)]


@pytest.mark.parametrize("name", PARALLEL)
def test_two_processes_equal_one_with_the_double_batch(name, alone, request):
    folder = request.getfixturevalue(name)
    assert_same_run(folder / name, alone)
    assert_same_run(folder / f"resumed-{name}", alone)
    assert list(losses(folder / name)) == list(range(1, STEPS + 1))
    assert list(losses(folder / f"resumed-{name}")) == list(range(MIDDLE + 1, STEPS + 1))


@pytest.mark.parametrize("name", PARALLEL)
def test_the_first_process_alone_writes(name, alone, request):
    folder = request.getfixturevalue(name)
    assert not (folder / "second").exists()
    assert {file.name for file in (folder / name).iterdir()} == {file.name for file in alone.iterdir()}


@pytest.mark.parametrize("name", PARALLEL)
def test_one_process_goes_on_where_two_were(name, alone, request, tmp_path, one_thread):
    copy_middle(request.getfixturevalue(name) / name, tmp_path)
    train(config(tmp_path), resuming=True)
    assert_same_run(tmp_path, alone)


@pytest.mark.slow
def test_shards_begin_with_the_weights_of_another_run(fsdp, alone, tmp_path, one_thread):
    train(config(tmp_path, init_from=str(alone)))
    assert_same_run(fsdp / "begun-fsdp", tmp_path)
    assert losses(tmp_path)[1] != losses(alone)[1], "other initial weights"


def test_processes_stop_after_the_same_step(ddp):
    (file,) = RunFolder(ddp / "stopped-ddp").checkpoints()
    assert file.name == "checkpoint-00000004.pt", "asked during step 3; the votes are counted one step later"


def test_one_process_is_a_team(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    team = Team(CPU)
    value = torch.ones(2)
    assert team.first and team.total(value) is value and team.agreed("x") == "x"
    with pytest.raises(ValueError, match="parallel: expected one of ddp, fsdp, got 'dp'"):
        TrainConfig(parallel="dp")


@pytest.mark.slow
def test_shards_follow_weights_that_others_write_and_cannot_be_copied(one_thread):
    from fm_fast.train.execution.sharded import sharded_state

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        settings = tiny(precision="bfloat16")
        state = sharded_state(settings, CPU)
        advance(state, settings, digits(), 2)
        with torch.no_grad():
            state.model.head.bias.fill_(5.0)
        advance(state, settings, digits(), 1)
        assert state.model.head.bias.full_tensor().item() == pytest.approx(5.0, abs=0.04)
        with pytest.raises(TypeError, match=r"optimiser: expected one without shards .*whole_state_dict\(\)"):
            copy.deepcopy(state.optimiser)
    finally:
        dist.destroy_process_group()


def test_the_state_of_shards_is_whole_and_comes_back(one_thread):
    """In one process, fast: what every checkpoint of an fsdp run is."""
    from fm_fast.train.execution.sharded import sharded_state

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        settings = tiny(ema_widths=(0.1,), clip=0.5)
        state, plain, other = sharded_state(settings, CPU), new_state(settings, CPU), sharded_state(settings, CPU)
        for each in (state, plain):
            advance(each, settings, digits(), 2)
        stored, expected = state.optimiser.whole_state_dict(), plain.optimiser.state_dict()
        for one, two in zip(stored["state"].values(), expected["state"].values(), strict=True):
            assert set(one) == set(two)
            for name, value in two.items():
                torch.testing.assert_close(one[name], value, rtol=1e-4, atol=1e-6)
        assert stored["param_groups"][0]["max_norm"] == 0.5
        other.optimiser.load_whole_state_dict(copy.deepcopy(stored))
        for one, two in zip(other.optimiser.state_dict()["state"].values(), state.optimiser.state_dict()["state"].values(), strict=True):
            assert all(torch.equal(one[name], value) for name, value in two.items())
    finally:
        dist.destroy_process_group()
