"""A run goes on without what a full disk has no room for and without pictures that fail, and keeps what it needs."""

import errno
import os
from pathlib import Path

import pytest
from trainer_helpers import tiny

from fm_fast.train import files, loop, train
from fm_fast.train.storage import run_folder
from fm_fast.train.storage.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK = {"sample_every": 0, "sample_steps": 1, "samples_per_class": 1, "evaluate": False, "batch_size": 4, "steps": 4}


def run(folder, **changes):
    return train(tiny(**{**QUICK, "out": str(folder), **changes}))


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "name")


def not_finite(*_, **__):
    raise FloatingPointError("4 of 4 samples are not finite")


@pytest.mark.parametrize("failure", [full, not_finite])
def test_training_goes_on_without_its_pictures(failure, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loop, "_write_samples", failure)
    result = run(tmp_path, sample_every=2)
    assert result.state.step == 4 and RunFolder(tmp_path).checkpoint(4).exists()
    assert capsys.readouterr().out.count("warning: no pictures of this step: ") == 2


def test_training_goes_on_without_a_checkpoint_on_the_way_but_not_without_the_last(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_folder, "save_checkpoint", full)
    with pytest.raises(OSError, match="No space left"):
        run(tmp_path, checkpoint_every=1)
    assert capsys.readouterr().out.count("warning: no checkpoint of this step: [Errno 28]") == 3


def test_another_error_of_a_checkpoint_ends_training_and_deletes_nothing(tmp_path, monkeypatch):
    save = run_folder.save_checkpoint

    def refused(path, *arguments):
        if path.name == "checkpoint-00000003.pt":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        save(path, *arguments)

    monkeypatch.setattr(run_folder, "save_checkpoint", refused)
    with pytest.raises(PermissionError):
        run(tmp_path, checkpoint_every=1, keep_checkpoints=3)
    assert sorted(file.name for file in tmp_path.glob("checkpoint-*")) == ["checkpoint-00000001.pt", "checkpoint-00000002.pt"]


def test_a_run_ends_well_without_its_weights_alone_which_its_checkpoint_has(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loop, "can_write_weights", lambda: True)
    monkeypatch.setattr(loop, "save_weights", full)
    assert run(tmp_path).state.step == 4 and RunFolder(tmp_path).checkpoint(4).exists()
    assert "warning: no weights.safetensors of this step: [Errno 28]" in capsys.readouterr().out


def test_training_goes_on_without_its_log_and_the_log_goes_on_when_there_is_room_again(tmp_path, monkeypatch, capsys):
    opened = Path.open

    def without_room(self, mode="r", *arguments, **settings):
        if self.name == "log.jsonl" and mode == "a" and not steps.pop(0):
            with opened(self, "a") as stream:
                stream.write('{"step": ')  # as far as the room went
            full()
        return opened(self, mode, *arguments, **settings)

    steps = [True, False, False, True, True, True]
    monkeypatch.setattr(Path, "open", without_room)
    run(tmp_path, log_every=1, steps=6)
    monkeypatch.undo()
    assert [record["step"] for record in files.read_records(tmp_path / "log.jsonl")] == [1, 4, 5, 6]
    assert capsys.readouterr().out.count("log.jsonl: no room for the record of step 2 and the following; training goes on") == 1


@pytest.mark.parametrize("keep", [2, 0])
def test_old_checkpoints_make_room_for_a_new_one(keep, tmp_path, monkeypatch):
    """All but the newest, and only where they would be deleted anyway."""
    save = run_folder.save_checkpoint

    def with_room_for_two(path, *arguments):
        if len(list(tmp_path.glob("checkpoint-*.pt"))) >= 2:
            full()
        save(path, *arguments)

    monkeypatch.setattr(run_folder, "save_checkpoint", with_room_for_two)
    if keep == 0:
        with pytest.raises(OSError, match="No space left"):
            run(tmp_path, checkpoint_every=1, keep_checkpoints=0)
    else:
        run(tmp_path, checkpoint_every=1, keep_checkpoints=2)
    names = sorted(file.name for file in tmp_path.glob("checkpoint-*.pt"))
    assert names == [f"checkpoint-{step:08d}.pt" for step in ((3, 4) if keep else (1, 2))]
