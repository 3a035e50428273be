"""Mapped images are read while the step before is taken: the same batches, and no read waits for the one before it."""

import threading
from dataclasses import replace

import pytest
import torch
from trainer_helpers import tiny

from fm_fast.train.data import DataOrder, OrderAhead, ahead, digits
from fm_fast.train.loop import train

pytestmark = pytest.mark.usefixtures("one_thread")
STRIDE, COUNT = 12, 5


@pytest.fixture
def data():
    """Ten images, so that an epoch ends within a batch."""
    whole = digits()
    return replace(whole, images=whole.images[:10], labels=whole.labels[:10], mapped=True)


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("count", [0, 1, COUNT, 23])
def test_the_same_batches(data, count):
    """One process's share of each step."""
    plain, found = DataOrder(10, seed=4), OrderAhead(10, seed=4, stride=STRIDE)
    for step in range(6):
        first = step * STRIDE + 3
        assert_same(found.read(data, first, count), plain.read(data, first, count))


def test_places_that_were_not_expected(data):
    """Another place or another number of images than those read ahead, and back."""
    found = OrderAhead(10, seed=4, stride=STRIDE)
    for first, count in ((0, 5), (40, 5), (52, 3), (0, 5)):
        assert_same(found.read(data, first, count), DataOrder(10, seed=4).read(data, first, count))


def test_a_batch_keeps_its_images_while_the_next_is_read(data):
    order = OrderAhead(10, seed=4, stride=STRIDE)
    first, _ = order.read(data, 0, COUNT)
    before = first.clone()
    second, _ = order.read(data, STRIDE, COUNT)
    assert torch.equal(first, before) and first.data_ptr() != second.data_ptr()


@pytest.fixture
def gate(monkeypatch):
    """Readers that note their threads, and wait until it is open."""
    gate, read = threading.Event(), ahead._read
    gate.readers = []

    def slowly(*arguments):
        gate.readers.append(threading.current_thread())
        assert gate.wait(60)
        return read(*arguments)

    monkeypatch.setattr(ahead, "_read", slowly)
    return gate


def test_the_next_batch_is_on_its_way_when_one_is_given_out(data, gate):
    """By several threads at once."""
    order = OrderAhead(10, seed=4, stride=STRIDE)
    gate.set()
    order.read(data, 0, 16)
    for part in order._ahead.parts:
        part.result()
    gate.clear(), gate.readers.clear()
    order.read(data, STRIDE, 16)  # which has been read: the closed gate holds up the one after it alone
    gate.set()
    for part in order._ahead.parts:
        part.result()
    assert len(gate.readers) == ahead.READERS and threading.main_thread() not in gate.readers


def test_what_a_reader_raises_is_raised(data, monkeypatch):
    def fails(*arguments):
        raise OSError("the disk is gone")

    monkeypatch.setattr(ahead, "_read", fails)
    with pytest.raises(OSError, match="the disk is gone"):
        OrderAhead(10, seed=4, stride=STRIDE).read(data, 0, COUNT)


def test_runs_on_mapped_images_read_ahead(tmp_path, monkeypatch):
    """And those in memory do not."""
    images = digits()
    asked = []
    monkeypatch.setattr(OrderAhead, "read", lambda self, *arguments: asked.append(arguments) or DataOrder.read(self, *arguments))
    for mapped in (True, False):
        monkeypatch.setattr("fm_fast.train.loop.load_dataset", lambda *_: replace(images, mapped=mapped))  # noqa: B023
        train(tiny(out=str(tmp_path / str(mapped)), steps=3, sample_every=0, sample_steps=1, samples_per_class=1, evaluate=False))
        assert len(asked) == 3


def test_room_on_the_host(data):
    room = data.room_for(7)
    assert (room.shape, room.dtype, room.device.type, room.is_pinned()) == ((7, *data.images.shape[1:]), torch.uint8, "cpu", False)
