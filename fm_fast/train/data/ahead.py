"""Images of a mapped file, read by threads while the step before is taken: a disk takes longer for a batch than a step may."""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from fm_fast.train.data.dataset import Dataset
from fm_fast.train.data.order import DataOrder

READERS = 8  # pages that are asked for at once, while each waits for the disk


@dataclass(frozen=True)
class _Reading:
    """A batch on its way: images [count, C, H, W] of the rows, there when all parts are."""

    place: tuple[int, int]
    rows: Tensor
    images: Tensor
    parts: list[Future[Tensor]]

    def wait(self) -> None:
        for part in self.parts:
            part.result()


class OrderAhead(DataOrder):
    """The same order, whose `read` begins to read what is `stride` positions further on, where the next step will be."""

    def __init__(self, size: int, seed: int, stride: int) -> None:
        super().__init__(size, seed)
        self._stride, self._threads = stride, ThreadPoolExecutor(READERS, "fm-fast-data")
        self._ahead: _Reading | None = None

    def read(self, dataset: Dataset, first: int, count: int) -> tuple[Tensor, Tensor]:
        reading = self._ahead
        if reading is None or reading.place != (first, count):
            reading = self._begun(dataset, first, count)
        reading.wait()
        self._ahead = self._begun(dataset, first + self._stride, count)
        return dataset.batch(reading.rows, reading.images)

    def _begun(self, dataset: Dataset, first: int, count: int) -> _Reading:
        """Threads only read: what they write to was made here, since a CUDA graph may be recorded meanwhile."""
        rows, images = self.indices(first, count), dataset.room_for(count)
        size = max(1, -(-count // READERS))
        pairs = zip(rows.split(size), images.split(size), strict=True)
        return _Reading((first, count), rows, images, [self._threads.submit(_read, dataset.images, *pair) for pair in pairs])


def _read(images: Tensor, rows: Tensor, out: Tensor) -> Tensor:
    return torch.index_select(images, 0, rows, out=out)
