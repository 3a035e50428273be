"""Many tensors in one launch: a table of their addresses and sizes in device memory, one row a tensor, cut into chunks for programs."""

# Device functions are written in Triton's own language.
# pyright: reportGeneralTypeIssues=false, reportInvalidTypeForm=false

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from fm_fast._modes import is_captured

VALUE, GRADIENT, COPY, OFFSET, COUNT, INDEX = (tl.constexpr(i) for i in range(6))  # columns of the table
COLUMNS = tl.constexpr(6)
TYPES = {torch.float64: tl.float64, torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def pointer_of(row_ptr, COLUMN: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The address in a column of the table, as a pointer."""
    pointer = tl.load(row_ptr + COLUMN).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def chunk_of(chunks_ptr, table_ptr):
    """(row of the table, first element, number of elements) of this program."""
    entry = chunks_ptr + tl.program_id(0) * 2
    row_ptr = table_ptr + tl.load(entry) * COLUMNS
    first = tl.multiple_of(tl.load(entry + 1), 16)  # here, because a hint on the result of a call is lost
    return row_ptr, first, tl.load(row_ptr + COUNT)


@dataclass(frozen=True)
class Kind:
    """What one launch must know at compile time about its tensors; None: they have no gradient, or no copy."""

    gradient: torch.dtype | None
    copy: torch.dtype | None


class Memory(NamedTuple):
    """Where a tensor is and how it lies there."""

    address: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def count(self) -> int:
        return math.prod(self.shape)


class Row(NamedTuple):
    """One tensor of a launch: a row of the table."""

    value: int  # these three are addresses
    gradient: int
    copy: int
    offset: int
    count: int
    index: int  # of the tensor among all


@dataclass(frozen=True, eq=False)
class Batch:
    """The tensors of one launch. Known by itself and not by its rows, which would take long to compare at every step."""

    kind: Kind
    rows: tuple[Row, ...]
    aligned: bool


Memories = tuple[tuple[int, torch.dtype, tuple[int, ...], tuple[int, ...]], ...]
Tables = TypeVar("Tables", bound=tuple[Tensor, ...])
_read_by_graphs: list[tuple[Tensor, ...]] = []  # at every replay, so they are never freed


def memories(tensors: Sequence[Tensor]) -> Memories:
    """The fields of :class:`Memory` of each: what a launch is planned by, and its plan found by at later steps.

    Plain tuples, which take a third of the time; with hundreds of parameters it is the largest part of a step on the host.
    """
    return tuple([(x.data_ptr(), x.dtype, x.shape, x.stride()) for x in tensors])


def tables(batch: Batch, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(table, chunks of ``size`` elements) on the device.

    Made anew only where addresses are new. Raises RuntimeError if they are while a graph is captured.
    """
    return _kept(_made_tables(batch, size, device), device)


def members(rows: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """(row of the settings, whether there is a gradient) of each tensor on the device, on the same terms."""
    return _kept((_made_members(rows, device),), device)[0]


def _kept(made: Tables, device: torch.device) -> Tables:
    """For as long as a graph may read them."""
    if is_captured(device):
        _read_by_graphs.append(made)
    return made


@functools.lru_cache(maxsize=64)
def _made_members(rows: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    _refuse_capture(device)
    # With a wait: unlike the tables, whose addresses belong to one optimiser, these are shared by all of one structure, on any stream.
    return _on_host(rows).to(device)


@functools.lru_cache(maxsize=64)
def _made_tables(batch: Batch, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    _refuse_capture(device)
    chunks = [(i, first) for i, row in enumerate(batch.rows) for first in range(0, row.count, size)]
    return _to_device(batch.rows, device), _to_device(chunks, device)


def _refuse_capture(device: torch.device) -> None:
    """The copy would be repeated at every replay, from memory of the host that is long gone."""
    if is_captured(device):
        raise RuntimeError("gradients: expected memory that an earlier step had, as AdamWEMA.keep_gradients() gives, to capture a graph")


def _on_host(rows: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64, device="cpu")


def _to_device(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    table = _on_host(rows)
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


def by_kind(kinds: Sequence[Kind], rows: Sequence[Row]) -> tuple[Batch, ...]:
    """The rows of each kind; tensors without elements have no say."""
    found: dict[Kind, list[Row]] = {}
    for kind, row in zip(kinds, rows, strict=True):
        if row.count:
            found.setdefault(kind, []).append(row)
    return tuple(Batch(kind, tuple(chosen), _are_aligned(chosen)) for kind, chosen in found.items())


def _are_aligned(rows: Sequence[Row]) -> bool:
    return all(address % 16 == 0 for row in rows for address in row[:4])


def type_of(dtype: torch.dtype | None) -> tl.dtype:
    return TYPES[dtype] if dtype is not None else tl.float32


def check_alike(name: str, x: Memory, p: Memory) -> None:
    if x.shape != p.shape or any(a != b for size, a, b in zip(p.shape, x.strides, p.strides, strict=True) if size != 1):
        raise ValueError(f"{name} must have the shape and strides of its parameter, {tuple(p.shape)} and {p.strides}, got {x.strides}")


def check_gapless(name: str, x: Memory) -> None:
    span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.strides, strict=True))
    if x.count and span != x.count:
        raise ValueError(f"{name} must have memory without gaps, got strides {x.strides} for {tuple(x.shape)}")
