"""What a run meets outside of itself: links and streams as targets, full disks, data of other grey levels, moved and damaged files."""

import errno
import json
import os
import re
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from copies import run_python
from test_data_files import write_cifar
from trainer_helpers import tiny

from fm_fast.cli import main
from fm_fast.train import files, loop, run_folder, train
from fm_fast.train.checkpoint import read_checkpoint
from fm_fast.train.data import digits, load_dataset
from fm_fast.train.files import replaced_whole
from fm_fast.train.interrupt import deferred_interrupt
from fm_fast.train.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK = {"sample_every": 0, "sample_steps": 1, "samples_per_class": 1, "evaluate": False, "batch_size": 4, "steps": 4}


def run(folder, resuming=False, overwriting=False, **changes):
    return train(tiny(**{**QUICK, "out": str(folder), **changes}), resuming, overwriting)


@pytest.fixture(scope="module")
def of_digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    run(folder)
    return folder


# Targets


def test_the_file_that_a_link_names_is_replaced(tmp_path):
    (tmp_path / "real").mkdir()
    target, link = tmp_path / "real" / "target.json", tmp_path / "link.json"
    target.write_text("old")
    link.symlink_to(target)
    with replaced_whole(link) as temporary:
        temporary.write_text("new")
    assert link.is_symlink() and target.read_text() == "new" and list((tmp_path / "real").iterdir()) == [target]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="open files have no names here")
def test_a_stream_is_appended_to_and_stays_what_it_is(tmp_path):
    """/dev/stdout is a link to an open file, which it may have been sent to with something in it."""
    opened = tmp_path / "opened"
    with opened.open("w") as stream:
        stream.write("before\n")
        stream.flush()
        link = tmp_path / "stdout"
        link.symlink_to(f"/proc/{os.getpid()}/fd/{stream.fileno()}")
        for place in (link, Path(os.readlink(link))):
            with replaced_whole(place) as temporary:
                temporary.write_text("written\n")
        assert link.is_symlink()
    assert opened.read_text() == "before\nwritten\nwritten\n"
    reading, writing = os.pipe()
    with replaced_whole(Path(f"/proc/{os.getpid()}/fd/{writing}")) as temporary:
        temporary.write_text("through")
    assert os.read(reading, 100) == b"through"
    os.close(reading), os.close(writing)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="open files have no names here")
def test_results_to_standard_output_follow_the_report(of_digits, tmp_path):
    """By a link of the test's own, to what cannot be replaced: /dev/stdout itself could be, by a test that fails."""
    (tmp_path / "stdout").symlink_to("/proc/self/fd/1")
    code = f"""
import sys
from fm_fast.cli import main
sys.exit(main(["likelihood", {str(of_digits)!r}, "--limit", "2", "--steps", "1", "--json", {str(tmp_path / "stdout")!r}]))
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    report, record = result.stdout.rsplit("\n", 2)[0], json.loads(result.stdout.splitlines()[-1])
    assert "bits/dim: " in report and record["images"] == 2 and (tmp_path / "stdout").is_symlink()


def test_a_full_stream_is_told_by_its_name(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "name")
    reader = os.open(tmp_path / "name", os.O_RDWR)
    monkeypatch.setattr(files.shutil, "copyfileobj", no_room)
    with pytest.raises(OSError, match=r"No space left on device: '.*name'"), replaced_whole(tmp_path / "name") as temporary:
        temporary.write_text("lost")
    os.close(reader)


def no_room(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="open files have no names here")
@pytest.mark.parametrize("closed", [False, True])
def test_what_is_printed_later_follows_what_was_appended(closed, tmp_path):
    """Where standard output has been sent to a file; and without one, results still reach other streams."""
    link, opened = tmp_path / "stdout", tmp_path / "opened"
    link.symlink_to("/proc/self/fd/1" if not closed else tmp_path / "pipe")
    code = f"""
import os, sys
from pathlib import Path
from fm_fast.train.files import replaced_whole
from fm_fast.train.interrupt import deferred_interrupt
if not {closed}:
    print("before")
else:
    sys.stdout = None
    os.mkfifo({str(tmp_path / "pipe")!r})
    reader = os.open({str(tmp_path / "pipe")!r}, os.O_RDWR)
with replaced_whole(Path({str(link)!r})) as temporary:
    temporary.write_text("written\\n")
if {closed}:
    os.write(1, os.read(reader, 100))
else:
    print("after")
"""
    with opened.open("w") as stream:
        descriptor = os.dup(1)
        os.dup2(stream.fileno(), 1)
        try:
            result = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
        finally:
            os.dup2(descriptor, 1)
            os.close(descriptor)
    assert result.returncode == 0, result.stderr
    assert opened.read_text().splitlines()[-3:] == (["written"] if closed else ["before", "written", "after"])


@pytest.mark.parametrize("where", ["circle", "nowhere"])
def test_links_that_lead_to_no_file_are_told_before_the_work(where, tmp_path, capsys):
    link = tmp_path / "link.json"
    link.symlink_to(link if where == "circle" else tmp_path / "none" / "target.json")
    assert main(["likelihood", str(tmp_path), "--json", str(link)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("fm-fast: error: json: expected a file") and ("there is no folder" in error) == (where == "nowhere")


# Full disks and failing pictures


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


# The folder


def test_the_newest_checkpoint_of_a_run_that_goes_on(tmp_path, monkeypatch):
    """It may have been deleted, and followed by another, since the folder was read."""
    run(tmp_path, checkpoint_every=2, keep_checkpoints=0)
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
    run(tmp_path)
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
    run(tmp_path)
    (tmp_path / "checkpoint-00000002.pt.damaged").touch()
    assert RunFolder(tmp_path).samples.exists()
    RunFolder(tmp_path).clear()
    assert [file.name for file in tmp_path.iterdir()] == ["log.jsonl"]


# Data


def held_out(tmp_path, **changes):
    """The held-out digits as a file, which does not tell that they have 17 levels."""
    data = digits("test")
    images = (data.images + changes.get("shift", 0)).numpy()
    np.savez(tmp_path / "mine.npz", images=images, labels=data.labels.numpy())
    return str(tmp_path / "mine.npz")


def record_of(command, folder, tmp_path, *arguments):
    out = tmp_path / "result.json"
    assert main([command, str(folder), "--limit", "4", *arguments, "--json", str(out)]) == 0
    return json.loads(out.read_text())


def test_files_have_the_grey_levels_of_the_run(of_digits, tmp_path):
    data, settings = held_out(tmp_path), ("--steps", "2", "--seed", "3")
    found, expected = (record_of("likelihood", of_digits, tmp_path, *settings, "--data", name) for name in (data, "digits:test"))
    assert found["bits_per_dim_of_images"] == expected["bits_per_dim_of_images"] and found["levels"] == 17
    settings = ("--method", "euler", "--steps", "1", "--no-bits")
    found, expected = (record_of("evaluate", of_digits, tmp_path, *settings, "--data", name) for name in (data, "digits:test"))
    assert {name for name in found if found[name] != expected[name]} <= {"data", "seconds"}


def test_images_of_more_grey_levels_than_the_run_are_refused(of_digits, tmp_path, capsys):
    assert main(["likelihood", str(of_digits), "--data", held_out(tmp_path, shift=1), "--steps", "1"]) == 1
    assert "data: expected values below 17, the grey levels that the run was trained on, got 17" in capsys.readouterr().err
    run(tmp_path / "run", data=held_out(tmp_path))
    assert main(["likelihood", str(tmp_path / "run"), "--data", "digits:test", "--steps", "1"]) == 1
    error = capsys.readouterr().err
    assert "data: expected images of 256 grey levels, as the run was trained on, got digits:test with 17" in error


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((4, 16, 16), np.uint8), np.arange(4), r"data: expected images of \(1, 8, 8\) for this network, got \(1, 16, 16\)"),
        (np.zeros((4, 8, 8), np.uint8), np.array([0, 1, 2, 14]), "data: expected at most 10 classes for this network, got 15"),
    ],
)
def test_images_that_do_not_fit_are_refused_before_samples_are_drawn(images, labels, message, of_digits, tmp_path, capsys):
    np.savez(tmp_path / "other.npz", images=images, labels=labels)
    arguments = ["--no-bits", "--method", "euler", "--steps", "1", "--data", str(tmp_path / "other.npz")]
    assert main(["evaluate", str(of_digits), *arguments]) == 1
    assert re.search(message, capsys.readouterr().err)


def moved(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (24, 8, 8), dtype=np.uint8)
    old, new = tmp_path / "old.npz", tmp_path / "new.npz"
    np.savez(old, images=images, labels=np.arange(24) % 3, test_images=images[:8], test_labels=np.arange(8) % 3)
    run(tmp_path / "run", data=str(old), steps=2)
    shutil.move(old, new)
    return str(old), str(new)


def test_a_finished_run_is_evaluated_with_its_data_at_their_new_place(tmp_path, capsys):
    old, new = moved(tmp_path)
    arguments = ["evaluate", str(tmp_path / "run"), "--no-bits", "--method", "euler", "--steps", "1"]
    assert main(arguments) == 1 and "old.npz: no such file" in capsys.readouterr().err
    assert main([*arguments, "--data", new]) == 0
    assert f"warning: the run's data, {old}, are not there: training images are those of " in capsys.readouterr().err


def test_a_finished_run_remembers_the_new_place_of_its_data(tmp_path, capsys):
    _, new = moved(tmp_path)
    capsys.readouterr()
    assert main(["train", "--resume", "--out", str(tmp_path / "run"), "--data", new]) == 0
    told = capsys.readouterr().out
    assert "no step was left to take; there are " in told and "trained in" not in told
    assert read_checkpoint(RunFolder(tmp_path / "run").checkpoint(2))["config"]["data"] == new
    assert main(["evaluate", str(tmp_path / "run"), "--no-bits", "--method", "euler", "--steps", "1"]) == 0


@pytest.mark.parametrize("damage", ["checksum", "end", "xz"])
def test_a_damaged_archive_is_refused_though_its_members_can_be_read(damage, tmp_path):
    folder, archive = tmp_path / "cifar-10-batches-bin", tmp_path / "cifar.tar.gz"
    folder.mkdir()
    write_cifar(folder, "binary")
    with tarfile.open(archive, "w:xz" if damage == "xz" else "w:gz") as opened:
        opened.add(folder, arcname=folder.name)
    content = bytearray(archive.read_bytes())
    if damage == "end":
        del content[-6:]
    else:
        content[-8 if damage == "checksum" else len(content) // 2] ^= 0xFF  # the first byte of gzip's CRC-32
    archive.write_bytes(content)
    with pytest.raises(ValueError, match=r"cifar\.tar\.gz: expected a complete tar archive of CIFAR-10"):
        load_dataset(archive)


@pytest.mark.parametrize("depth", [8, 16])
def test_colours_of_sixteen_bits_are_refused(depth, tmp_path):
    """Pillow would keep the upper half of each without a word."""
    pytest.importorskip("PIL")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "image.png").write_bytes(png(depth))
    if depth == 8:
        assert load_dataset(tmp_path).images.shape == (1, 3, 2, 2)
    else:
        with pytest.raises(ValueError, match=r"image\.png: expected 8 bits a channel, got more, in mode RGB"):
            load_dataset(tmp_path)


def png(depth):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    rows = (b"\x00" + bytes(2 * 3 * depth // 8)) * 2
    header = struct.pack(">IIBBBBB", 2, 2, depth, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_no_name_is_no_place(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="data: expected 'digits', 'fashion' or a path to data, got ''"):
        load_dataset("")
    assert main(["train", "--data", ""]) == 1
    assert capsys.readouterr().err == "fm-fast: error: data: expected --data PATH, got ''\n"


# Settings


def test_a_setting_of_the_network_is_called_as_its_option_is(capsys):
    assert main(["train", "digits", "--model.groups", "0"]) == 1
    assert capsys.readouterr().err.startswith("fm-fast: error: model.groups: expected at least 1")


def test_one_image_has_no_standard_error(of_digits, capsys):
    assert main(["likelihood", str(of_digits), "--limit", "1", "--steps", "1"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("bits/dim: ")]
    assert "+-" not in line and "nan" not in line


SMALL = ["--model.channels", "8", "--model.groups", "4", "--model.head-channels", "8", "--sample-steps", "1", "--samples-per-class", "1"]
BRIEF = ["train", "digits", "--steps", "2", "--batch-size", "4", "--no-evaluate", *SMALL]


@pytest.mark.parametrize(
    ("settings", "name", "other"), [(["--objective", "ddpm", "--preconditioned", "off"], "preconditioned", "on"),
                                    (["--sigma-min", "0.3"], "sigma_min", "0.1")],
)  # fmt: skip
def test_a_run_takes_the_task_of_the_one_that_it_begins_with(settings, name, other, tmp_path, capsys):
    """By which the same weights mean something else."""
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    assert main([*BRIEF, *settings, "--out", first]) == 0
    assert main([*BRIEF, "--init-from", first, "--out", second]) == 0
    stored = [RunFolder(Path(folder)).settings() for folder in (first, second)]
    assert stored[0].recipe == stored[1].recipe and getattr(stored[1], name) != getattr(tiny(), name)
    capsys.readouterr()
    option = f"--{name.replace('_', '-')}"
    assert main([*BRIEF, "--init-from", first, option, other, "--out", str(tmp_path / "third")]) == 1
    expected = f"{name}: expected {getattr(stored[0], name)}, as of init_from {first}, got {other}"
    assert expected in capsys.readouterr().err


def test_another_objective_than_that_of_the_run_to_begin_with_is_named(tmp_path, capsys):
    first = str(tmp_path / "first")
    assert main([*BRIEF, "--sigma-min", "0.3", "--out", first]) == 0
    capsys.readouterr()
    assert main([*BRIEF, "--init-from", first, "--objective", "ddpm", "--out", str(tmp_path / "second")]) == 1
    assert capsys.readouterr().err == f"fm-fast: error: objective: expected fm-ot, as of init_from {first}, got ddpm\n"
    assert main([*BRIEF, "--init-from", first, "--preconditioned", "off", "--sigma-min", "0.1", "--out", str(tmp_path / "second")]) == 1
    assert "sigma_min: expected 0.3, as of init_from" in capsys.readouterr().err


# Platforms


@pytest.mark.parametrize("encoding", ["cp1251", "ascii"])
def test_letters_that_the_output_has_not_cost_no_result(encoding, of_digits, tmp_path):
    arguments = ["evaluate", str(of_digits), "--limit", "4", "--no-bits", "--method", "euler", "--steps", "1"]
    code = f"""
import io, sys
sys.stdout = io.TextIOWrapper(sys.stdout.buffer, encoding={encoding!r})
from fm_fast.cli import main
from fm_fast.train.log import tell
tell("out-\u00e9")
sys.exit(main({[*arguments, "--json", str(tmp_path / "result.json")]!r}))
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert "out-\\xe9" in result.stdout and "Fr\\xe9chet" in result.stdout and (tmp_path / "result.json").exists()


def test_a_circle_of_links_is_not_replaced(tmp_path):
    link = tmp_path / "loop"
    link.symlink_to(link)
    with pytest.raises(OSError, match="loop"), replaced_whole(link) as temporary:
        temporary.write_text("lost")
    assert link.is_symlink()


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EIO])
def test_folders_that_cannot_be_brought_to_the_disk(number, tmp_path, monkeypatch):
    """As some file systems have none of that."""
    fsync = os.fsync

    def without_folders(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", without_folders)
    if number == errno.EIO:
        with pytest.raises(OSError, match="name"), replaced_whole(tmp_path / "name") as temporary:
            temporary.write_text("new")
    else:
        with replaced_whole(tmp_path / "name") as temporary:
            temporary.write_text("new")
        assert (tmp_path / "name").read_text() == "new"


def test_a_name_as_long_as_names_may_be(tmp_path):
    file = tmp_path / ("\u00e9" * 120 + ".json")
    with replaced_whole(file) as temporary:
        temporary.write_text("new")
    assert file.read_text() == "new" and list(tmp_path.iterdir()) == [file]


def test_signals_that_others_handle_stay_theirs(monkeypatch):
    handled = signal.getsignal
    monkeypatch.setattr(signal, "getsignal", lambda number: None if number == signal.SIGTERM else handled(number))
    before = handled(signal.SIGTERM)
    with deferred_interrupt():
        assert handled(signal.SIGTERM) is before and handled(signal.SIGINT) is not signal.default_int_handler
    assert handled(signal.SIGINT) is signal.default_int_handler
