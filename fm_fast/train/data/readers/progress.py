"""A progress bar for people, while data are read."""

import sys
from collections.abc import Iterable
from importlib.util import find_spec
from typing import TypeVar

Item = TypeVar("Item")


def with_progress(items: Iterable[Item], total: int, unit: str) -> Iterable[Item]:
    """The same items, counted on a terminal; without tqdm they are not."""
    if not sys.stderr.isatty() or find_spec("tqdm") is None:
        return items
    from tqdm import tqdm

    return tqdm(items, total=total, desc="reading images", unit=unit, dynamic_ncols=True)
