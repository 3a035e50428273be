"""Checkpoints: exact resumption, interrupted saves, damaged and foreign files."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.utils import _pytree as pytree
from trainer_helpers import CPU, assert_same_state, flat, moments, tiny

from fm_fast.train import checkpoint, loop, train
from fm_fast.train.data import digits
from fm_fast.train.loop import advance
from fm_fast.train.step import new_state


@pytest.mark.parametrize("objective", ["fm-ot", "scoreflow"])
def test_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path, objective):
    config, data = tiny(objective=objective), digits()
    straight, first, second = trained(config, data, 20), trained(config, data, 10), new_state(config, CPU)
    checkpoint.save_checkpoint(tmp_path / "c.pt", first, config)
    checkpoint.resume(tmp_path / "c.pt", second, config)
    assert_same_state(first, second)
    assert len(moments(second)) == 4 * len(list(second.model.parameters()))
    losses = advance(second, config, data, 10)
    assert_same_state(straight, second)
    assert torch.equal(torch.stack(losses), torch.stack(advance(trained(config, data, 10), config, data, 10)))


def trained(config, data, steps):
    """A new state after that many steps."""
    state = new_state(config, CPU)
    advance(state, config, data, steps)
    return state


RESUMED_RUN = """
import torch
from torch.utils import _pytree as pytree
from trainer_helpers import tiny
from fm_fast.train import train
result = train(tiny(out={out!r}, sample_every=0, data={data!r}), resuming=True)
torch.save(result.state.state_dict(), {result!r})
"""


def test_resumed_in_a_fresh_process(tmp_path, monkeypatch):
    data = tmp_path / "set.npz"
    write_npz(data)
    shared = {"data": str(data), "sample_every": 0}
    straight = train(tiny(out=str(tmp_path / "a"), **shared))
    interrupt_after(monkeypatch, 10)
    with pytest.raises(KeyboardInterrupt):
        train(tiny(out=str(tmp_path / "b"), **shared))
    code = RESUMED_RUN.format(out=str(tmp_path / "b"), data=str(data), result=str(tmp_path / "state.pt"))
    setup = f"import sys; sys.path[:0] = {[*sys.path]!r}; import torch; torch.set_num_threads({torch.get_num_threads()})\n"
    subprocess.run([sys.executable, "-c", setup + code], check=True, cwd=str(tmp_path), stdout=subprocess.DEVNULL)
    resumed = torch.load(tmp_path / "state.pt", weights_only=True)
    assert resumed["step"] == 20
    for part in ("model", "average", "optimiser"):
        assert_same_values(straight.state.state_dict()[part], resumed[part])
    steps = [json.loads(line)["step"] for line in (tmp_path / "b" / "log.jsonl").read_text().splitlines()]
    assert steps == [20]


def assert_same_values(one, two):
    """Nested dictionaries and lists of tensors and plain values are equal, tensors bit by bit."""
    leaves, others = pytree.tree_flatten(one), pytree.tree_flatten(two)
    assert leaves[1] == others[1] and len(leaves[0]) > 0
    assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(leaves[0], others[0], strict=True))


def write_npz(path):
    numpy = pytest.importorskip("numpy")
    data = digits()
    numpy.savez(path, images=data.images[:200].numpy() * 15, labels=data.labels[:200].numpy())


def interrupt_after(monkeypatch, steps):
    """Press Ctrl-C in the middle of that step."""
    original = loop.training_step

    def training_step(state, *rest, **settings):
        if state.step == steps - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return original(state, *rest, **settings)

    monkeypatch.setattr(loop, "training_step", training_step)


def test_resume_refuses_other_settings_but_takes_more_steps(tmp_path):
    config = tiny()
    checkpoint.save_checkpoint(tmp_path / "c.pt", new_state(config, CPU), config)
    checkpoint.resume(tmp_path / "c.pt", new_state(config, CPU), replace(config, steps=40, out="elsewhere", log_every=3))
    other = replace(config, seed=1, batch_size=8)
    with pytest.raises(ValueError, match="cannot resume with other settings: batch_size: 16 -> 8; seed: 0 -> 1"):
        checkpoint.resume(tmp_path / "c.pt", new_state(other, CPU), other)


def test_interrupted_save_keeps_the_old_file(tmp_path, monkeypatch):
    config, path = tiny(), tmp_path / "c.pt"
    state = new_state(config, CPU)
    checkpoint.save_checkpoint(path, state, config)
    before = path.read_bytes()

    def half_a_save(content, file):
        file.write(before[: len(before) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half_a_save)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save_checkpoint(path, state, config)
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["c.pt"]


def test_damaged_and_foreign_checkpoints(tmp_path):
    config, path = tiny(), tmp_path / "c.pt"
    with pytest.raises(FileNotFoundError, match=r"c.pt: no such checkpoint"):
        checkpoint.read_checkpoint(path)
    checkpoint.save_checkpoint(path, new_state(config, CPU), config)
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"garbage", b"\x80\x02not a checkpoint"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"c.pt: expected a complete checkpoint of fm_fast"):
            checkpoint.read_checkpoint(path)


class NotPlainData:
    """A pickle of this names a class, which reading must refuse."""


def test_checkpoints_of_others(tmp_path):
    path = tmp_path / "c.pt"
    for content, message in (
        ({"model": {}}, "expected a checkpoint of fm_fast .*got None"),
        ([1, 2], "got 'list'"),
        ({"format": "fm_fast.checkpoint", "version": 99}, "expected checkpoint version 1, got 99"),
        (NotPlainData(), "cannot be read"),
    ):
        torch.save(content, path)
        with pytest.raises(ValueError, match=message):
            checkpoint.read_checkpoint(path)


def test_load_model_gives_the_averaged_network(tmp_path):
    config = tiny(objective="score", label_drop=0.25)
    state = new_state(config, CPU)
    advance(state, config, digits(), 2)
    checkpoint.save_checkpoint(tmp_path / "c.pt", state, config)
    model, stored = checkpoint.load_model(tmp_path / "c.pt")
    assert stored == config and not model.training
    assert torch.equal(flat(model), flat(state.average)) and not any(p.requires_grad for p in model.parameters())
