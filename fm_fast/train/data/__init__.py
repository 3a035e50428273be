"""Data sets: where they come from, what they are in memory, and the order in which training reads them."""

from fm_fast.train.data.ahead import OrderAhead
from fm_fast.train.data.dataset import SHARE, TEST_PART, UNDIVIDED, Dataset, make_dataset, with_levels
from fm_fast.train.data.order import DataOrder, epoch_order
from fm_fast.train.data.sources import SHIPPED, digits, levels_of, load_dataset

__all__ = [
    "SHARE",
    "SHIPPED",
    "TEST_PART",
    "UNDIVIDED",
    "DataOrder",
    "Dataset",
    "OrderAhead",
    "digits",
    "epoch_order",
    "levels_of",
    "load_dataset",
    "make_dataset",
    "with_levels",
]
