"""How tensors become a grid: layouts, tile shapes and the options that every kernel of this package shares."""

import contextlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Protocol

import torch
import triton.language as tl
from torch import Tensor

from fm_fast._philox import INDEX_LIMIT, logical_shape

TILE = 1024  # elements a program holds at once: 8 a thread, two 128-bit float32 accesses or one of 16 bits
SMALLEST_TILE = 128
ELEMENTS_PER_THREAD = 8
WORD_LIMIT = 2**31
REGISTERS = 64  # a thread, of which a multiprocessor then holds half of the most it can
GRID_LIMIT = 2**16 - 1  # of a grid's second and third axis
STREAM_LIMIT = 2**8  # a stream is a byte of the fourth counter word

Strides = tuple[int, int, int]
UNADDRESSED = (0, 0, 1)


def grid_of(programs: int, samples: int) -> tuple[int, int, int]:
    """A grid of programs a sample by samples, which may be more than its second axis holds."""
    across = min(samples, GRID_LIMIT)
    return programs, across, -(-samples // across)


class Geometry(Protocol):
    """What a launch must know, whatever its tiles look like."""

    @property
    def device(self) -> torch.device: ...
    @property
    def grid(self) -> tuple[int, int, int]: ...
    @property
    def warps(self) -> int: ...
    def options(self) -> dict[str, Any]: ...


class StridedGeometry(Geometry, Protocol):
    """The geometry of tensors [B, C, P]; ``strides`` as in :class:`Plan`."""

    @property
    def batch(self) -> int: ...
    @property
    def channels(self) -> int: ...
    @property
    def positions(self) -> int: ...
    @property
    def strides(self) -> tuple[Strides, ...]: ...


@dataclass(frozen=True)
class Plan:
    """The geometry of one launch; ``strides`` are (batch, channel, position) of each tensor, in the kernel's order."""

    batch: int
    channels: int
    positions: int
    strides: tuple[Strides, ...]
    rows: int
    blocks: int
    tiles: int
    flat: bool
    channel_fast: bool
    masked: bool
    wide: bool
    device: torch.device
    probes: int = 1  # batches that one launch runs over

    @property
    def programs(self) -> int:
        """Programs a sample."""
        groups = self.channels * -(-self.positions // 4)
        return max(1, -(-groups // (self.rows * self.blocks * self.tiles)))

    @property
    def grid(self) -> tuple[int, int, int]:
        return grid_of(self.programs, self.probes * self.batch)

    @property
    def warps(self) -> int:
        return max(1, self.rows * self.blocks * 4 // (32 * ELEMENTS_PER_THREAD))

    def options(self) -> dict[str, Any]:
        """The compile-time geometry, by kernel parameter."""
        return {
            "ROWS": self.rows,
            "BLOCKS": self.blocks,
            "TILES": self.tiles,
            "FLAT": self.flat,
            "CHANNEL_FAST": self.channel_fast,
            "MASKED": self.masked,
            "WIDE": self.wide,
        }


def _position_stride(name: str, x: Tensor, first: int) -> int:
    """The one stride that walks through dimensions ``first`` and on."""
    dims = [(size, stride) for size, stride in zip(x.shape[first:], x.stride()[first:], strict=True) if size != 1]
    for (_, outer), (size, inner) in itertools.pairwise(dims):
        if outer != size * inner:
            raise ValueError(f"{name} must have strides that collapse to (batch, channel, position), got {x.stride()} for {tuple(x.shape)}")
    return dims[-1][1] if dims else 1


def strides(name: str, x: Tensor) -> Strides:
    """(batch, channel, position) strides of a tensor [B, ...], as if sizes of one had the stride of a contiguous tensor."""
    _, channels, positions = logical_shape(x.shape)
    position = _position_stride(name, x, 2 if x.dim() > 2 else 1)
    channel = x.stride(1) if channels > 1 else position * positions
    return x.stride(0), channel, position


def _is_flat(channels: int, positions: int, all_strides: Sequence[Strides]) -> bool:
    """Whether every sample is one contiguous row whose counter blocks are those of the channels put end to end."""
    aligned = channels == 1 or positions % 4 == 0
    return aligned and all(position == 1 and channel == positions for _, channel, position in all_strides)


def tiles_of(elements: int) -> int:
    """Tiles a program, by the size of a sample alone, so that a sample's sums do not depend on its batch."""
    return 1 if elements < 2**13 else 2 if elements < 2**16 else 4


def is_wide(channels: int, positions: int, all_strides: Sequence[Strides]) -> bool:
    """Whether an offset inside a sample can pass 2^31."""
    reach = max(channels * abs(channel) + positions * abs(position) for _, channel, position in all_strides)
    return max(reach, channels * (positions + 3)) + 8 * TILE >= WORD_LIMIT


def is_channel_fast(channels: int, strides: Strides) -> bool:
    """Whether neighbours in memory are the channels of one position."""
    return channels > 1 and strides[1] < strides[2]


def power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def plan(like: Tensor, *, by_channel: bool = False, probes: int = 1, **tensors: Tensor) -> Plan:
    """The launch geometry for tensors of ``like``'s shape, in the kernel's order; one without elements is not addressed.

    ``by_channel`` keeps channels apart also where they lie end to end.
    """
    all_strides = [strides(name, x) if x.numel() else None for name, x in tensors.items()]
    batch, channels, positions = logical_shape(like.shape)
    tiles = tiles_of(channels * 4 * -(-positions // 4))
    shape = (batch, channels, positions)
    return _plan(shape, all_strides, _all_half(tensors.values()), by_channel=by_channel, tiles=tiles, probes=probes, device=like.device)


def elementwise_plan(batch: int, shape: Sequence[int], tensors: Mapping[str, Tensor]) -> Plan:
    """The geometry of an op without noise on samples of ``shape``: tensors may hold one or more batches of them.

    Where all lie alike without gaps, they are one long sample, followed by that of the next batch.
    """
    present, half = [x for x in tensors.values() if x.numel()], _all_half(tensors.values())
    device, (_, channels, positions) = present[0].device, logical_shape((batch, *shape))
    if _lie_alike(present):
        count = batch * channels * positions
        flat = [(count, count, 1) if x.numel() else None for x in tensors.values()]
        return _plan((1, 1, count), flat, half, tiles=1, device=device)
    all_strides = [strides(name, x) if x.numel() else None for name, x in tensors.items()]
    return _plan((batch, channels, positions), all_strides, half, tiles=1, device=device)


def sample_plan(like: Tensor, **tensors: Tensor) -> Plan:
    """The geometry of sums over samples without noise, for tensors of ``like``'s shape: samples that lie alike are rows."""
    batch, channels, positions = logical_shape(like.shape)
    if not _lie_alike(list(tensors.values())):
        return plan(like, **tensors)
    count = channels * positions
    row = [(count, count, 1) for _ in tensors]
    return _plan((batch, 1, count), row, _all_half(tensors.values()), tiles=tiles_of(count), device=like.device)


def _lie_alike(tensors: Sequence[Tensor]) -> bool:
    """Whether all tensors are contiguous, or all channels last."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if all(x.is_contiguous() for x in tensors):
        return True
    last = formats.get(tensors[0].dim())
    return last is not None and all(x.is_contiguous(memory_format=last) for x in tensors)


def _all_half(tensors: Iterable[Tensor]) -> bool:
    return all(x.element_size() < 4 for x in tensors if x.numel())


def _plan(
    shape: Strides,
    all_strides: Sequence[Strides | None],
    half: bool,
    *,
    tiles: int,
    device: torch.device,
    by_channel: bool = False,
    probes: int = 1,
) -> Plan:
    batch, channels, positions = shape
    addressed = [triple for triple in all_strides if triple is not None] or [UNADDRESSED]
    flat = not by_channel and _is_flat(channels, positions, addressed)
    channel_fast = not flat and is_channel_fast(channels, addressed[0])
    wide = is_wide(channels, positions, addressed)
    tile = max(SMALLEST_TILE, min(TILE, power_of_two(channels * 4 * -(-positions // 4))))
    if flat:
        channels, positions = 1, channels * positions
    blocks = 2 if flat and half else 1
    return Plan(
        batch=batch,
        channels=channels,
        positions=positions,
        strides=tuple(triple or UNADDRESSED for triple in all_strides),
        rows=tile // (4 * blocks),
        blocks=blocks,
        tiles=tiles,
        flat=flat,
        channel_fast=channel_fast,
        masked=not flat or positions == 0 or positions % (tile * tiles) != 0,
        wide=wide,
        device=device,
        probes=probes,
    )


def compute_dtype(*tensors: Tensor) -> Any:
    """Triton's dtype of the arithmetic: float64 if any tensor that holds something is float64."""
    return tl.float64 if any(x.dtype == torch.float64 for x in tensors if x.numel()) else tl.float32


def register_limit(count: int) -> dict[str, int]:
    """The option that lets a thread have so many registers; of NVIDIA's compiler alone, AMD's refuses the word."""
    return {} if torch.version.hip is not None else {"maxnreg": count}


def early_loads(wide: bool, compute: Any, registers: int = REGISTERS) -> dict[str, int]:
    """The option by which the loads of a tile, ``wide`` ones, stay ahead of its arithmetic.

    The compiler aims at 32 registers: it moves loads behind the drawing of noise, or starts a sum after a few of its terms, and a program
    waits for memory several times. With room for all numbers of a tile it waits once. Float64 and single addresses can need more than that.
    """
    return register_limit(registers) if wide and compute == tl.float32 else {}


def early_terms(plan: Plan, tensors: Iterable[Tensor], inputs: int, registers: Mapping[int, int]) -> dict[str, int]:
    """The same for a sum of ``inputs`` tensors; ``registers`` where so many are read, at most. Of more, enough loads are early anyway.

    A float64 tensor needs more than that, whatever the dtype of the arithmetic, and so do masks.
    """
    count = next((count for most, count in registers.items() if inputs <= most), None)
    return {} if count is None else early_loads(not plan.masked, compute_dtype(*tensors), count)


def check_code(name: str, value: int, codes: type[IntEnum]) -> None:
    """Raise ValueError unless a kernel knows this code."""
    try:
        codes(value)
    except ValueError:
        known = ", ".join(f"{code.value} ({code.name})" for code in codes)
        raise ValueError(f"{name} must be one of {known}, got {value}") from None


def counter_purpose(stream: int, index: int) -> int:
    """The fourth counter word of a stream's numbers of this index; ValueError where it would be another's."""
    for name, value, limit in (("stream", stream, STREAM_LIMIT), ("index", index, INDEX_LIMIT)):
        if not 0 <= value < limit:
            raise ValueError(f"{name} must be at least 0 and below {limit}, got {value}")
    return stream | index << 8


def explicit_ids(key: Tensor, batch: int) -> bool:
    """Whether the key tensor lists an id a sample, and not only the first."""
    return key.numel() == batch + 2 != 3


def data_options(x1: Tensor, x0: Tensor, key: Tensor, flip: float, levels: float, dequantise: bool) -> dict[str, Any]:
    """The compile-time options of how x1 and x0 are read, by kernel parameter."""
    integer = x1.dtype == torch.uint8
    return {
        "EXPLICIT_IDS": explicit_ids(key, x1.shape[0]),
        "DRAW": x0.numel() == 0,
        "LEVELS": float(levels) if integer else 0.0,
        "DEQUANTISE": bool(integer and dequantise),
        "WIDTH": x1.shape[-1] if flip > 0.0 and x1.dim() > 1 else 0,
    }


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device; the interpreter needs none."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def arguments(plan: StridedGeometry, tensors: Sequence[Tensor | None], numbers: Sequence[float]) -> tuple[Any, ...]:
    """A kernel's positional arguments: tensors, the strides of those in the plan, batch, channels, positions, numbers."""
    flattened = (stride for triple in plan.strides for stride in triple)
    return (*tensors, *flattened, plan.batch, plan.channels, plan.positions, *numbers)


def run(kernel: Any, plan: StridedGeometry, tensors: Sequence[Tensor | None], numbers: Sequence[float], **options: Any) -> None:
    """Launch one program per chunk of each sample."""
    start(kernel, plan, arguments(plan, tensors, numbers), **options)


def start(kernel: Any, plan: Geometry, positional: Sequence[Any], **options: Any) -> None:
    """The same with arguments already in the kernel's order."""
    launch(kernel, plan.grid, plan.device, positional, warps=plan.warps, **options, **plan.options())


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, positional: Sequence[Any], *, warps: int, **options: Any) -> None:
    """Every launch of this package. Products are fused with sums, as in C++: from Triton 3.10 on that must be asked for."""
    with on_device(device):
        kernel[grid](*positional, **options, num_warps=warps, num_stages=1, enable_fp_fusion=True)
