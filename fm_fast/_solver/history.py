"""The latest outputs of a network, which the updates of a solve combine, and a check that none of them has been overwritten."""

import weakref
from collections.abc import Sequence

from torch import Tensor

from fm_fast import _modes


class History:
    """The latest outputs of a solve. A list: torch.compile puts a bounded deque together again with the wrong end (torch 2.13)."""

    def __init__(self, limit: int, x0: Tensor) -> None:
        self.limit = limit
        self._newest_first, self._first_output = list[Tensor](), _FirstOutput()
        self._checks = _modes.has_values(x0) and not _modes.transforms_active()

    def add(self, kept: Tensor, output: Tensor) -> None:
        """What is kept of an output: the output itself, a copy or a velocity."""
        if not self._newest_first:
            self._first_output.watch(output)
        self._newest_first.insert(0, kept)
        del self._newest_first[self.limit :]

    def read(self, lags: Sequence[int]) -> list[Tensor]:
        """What was kept so many evaluations ago; RuntimeError where a later output may have overwritten it."""
        outputs = [self._newest_first[lag] for lag in lags]
        if len(outputs) > 1 and self._checks and _share_memory(outputs):
            self._first_output.require_constant(outputs)
        return outputs


def _share_memory(outputs: Sequence[Tensor]) -> bool:
    # An address of 0 is that of an empty batch.
    return len({output.data_ptr() for output in outputs}) < len(outputs) and outputs[0].data_ptr() != 0


class _FirstOutput:
    """The solve's first output, and the count of writes to it: a constant field may return it, or a view of it, again and again."""

    def __init__(self) -> None:
        self._first: weakref.ref[Tensor] | None = None
        self._count: int | None = None

    def watch(self, first: Tensor) -> None:
        origin = _origin(first)
        self._first, self._count = weakref.ref(origin), None if origin.is_inference() else origin._version

    def require_constant(self, outputs: Sequence[Tensor]) -> None:
        """RuntimeError where one of the outputs, of which some share memory, may have been overwritten by a later one."""
        first = self._unwritten()
        allowed = {output.data_ptr() for output in outputs if first is not None and _origin(output) is first}
        others = [output.data_ptr() for output in outputs if first is None or _origin(output) is not first]
        if len(allowed.union(others)) < len(allowed) + len(others):
            raise RuntimeError(
                "model returned the memory of an earlier output, which this method still needs; return a new tensor, such as a clone of "
                'the output of a model compiled with mode="reduce-overhead"'
            )

    def _unwritten(self) -> Tensor | None:
        """The first output, where it exists and is known to be as it was."""
        first = self._first() if self._first is not None else None
        if first is None or first.device.type != "cpu":  # the writes of a CUDA graph are not counted
            return None
        return first if self._count is not None and self._count == first._version else None


def _origin(x: Tensor) -> Tensor:
    """The tensor that x is a view of, or x itself."""
    return x if x._base is None else x._base
