"""The files of the cache: who makes them, who waits, and what is left behind."""

import fcntl
import os
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from fm_fast.train.cache import cache_file, make_once
from fm_fast.train.prepare import Preparation

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


def changed(source):
    """The place in the cache once the source is another."""
    source.write_text(source.read_text() + ".")
    return cached(source)


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
    make_once(file, file.exists, lambda place: place.write_text("whole"))
    assert file.read_text() == "whole" and names(file.parent) == [file.name]


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
    told = ""
    while told.count(f"waiting for another process, which writes {file}") < len(others):
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


def test_older_files_of_the_same_source_are_deleted(source):
    """Those of other sources, and of another reading, are not."""
    other_source = source.parent / "other"
    other_source.write_text("other pixels")
    kept = [cached(other_source), cached(source, "another way")]
    older = cached(source)
    for file in (*kept, older):
        make(file)
    beside, left = older.with_suffix(".npz"), older.with_name(f"{older.name}.tmp")
    for file in (beside, left):
        file.touch()
    newer = changed(source)
    assert newer != older
    newer.with_suffix(".npz").touch()
    make(newer)
    assert names(newer.parent) == sorted(file.name for file in (*kept, newer, newer.with_suffix(".npz")))


def test_an_older_file_that_is_being_made_stays(source):
    older, may_go_on = cached(source), threading.Event()
    slow = Maker(older, "older", may_go_on)
    slow.start()
    assert slow.began.wait(WAIT)
    make(changed(source))
    may_go_on.set()
    slow.join(WAIT)
    assert slow.made and older.read_text() == "older"


def test_names_that_are_no_text(tmp_path):
    """Of bytes that are not UTF-8, as a file system may have them."""
    file = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    try:
        file.touch()
    except OSError:
        pytest.skip("this file system has no such names")
    assert cached(file) == cached(file)
