"""Checkpoints: exact resumption, interrupted saves, damaged files and those of others."""

import zipfile
from dataclasses import replace

import pytest
import torch
from trainer_helpers import CPU, advance, assert_same_state, moments, resume, tiny

from fm_fast.train.data import digits
from fm_fast.train.step import new_state
from fm_fast.train.storage import checkpoint
from fm_fast.train.storage.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("objective", ["fm-ot", "scoreflow"])
def test_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path, objective):
    config, data = tiny(objective=objective), digits()
    straight, first, second = trained(config, data, 8), trained(config, data, 4), new_state(config, CPU)
    checkpoint.save_checkpoint(tmp_path / "c.pt", first.state_dict(), config)
    resume(tmp_path / "c.pt", second, config)
    assert_same_state(first, second)
    assert len(moments(second)) == 5 * len(list(second.model.parameters()))
    losses = advance(second, config, data, 4)
    assert_same_state(straight, second)
    assert torch.equal(torch.stack(losses), torch.stack(advance(trained(config, data, 4), config, data, 4)))


def trained(config, data, steps):
    """A new state after that many steps."""
    state = new_state(config, CPU)
    advance(state, config, data, steps)
    return state


def test_resume_refuses_other_settings_but_takes_more_steps(tmp_path):
    config = tiny()
    checkpoint.save_checkpoint(tmp_path / "c.pt", new_state(config, CPU).state_dict(), config)
    resume(tmp_path / "c.pt", new_state(config, CPU), replace(config, steps=40, out="elsewhere", log_every=3))
    other = replace(config, seed=1, batch_size=8)
    with pytest.raises(ValueError, match="cannot resume with other settings: batch_size: 16 -> 8; seed: 0 -> 1"):
        resume(tmp_path / "c.pt", new_state(other, CPU), other)


def test_interrupted_save_keeps_the_old_file(tmp_path, monkeypatch):
    config, path = tiny(), tmp_path / "c.pt"
    state = new_state(config, CPU)
    checkpoint.save_checkpoint(path, state.state_dict(), config)
    before = path.read_bytes()

    def half_a_save(content, file):
        file.write(before[: len(before) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half_a_save)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save_checkpoint(path, state.state_dict(), config)
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["c.pt"]


def test_damaged_and_foreign_checkpoints(tmp_path):
    config, path = tiny(), tmp_path / "c.pt"
    with pytest.raises(FileNotFoundError, match=r"c.pt: no such checkpoint"):
        checkpoint.read_checkpoint(path)
    checkpoint.save_checkpoint(path, new_state(config, CPU).state_dict(), config)
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"garbage", b"\x80\x02not a checkpoint"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"c.pt: expected a complete checkpoint of fm_fast"):
            checkpoint.read_checkpoint(path)


def test_a_state_that_is_none(tmp_path):
    """Complete files with the right settings, as nothing of fm_fast writes them."""
    config = tiny()
    stored = new_state(config, CPU).state_dict()
    without = {name: value for name, value in stored.items() if name != "optimiser"}
    for number, state in enumerate(({}, 5, without, stored | {"step": "x"}, stored | {"average": {}})):
        file = tmp_path / f"{number}.pt"
        checkpoint.save_checkpoint(file, state, config)
        with pytest.raises(ValueError, match=rf"{number}.pt: expected the state of a run, got another \("):
            resume(file, new_state(config, CPU), config)


def test_a_file_cut_off_at_any_length_is_a_damaged_one(tmp_path):
    """In some such files torch's reader looks for a table of contents at a negative position, which is an OSError."""
    config, path = tiny(model=replace(tiny().model, channels=32)), tmp_path / "c.pt"
    checkpoint.save_checkpoint(path, new_state(config, CPU).state_dict(), config)
    whole = path.read_bytes()
    assert len(whole) > 300_000
    for length in (1, 30, 4096, 5000, 8192, 20_000, 33_000, 50_000, 65_536, 66_000, 67_584, len(whole) - 1):
        path.write_bytes(whole[:length])
        for mapped in (False, True):
            with pytest.raises(ValueError, match=r"c.pt: expected a complete checkpoint of fm_fast"):
                checkpoint.read_checkpoint(path, mapped)


@pytest.mark.parametrize("checksums", [True, False])
def test_bytes_that_changed_within_a_tensor_are_found(checksums, tmp_path):
    """Also in a process that has told torch to write no checksums."""
    config, path = tiny(), tmp_path / "c.pt"
    torch.serialization.set_crc32_options(checksums)
    try:
        checkpoint.save_checkpoint(path, new_state(config, CPU).state_dict(), config)
        assert torch.serialization.get_crc32_options() is checksums
    finally:
        torch.serialization.set_crc32_options(True)
    checkpoint.read_checkpoint(path)
    content = bytearray(path.read_bytes())
    middle = content.rindex(b"/data/", 0, len(content) // 2) + 512
    content[middle] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"c.pt: expected a complete .*its part \w+/data/\d+ has changed since it was written"):
        checkpoint.read_checkpoint(path)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"\x80\x02}}K\x01s.", id="a dictionary as a key"),
        pytest.param(b"\x80\x02K\x01Q.", id="a number as a tensor's place"),
        pytest.param(b"\x80\x02(X\x07\0\0\0storageX\1\0\0\0xX\1\0\0\0000X\3\0\0\0cpuK\4tQ.", id="a text as a kind of memory"),
    ],
)
def test_a_pickle_that_is_damaged(content, tmp_path):
    """As a changed byte makes it, which nothing finds where a file is mapped; torch then fails in ways of any kind."""
    config, path = tiny(), tmp_path / "checkpoint-00000001.pt"
    checkpoint.save_checkpoint(path, {}, config)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, part in parts.items():
            archive.writestr(name, content if name.endswith("data.pkl") else part)
    for mapped in (False, True):
        with pytest.raises(ValueError, match=r"checkpoint-00000001.pt: expected a complete checkpoint of fm_fast"):
            RunFolder(tmp_path).newest_valid(mapped)


class NotPlainData:
    """A pickle of this names a class, which reading must refuse."""


def test_checkpoints_of_others(tmp_path):
    path = tmp_path / "c.pt"
    for content, message in (
        ({"model": {}}, "expected a checkpoint of fm_fast .*got None"),
        ([1, 2], "got 'list'"),
        ({"format": "fm_fast.checkpoint", "version": 99}, "expected checkpoint version 2, got 99"),
        ({"format": "fm_fast.checkpoint", "version": 2}, "expected a checkpoint with config, .*got format, version"),
        (
            {"format": "fm_fast.checkpoint", "version": 2, "config": {"colour": "red"}, "state": {}},
            "expected the settings of a run, got others",
        ),
        (NotPlainData(), r"cannot be read \(it holds other things than tensors and plain values\)$"),
    ):
        torch.save(content, path)
        with pytest.raises(ValueError, match=message):
            checkpoint.read_checkpoint(path)


def test_a_file_of_another_kind_is_not_recommended_to_be_trusted(tmp_path):
    for content in (b"\x80\x02}q\x00.", b"some text\n" * 100):
        (tmp_path / "c.pt").write_bytes(content)
        with pytest.raises(ValueError, match=r"c.pt: expected a complete checkpoint .*\(File is not a zip file\)$"):
            checkpoint.read_checkpoint(tmp_path / "c.pt")


def test_a_full_disk_is_told_and_leaves_what_was_there(tmp_path):
    resource = pytest.importorskip("resource")
    config, path = tiny(), tmp_path / "c.pt"
    stored = new_state(config, CPU).state_dict()
    checkpoint.save_checkpoint(path, stored, config)
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(OSError, match=r"c\.pt: expected room for a checkpoint, but it could not be written"):
            checkpoint.save_checkpoint(path, stored, config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["c.pt"]


def test_parts_that_no_checkpoint_has_are_refused(tmp_path):
    config, path = tiny(), tmp_path / "c.pt"
    checkpoint.save_checkpoint(path, new_state(config, CPU).state_dict(), config)
    torch.save(torch.load(path, weights_only=True) | {"schedule": 1}, path)
    with pytest.raises(
        ValueError, match="expected a checkpoint with config, format, state, version, got config, format, schedule, state, version"
    ):
        checkpoint.read_checkpoint(path)


def test_a_file_that_must_not_be_read_is_not_a_damaged_one(tmp_path, monkeypatch):
    """A file that must not be read is not a damaged one."""
    config, path = tiny(), tmp_path / "c.pt"
    checkpoint.save_checkpoint(path, new_state(config, CPU).state_dict(), config)

    def forbidden(self, *arguments):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr("pathlib.Path.open", forbidden)
    with pytest.raises(PermissionError):
        checkpoint.read_checkpoint(path)


def test_a_folder_is_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        checkpoint.read_checkpoint(tmp_path)
