"""Files that are replaced whole: links, streams and full disks, and file systems that have less to offer."""

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from fm_fast.train import files
from fm_fast.train.files import replaced_whole


def test_a_file_is_the_old_one_or_the_new_one(tmp_path):
    file = tmp_path / "name"
    for text in ("first", "second"):
        with replaced_whole(file) as temporary:
            temporary.write_text(text)
    with pytest.raises(KeyError), replaced_whole(file) as temporary:
        temporary.write_text("third")
        raise KeyError
    assert file.read_text() == "second" and list(tmp_path.iterdir()) == [file]
    assert file.stat().st_mode & 0o777 == 0o666 & ~umask(tmp_path)


def test_a_writer_may_put_a_file_of_its_own_in_place_of_the_temporary_one(tmp_path):
    """As safetensors does, readable by its owner alone."""
    with replaced_whole(tmp_path / "name") as temporary:
        temporary.unlink()
        os.close(os.open(temporary, os.O_CREAT | os.O_WRONLY, 0o600))
    assert (tmp_path / "name").stat().st_mode & 0o777 == 0o666 & ~umask(tmp_path)


def umask(tmp_path):
    (tmp_path / "plain").touch()
    return 0o666 & ~((tmp_path / "plain").stat().st_mode & 0o777)


def test_a_full_disk_is_told_with_the_name_of_the_file(tmp_path):
    file = tmp_path / "name"
    with pytest.raises(OSError, match=r"No space left on device: '.*name'"), replaced_whole(file):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_file_is_not_replaced(tmp_path):
    """A pipe here, which stands for devices: a test that fails must not replace those of the machine."""
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    reader = os.open(pipe, os.O_RDWR)
    with replaced_whole(link) as place:
        place.write_text("through")
    assert os.read(reader, 100) == b"through" and pipe.is_fifo() and link.is_symlink()
    os.close(reader)


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
from fm_fast.train.execution.interrupt import deferred_interrupt
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
