"""The noise contract: every random number of fm_fast is a pure function of counters, never of generator state.

The specification, which every backend follows:

* **Generator.** Philox4x32-10 with the 64-bit seed (0 <= seed < 2^63) as key and the counter
  (block, sample id, step, stream | index << 8), each a 32-bit word. ``stream`` names the purpose (:class:`Stream`), ``index`` the probe,
  solver stage, draw or layer within it.
* **Order.** Logical, not of storage. A sample is [C, P], C = dimension 1 where there are more than two dimensions, else 1. Element (c, p)
  of a normal, uniform or word stream is lane p % 4 of block c * ceil(P / 4) + p // 4; of a sign stream, bit p % 128 of block
  c * ceil(P / 128) + p // 128, the least significant bit of word 0 first. A set bit is -1.
* **Uniform.** u = float32(w) 2^-32 + 2^-33, in (0, 1].
* **Normal.** Box-Muller on words (0, 1) and (2, 3): r cos, r sin with r = sqrt(max(-2 ln u(w_even), 0)) and the angle w_odd turns of 2^-32,
  by the polynomials of ``_philox.py``, in float32 also where the result is widened to float64. Tails reach 6.7 sigma.
* **Time.** Uniform: word 0 of block 0 of (sample id, step). Stratified: the word of sample id 0 plus id * 0x9E3779B9 modulo 2^32.

Words are identical on every backend, normals agree within a few units in the last place. Because the numbers depend on (seed, step, sample
id) alone, one batch of 64 equals four of 16 and two ranks of 32, a resumed run draws what the uninterrupted one would have, noise
is recomputed instead of stored, and there is no generator state to save.
"""

import array
from collections.abc import Sequence
from typing import TypeGuard

import torch
from torch import Tensor

from fm_fast import _backends, _checks, _modes, _ops
from fm_fast._constants import unit_words
from fm_fast._philox import GOLDEN, INDEX_LIMIT, Kind, Stream

__all__ = ["Kind", "Stream", "make_key", "noise"]

DEFAULT_KIND = {
    Stream.x0: Kind.normal,
    Stream.init: Kind.normal,
    Stream.bridge: Kind.normal,
    Stream.probe: Kind.sign,
    Stream.data_order: Kind.word,
    Stream.probe_rows: Kind.word,
}
STREAMS, KINDS = [stream.name for stream in Stream], [kind.name for kind in Kind]
Whole = int | Tensor
_GROUPS_EXIST = torch.distributed.is_available()
# Each word of a key that torch's generator draws at once is below: a seed, a step, and a first id that leaves room for a batch.
FRESH_WORDS = 2**31


def noise(
    shape: Sequence[int],
    *,
    seed: Whole,
    step: Whole,
    stream: str = "x0",
    index: int = 0,
    sample_ids: Whole | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    kind: str | None = None,
) -> Tensor:
    """Random numbers of the noise contract, shape [B, ...].

    Args:
        shape: [B, ...], the first dimension counts samples.
        seed: whole number in [0, 2^63), or an int64 scalar tensor on the device.
        step: whole number in [0, 2^32), or an int64 scalar tensor on the device.
        stream: purpose of the numbers, a name of :class:`Stream`; ``"x0"`` is the source noise of training and sampling.
        index: draw, stage or layer within the stream, in [0, 2^24).
        sample_ids: None (0..B-1), the first id, or int64 [B].
        device: where to draw; by default torch's default device.
        dtype: float64, float32, bfloat16 or float16; by default torch's default dtype. Words are always int64.
        kind: "normal", "uniform", "sign" or "word"; by default what the stream is used for.

    Raises:
        ValueError, TypeError: for any argument out of range, naming it.

    Naive equivalent: ``torch.randn(shape)`` with a generator seeded by (seed, step), drawn for all ids from 0 up and then indexed.
    """
    _check_noise_arguments(shape, stream, index, dtype, kind)
    chosen = Kind[kind] if kind is not None else DEFAULT_KIND.get(Stream[stream], Kind.uniform)
    place = _indexed(torch.device(device) if device is not None else torch.empty(0).device)
    _checks.whole("seed", seed, _checks.MAX_SEED)
    _checks.whole("step", step, _checks.WORD)
    key = make_key(seed, step, sample_ids, shape[0], place)
    out_dtype = torch.int64 if chosen is Kind.word else dtype or torch.get_default_dtype()
    backend = _backends.resolve("noise", place, None)
    return _ops.noise(key, tuple(shape), chosen, Stream[stream], index, out_dtype, backend)


def _indexed(device: torch.device) -> torch.device:
    """The current device for "cuda", as the devices of tensors are named."""
    return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device


def _check_noise_arguments(shape: Sequence[int], stream: str, index: int, dtype: torch.dtype | None, kind: str | None) -> None:
    _checks.one_of("stream", stream, STREAMS)
    if kind is not None:
        _checks.one_of("kind", kind, KINDS)
    _checks.one_of("dtype", dtype, [None, *_checks.FLOATING])
    if isinstance(index, Tensor):
        raise TypeError("index must be a whole number, got a tensor")
    _checks.whole("index", index, INDEX_LIMIT)
    if not isinstance(shape, (tuple, list)) or not all(_checks.is_whole(size) or isinstance(size, torch.SymInt) for size in shape):
        found = type(shape).__name__ if isinstance(shape, Tensor) else repr(shape)
        raise TypeError(f"shape must be a tuple of whole numbers, got {found}")
    if len(shape) == 0 or any(size < 0 for size in shape):
        raise ValueError(f"shape must be [B, ...] of whole numbers, got {tuple(shape)}")


def make_key(
    seed: Whole | None, step: Whole | None, sample_ids: Whole | None, batch: int, device: torch.device, draws: bool = True
) -> Tensor:
    """The int64 key tensor (seed, step, first id) or (seed, step, id_0, ..., id_B-1) that every op reads, on ``device``.

    It is filled without a copy from the host, so a captured CUDA graph can be given new numbers. Without a seed one is drawn from
    torch's generator, and the process-group rank is folded in, so that ranks seeded alike draw different noise; where none of them is
    given, all three words are drawn at once, which is one small kernel. draws: whether anything will be drawn; if not, torch's generator
    stays as it is.
    """
    if seed is not None:
        _checks.whole("seed", seed, _checks.MAX_SEED)
    if step is not None:
        _checks.whole("step", step, _checks.WORD)
    _checks.sample_ids(sample_ids, batch, device)
    if seed is None and draws:
        if step is None and sample_ids is None:
            return _fresh_key(device)
        seed = fresh_seed(device)
    parts = [0 if part is None else part for part in (seed, step, sample_ids)]
    if device.type == "cpu" and _are_numbers(parts) and not _modes.is_compiling():
        return _host_words(parts)
    units = unit_words(device)
    if units is not None and _are_numbers(parts):
        return _combined(units, parts)
    # Also for compilers: torch.tensor is a chain of selections to inductor, which copies it into every use of a word.
    return torch.cat([_as_vector(part, device, units) for part in parts])


def _are_numbers(parts: Sequence[Whole]) -> TypeGuard[Sequence[int]]:
    return not any([isinstance(part, Tensor) for part in parts])


def _combined(units: Tensor, words: Sequence[int]) -> Tensor:
    """The words, by one small kernel for the seed and one for each other that is not 0."""
    key = units[0] * words[0]
    for unit, word in zip(units[1:], words[1:], strict=True):
        if word != 0:
            key.add_(unit, alpha=word)
    return key


def _host_words(words: Sequence[int]) -> Tensor:
    """An int64 tensor on the CPU; from a buffer where nothing watches, which takes a quarter of torch.tensor's time."""
    if _modes.mode_active():
        return torch.tensor(words, dtype=torch.int64, device="cpu")
    return torch.frombuffer(array.array("q", words), dtype=torch.int64)


def _as_vector(part: Whole, device: torch.device, units: Tensor | None) -> Tensor:
    if isinstance(part, Tensor):
        return part.reshape(-1).to(device)
    if units is not None and part == 0:
        return units[0, 1:2]  # which is there already
    return torch.full((1,), part, dtype=torch.int64, device=device)


def _fresh_key(device: torch.device) -> Tensor:
    """Three words at once. Every rank takes as many from its generator: those that are seeded alike still agree on what they draw next."""
    key, rank = torch.randint(FRESH_WORDS, (3,), dtype=torch.int64, device=device), _rank()
    return torch.cat([key[:1] ^ (rank * GOLDEN), key[1:]]) if rank else key


def fresh_seed(device: torch.device) -> Tensor:
    """A seed from torch's generator, int64 [1], with the process-group rank folded in."""
    seed = torch.randint(_checks.MAX_SEED - 1, (1,), dtype=torch.int64, device=device)
    rank = _rank()
    return seed ^ (rank * GOLDEN) if rank else seed


def _rank() -> int:
    return torch.distributed.get_rank() if _in_a_group() else 0


def world_size() -> int:
    """Of the process group; 1 outside of one."""
    return torch.distributed.get_world_size() if _in_a_group() else 1


def _in_a_group() -> bool:
    return _GROUPS_EXIST and torch.distributed.is_initialized()
