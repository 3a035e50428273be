"""The order in which training reads images: a function of counters, with nothing to save."""

import torch
from torch import Tensor

from fm_fast.random import noise
from fm_fast.train.data.dataset import Dataset


def epoch_order(size: int, seed: int, epoch: int) -> Tensor:
    """A permutation of 0..size-1 as a pure function of (seed, epoch): int64 [size], on the CPU.

    The ranks of the words of stream data_order, whose step is the epoch and whose sample ids are the indices.
    """
    words = noise((size,), seed=seed, step=epoch, stream="data_order", kind="word", device="cpu")
    return words.argsort(stable=True)


class DataOrder:
    """Which image is at each position of an endless, shuffled sequence; keeps the latest epoch's permutation.

    `order.indices(first, count)`: int64 [count], the same whether positions are read in one batch or in several.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed
        self._epoch, self._permutation = -1, torch.empty(0, dtype=torch.int64)

    def indices(self, first: int, count: int) -> Tensor:
        parts, position, last = [], first, first + count
        while position < last:
            start = position % self.size
            length = min(last - position, self.size - start)
            parts.append(self._order_of(position // self.size)[start : start + length])
            position += length
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)

    def read(self, dataset: Dataset, first: int, count: int) -> tuple[Tensor, Tensor]:
        """(images, labels) of the data set at positions first, first + 1, ..."""
        return dataset.batch(self.indices(first, count))

    def _order_of(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            self._epoch, self._permutation = epoch, epoch_order(self.size, self.seed, epoch)
        return self._permutation
