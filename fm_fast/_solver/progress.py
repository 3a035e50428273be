"""A progress bar, where one is asked for."""

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def step_counter(total: int, show: bool) -> Iterator[Callable[[], None]]:
    """A function to call after each step. Raises ImportError if a bar is asked for and tqdm is missing."""
    if not show:
        yield lambda: None
        return
    try:
        from tqdm.auto import tqdm
    except ImportError:
        raise ImportError("progress=True needs tqdm: pip install tqdm, or 'fm_fast[train]'") from None
    with tqdm(total=total, unit="step") as bar:
        yield bar.update  # type: ignore[misc]
