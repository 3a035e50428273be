"""The files of the cache: who makes them, who waits, and what is left behind."""

import os
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from fm_fast.train.data.readers.cache import cache_file, make_once
from fm_fast.train.files import held_in_turn, is_held
from fm_fast.train.prepare import Preparation

fcntl = pytest.importorskip("fcntl", reason="no locks here")

WAIT = 60.0  # seconds, for what takes milliseconds


@pytest.fixture
def source(tmp_path):
    (tmp_path / "data").mkdir()
    file = tmp_path / "data" / "source"
    file.write_text("pixels")
    return file


def cached(source, reading="some way"):
    return cache_file(Preparation(cache=str(source.parent.parent / "cache")), [source], reading, ".u8")


def make(file, text="made"):
    make_once(file, file.exists, lambda place: place.write_text(text))


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def test_a_file_is_made_once(source):
    file = cached(source)
    make(file, "first")
    make(file, "second")
    assert file.read_text() == "first" and names(file.parent) == [file.name] and cached(source) == file


def test_what_a_killed_process_left_is_written_over(source):
    file = cached(source)
    file.parent.mkdir()
    file.with_name(f"{file.name}.tmp").write_text("half of it, and more than there is to come")

    def write_within(place):
        with place.open("r+") as opened:  # as through a mapping, which does not shorten the file
            opened.write("whole")

    make_once(file, file.exists, write_within)
    assert file.read_text() == "whole" and names(file.parent) == [file.name]


def test_a_file_that_another_process_has_just_made_is_not_made_again(source):
    """Between the look for it and the lock."""
    file = cached(source)
    looks = iter([False, True, True])

    def make(place):
        raise AssertionError("made twice")

    make_once(file, lambda: next(looks), make)
    assert names(file.parent) == []


def test_a_file_that_goes_while_it_is_looked_at(source, monkeypatch):
    file = cached(source)
    gone = iter([True])

    def stat(self, **options):
        if self.suffix == ".tmp" and next(gone, False):
            raise FileNotFoundError(self)
        return original(self, **options)

    original = Path.stat
    monkeypatch.setattr(Path, "stat", stat)
    make(file)
    assert file.read_text() == "made"


def test_a_failure_leaves_nothing(source):
    file = cached(source)

    def fail(place):
        place.write_text("half")
        raise FileNotFoundError("an image")

    with pytest.raises(FileNotFoundError, match="an image"):
        make_once(file, file.exists, fail)
    assert names(file.parent) == []


class Maker(threading.Thread):
    """Makes the file with a text of its own; where it is told to, it waits in the middle until it may go on, and then fails."""

    def __init__(self, file, text, may_go_on=None, fails=False):
        super().__init__(daemon=True)
        self.file, self.text, self.may_go_on, self.fails = file, text, may_go_on, fails
        self.began, self.made = threading.Event(), False

    def run(self):
        with suppress(ZeroDivisionError):
            make_once(self.file, self.file.exists, self.make)

    def make(self, place):
        self.began.set()
        if self.may_go_on is not None:
            assert self.may_go_on.wait(WAIT)
        if self.fails:
            raise ZeroDivisionError
        place.write_text(self.text)
        self.made = True


@pytest.mark.parametrize("fails", [False, True])
def test_others_wait_for_the_one_that_makes_it(source, fails, capsys):
    """And make it themselves if that one fails. Locks are of open files, so threads stand for processes."""
    file, may_go_on = cached(source), threading.Event()
    first = Maker(file, "first", may_go_on, fails)
    first.start()
    assert first.began.wait(WAIT)
    others = [Maker(file, "other") for _ in range(3)]
    for other in others:
        other.start()
    told, deadline = "", time.monotonic() + WAIT
    while told.count(f"waiting for another process, which writes {file}") < len(others):
        assert time.monotonic() < deadline
        time.sleep(0.01)
        told += capsys.readouterr().out
    assert not any(other.began.is_set() for other in others)
    may_go_on.set()
    for thread in (first, *others):
        thread.join(WAIT)
        assert not thread.is_alive()
    assert sum(other.made for other in others) == fails and file.read_text() == ("other" if fails else "first")
    assert names(file.parent) == [file.name]


def test_without_locks_two_may_make_the_same(source, monkeypatch):
    def no_locks(descriptor, operation):
        raise OSError("no locks here")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    file = cached(source)

    def make_twice(place):
        place.write_text("made")
        os.replace(place, file)  # as the other one

    make_once(file, file.exists, make_twice)
    assert file.read_text() == "made" and names(file.parent) == [file.name]


def test_what_changed_or_is_read_otherwise_is_another_file(source):
    before, otherwise = cached(source), cached(source, "another way")
    source.write_text("other pixels")
    assert len({before, otherwise, cached(source)}) == 3


def test_who_looks_whether_a_file_is_held_does_not_hold_it(tmp_path):
    file = tmp_path / "file"
    assert not is_held(file), "not there"
    with held_in_turn(file) as is_there:
        assert is_there and is_held(file)
    with file.open("rb") as opened:
        fcntl.flock(opened, fcntl.LOCK_SH)
        assert not is_held(file)


def test_names_that_are_no_text(tmp_path):
    """Of bytes that are not UTF-8, as a file system may have them."""
    file = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    try:
        file.touch()
    except OSError:
        pytest.skip("this file system has no such names")
    assert cached(file) == cached(file)
