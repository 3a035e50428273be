"""The folder of a run: numbered checkpoints, the newest valid one, old ones deleted, and no run in another's way."""

import json
import shutil
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from copies import run_python
from thread_counts import threads
from trainer_helpers import assert_same_state, cut, flat, tiny

from fm_fast.train import loop, train
from fm_fast.train.files import only_writer
from fm_fast.train.storage import run_folder
from fm_fast.train.storage.checkpoint import read_checkpoint
from fm_fast.train.storage.run_folder import RunFolder
from fm_fast.train.storage.weights import load_model

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK = {"sample_every": 0, "sample_steps": 1, "samples_per_class": 1, "evaluate": False, "batch_size": 4, "steps": 8}


def run(folder, resuming=False, overwriting=False, **changes):
    return train(tiny(**{**QUICK, "out": str(folder), "checkpoint_every": 2, **changes}), resuming, overwriting)


def names(folder):
    return sorted(file.name for file in folder.glob("checkpoint*"))


def test_the_newest_checkpoints_are_kept(tmp_path):
    run(tmp_path / "two")
    assert names(tmp_path / "two") == ["checkpoint-00000006.pt", "checkpoint-00000008.pt"]
    run(tmp_path / "all", keep_checkpoints=0)
    assert names(tmp_path / "all") == [f"checkpoint-{step:08d}.pt" for step in (2, 4, 6, 8)]


def test_the_order_is_that_of_the_numbers(tmp_path):
    for name in (
        "checkpoint-99999999.pt",
        "checkpoint-100000000.pt",
        "checkpoint-00000001.pt",
        "checkpoint-1.pt",
        "checkpoint-00000002.pt.x",
    ):
        (tmp_path / name).touch()
    found = [file.name for file in RunFolder(tmp_path).checkpoints()]
    assert found == ["checkpoint-100000000.pt", "checkpoint-99999999.pt", "checkpoint-00000001.pt"]
    assert RunFolder(tmp_path / "nowhere").checkpoints() == []


def cut_short(file):
    file.write_bytes(file.read_bytes()[:20_000])


def blank(file):
    """4 KiB of a tensor that no longer hold what was written."""
    content = file.read_bytes()
    middle = len(content) // 2
    file.write_bytes(content[:middle] + bytes(4096) + content[middle + 4096 :])


def foreign(file):
    torch.save({"model": {}}, file)


def empty(file):
    file.write_bytes(b"")


def newer_version(file):
    torch.save({**read_checkpoint(file), "version": 99}, file)


@pytest.fixture(scope="module")
def with_three_checkpoints(tmp_path_factory):
    """The folder of a run, and what the run ended with."""
    folder = tmp_path_factory.mktemp("run")
    with threads(1):
        return folder, run(folder, keep_checkpoints=3)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "expected a complete checkpoint of fm_fast"),
        (cut_short, "expected a complete checkpoint of fm_fast"),
        (blank, "expected a complete checkpoint of fm_fast"),
        (foreign, "expected a checkpoint of fm_fast"),
        (empty, "expected a complete checkpoint of fm_fast"),
        (newer_version, "expected checkpoint version 2, got 99"),
    ],
)
def test_the_checkpoint_before_a_damaged_one_is_used(damage, message, with_three_checkpoints, tmp_path, capsys):
    folder, straight = with_three_checkpoints
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    damaged = [tmp_path / f"checkpoint-{step:08d}.pt" for step in (6, 8)]
    for file in damaged:
        damage(file)
    capsys.readouterr()
    resumed = run(tmp_path, True, checkpoint_every=0, keep_checkpoints=1)
    shown = capsys.readouterr().out
    for file in damaged:
        assert f"warning: {file}: {message}" in shown
    assert shown.count("; checkpoint-00000004.pt is used instead") == 2 and "steps 4..8" in shown
    assert_same_state(straight.state, resumed.state)
    assert names(tmp_path) == ["checkpoint-00000006.pt.damaged", "checkpoint-00000008.pt", "checkpoint-00000008.pt.damaged"]


def test_nothing_but_damaged_checkpoints(tmp_path):
    run(tmp_path)
    for file in RunFolder(tmp_path).checkpoints():
        cut(file)
    with pytest.raises(ValueError, match=r"checkpoint-00000008.pt: expected a complete .*checkpoint-00000006.pt: expected a complete"):
        run(tmp_path, True)
    with pytest.raises(FileNotFoundError, match=r"nowhere: no checkpoint-NUMBER.pt in this folder"):
        run(tmp_path / "nowhere", True)


def test_a_new_run_overwrites_another_only_when_told_to(tmp_path):
    run(tmp_path, steps=4)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    message = r"holds checkpoint-00000004.pt of another run; --resume .*resuming=True.* --overwrite .*overwriting=True"
    with pytest.raises(FileExistsError, match=message):
        run(tmp_path, seed=1)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before
    other = run(tmp_path, overwriting=True, seed=1, steps=2)
    assert names(tmp_path) == ["checkpoint-00000002.pt"] and load_model(tmp_path)[1] == other.config
    with pytest.raises(ValueError, match="resume, overwrite: expected one of them"):
        run(tmp_path, True, True)


def failing(*arguments, **options):
    raise RuntimeError("out of memory")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": replace(tiny().model, multipliers=(1, 1, 1, 1, 1))}, ValueError, "model.multipliers: expected at most 4 levels"),
        ({"tensorboard": True}, ImportError, "tensorboard: --tensorboard needs it"),
        ({}, RuntimeError, "out of memory"),
    ],
)
def test_a_new_run_that_fails_early_deletes_nothing(changes, error, message, tmp_path, monkeypatch):
    run(tmp_path, steps=4)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setattr("fm_fast.train.loop.training_step", failing)
    with pytest.raises(error, match=message):
        run(tmp_path, overwriting=True, seed=1, **changes)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_the_log_of_a_new_run_is_its_own(tmp_path):
    run(tmp_path, steps=4, log_every=1)
    RunFolder(tmp_path).quality.touch()
    run(tmp_path, overwriting=True, steps=4, log_every=2)
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [2, 4]
    assert not (tmp_path / "quality.jsonl").exists()


def test_weights_alone_are_another_run_too(tmp_path):
    run(tmp_path)
    for file in tmp_path.glob("checkpoint*"):
        file.unlink()
    before = (tmp_path / "weights.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match=r"holds weights\.safetensors of another run; --resume"):
        run(tmp_path)
    assert (tmp_path / "weights.safetensors").read_bytes() == before


def test_fewer_steps_than_were_taken_are_no_run_to_resume(tmp_path, capsys):
    run(tmp_path)
    with pytest.raises(ValueError, match="steps: expected at least the 8 that this run has taken, got 4"):
        run(tmp_path, resuming=True, steps=4)
    run(tmp_path, resuming=True, steps=10)
    assert "was to take 8 steps and now takes 10" in capsys.readouterr().out


def test_a_network_with_dropout_draws_its_pictures_without(tmp_path):
    net = replace(tiny().model, dropout=0.3)
    result = run(tmp_path, model=net, sample_every=4)
    assert (tmp_path / "samples.png").is_file() and not result.state.averaged().training


def test_images_that_are_not_square_are_refused_before_the_run(tmp_path):
    np.savez(tmp_path / "wide.npz", images=np.zeros((4, 8, 16), np.uint8), labels=np.zeros(4, np.int64))
    with pytest.raises(ValueError, match=r"data: expected square images .*, got 8x16$"):
        run(tmp_path / "run", data=str(tmp_path / "wide.npz"))
    np.savez(tmp_path / "last.npz", images=np.zeros((4, 16, 12, 3), np.uint8), labels=np.zeros(4, np.int64))
    with pytest.raises(ValueError, match=r"got 12x3; are these 16x12 images with their 3 channels last\?"):
        run(tmp_path / "run", data=str(tmp_path / "last.npz"))


def test_a_run_on_the_cpu_keeps_freed_memory_once_its_data_are_there(tmp_path, monkeypatch):
    done = []
    load = loop.load_dataset
    monkeypatch.setattr(loop, "load_dataset", lambda *arguments: done.append("loaded") or load(*arguments))
    monkeypatch.setattr(loop, "keep_freed_memory", lambda: done.append("kept"))
    run(tmp_path)
    assert done == ["loaded", "kept"]


@pytest.mark.parametrize("channels", [2, 4])
def test_images_in_other_than_one_or_three_channels_are_drawn_in_part(channels, tmp_path):
    np.savez(tmp_path / "data.npz", images=np.zeros((4, channels, 8, 8), np.uint8), labels=np.zeros(4, np.int64))
    run(tmp_path / "run", data=str(tmp_path / "data.npz"))
    assert (tmp_path / "run" / "samples.png").is_file()


def test_two_processes_never_write_into_one_folder(tmp_path):
    """The second is refused while the first lives; the system lets go of the folder with the process."""
    code = "import sys, pathlib; from fm_fast.train.files import only_writer\nwith only_writer(pathlib.Path(sys.argv[1])): input()"
    with only_writer(tmp_path), pytest.raises(FileExistsError, match="another run is writing into this folder"):
        run(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert run_python(code, tmp_path, path=sys.path, typed="\n").returncode == 0
    with only_writer(tmp_path):
        pass


def test_what_a_killed_run_left_is_tidied(tmp_path):
    run(tmp_path, steps=4, log_every=1)
    (tmp_path / "checkpoint-00000006.pt.abc.tmp").touch()
    (tmp_path / "weights.safetensors.abc.tmp").touch()
    log = tmp_path / "log.jsonl"
    lines = log.read_text()
    log.write_text(lines + '{"step": 5, "loss": 1}\n{"step": 6, "lo')  # steps after the last checkpoint, cut off
    run(tmp_path, True, steps=6, log_every=1)
    assert not list(tmp_path.glob("*.tmp"))
    records = log.read_text().splitlines()
    assert records[:4] == lines.splitlines() and [json.loads(record)["step"] for record in records] == [1, 2, 3, 4, 5, 6]


def test_records_that_were_kept_are_json(tmp_path):
    """Also where an earlier version wrote numbers that JSON has not."""
    run(tmp_path, steps=2, log_every=1, checkpoint_every=2)
    log = tmp_path / "log.jsonl"
    log.write_text(log.read_text().replace('"gradient_norm": ', '"gradient_norm": NaN, "earlier": '))
    run(tmp_path, True, steps=3, log_every=1)
    records = [json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON")) for line in log.read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3] and records[0]["gradient_norm"] is None


FOREIGN = [b'{"a": 1}', b"5", b"null", b"[]", b'{"step": "x", "loss": 1}', b'{"step": 1}', b"\xff\xfe\x00bad"]


@pytest.mark.parametrize("line", FOREIGN, ids=repr)
def test_a_log_is_not_needed_to_go_on(line, tmp_path):
    """Whatever somebody has written into it."""
    run(tmp_path, steps=2, log_every=1, checkpoint_every=2)
    log = tmp_path / "log.jsonl"
    log.write_bytes(log.read_bytes() + line + b"\n")
    run(tmp_path, True, steps=4, log_every=1)
    assert [record["step"] for record in map(json.loads, log.read_text().splitlines()) if "loss" in record] == [1, 2, 3, 4]


def test_load_model_says_which_checkpoint_it_took(tmp_path):
    run(tmp_path)
    cut(tmp_path / "checkpoint-00000008.pt")
    with pytest.warns(UserWarning, match=r"checkpoint-00000008.pt: .*; checkpoint-00000006.pt is used"):
        model, _ = load_model(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(flat(model), flat(load_model(tmp_path / "checkpoint-00000006.pt")[0]))
    assert Path(tmp_path / "checkpoint-00000008.pt").is_file(), "reading renames nothing"


def test_a_record_says_how_many_steps_it_averages(tmp_path):
    """The first after a resume is the mean of those since then."""
    run(tmp_path, steps=8, log_every=4, checkpoint_every=5, keep_checkpoints=0)
    (tmp_path / "checkpoint-00000008.pt").unlink()
    run(tmp_path, True, steps=8, log_every=4, checkpoint_every=5, keep_checkpoints=0)
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(record["step"], record["averaged_steps"]) for record in records] == [(4, 4), (8, 3)]


def test_the_newest_checkpoint_of_a_run_that_goes_on(tmp_path, monkeypatch):
    """It may have been deleted, and followed by another, since the folder was read."""
    run(tmp_path, steps=4, keep_checkpoints=0)
    first, read = [True], run_folder.read_checkpoint

    def meanwhile(file, *arguments):
        if first:
            first.clear()
            shutil.move(file, RunFolder(tmp_path).checkpoint(5))
        return read(file, *arguments)

    monkeypatch.setattr(run_folder, "read_checkpoint", meanwhile)
    found = RunFolder(tmp_path).newest_valid()
    assert found.file == RunFolder(tmp_path).checkpoint(5) and found.damaged == {}


def test_folders_and_links_without_a_file_are_no_checkpoints(tmp_path):
    run(tmp_path, steps=4)
    folder = RunFolder(tmp_path)
    folder.checkpoint(1).mkdir()
    folder.checkpoint(99).symlink_to(tmp_path / "nowhere")
    found = folder.newest_valid()
    assert found.file == folder.checkpoint(4) and list(found.damaged) == [folder.checkpoint(99)]
    run(tmp_path, resuming=True, steps=5, keep_checkpoints=1)
    assert folder.checkpoints() == [folder.checkpoint(5)] and folder.checkpoint(1).is_dir()
    folder.clear()
    assert folder.checkpoint(1).is_dir()


def test_a_new_run_deletes_the_pictures_of_the_old_one(tmp_path):
    run(tmp_path, steps=4)
    (tmp_path / "checkpoint-00000002.pt.damaged").touch()
    assert RunFolder(tmp_path).samples.exists()
    RunFolder(tmp_path).clear()
    assert [file.name for file in tmp_path.iterdir()] == ["log.jsonl"]
