"""fm_fast::probe on CUDA: the sign vectors of a divergence estimate, random (Rademacher) or structured (Hadamard, coloured)."""

# Device functions are written in Triton's own language.
# pyright: reportGeneralTypeIssues=false, reportInvalidTypeForm=false

import triton
import triton.language as tl
from torch import Tensor

from fm_fast.kernels import _launch
from fm_fast.kernels._philox import read_key
from fm_fast.kernels._probes import check_numbers, parities, place_signs, probe_purpose, sign_bits, sign_plan, sign_words
from fm_fast.kernels._tile import sample_and_chunk, write

ONE_BITS = tl.constexpr(0x3F800000)


@triton.jit(do_not_specialize=["batch", "probes", "index", "first"])
def probe_kernel(
    out_ptr,  # [probes, B, C, P]
    key_ptr,  # [3] or [2 + B] int64
    parity_ptr,  # none, or [probes, C, ceil(P / 128), 4] int32
    out_batch,
    out_channel,
    out_position,
    batch,
    channels,
    positions,
    out_probe,
    probes,
    index,
    first,
    share,
    STRUCTURED: tl.constexpr,
    EXPLICIT_IDS: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    TILES: tl.constexpr,
    CHANNEL_FAST: tl.constexpr,
    MASKED: tl.constexpr,
    WIDE: tl.constexpr,
):
    entry, chunk = sample_and_chunk()
    if entry >= probes * batch:
        return
    probe, sample = entry // batch, (entry % batch).to(tl.int64)
    seed, step, identity = read_key(key_ptr, sample, EXPLICIT_IDS)
    purpose = probe_purpose(index, first, share, probe)
    probe = probe.to(tl.int64)
    if STRUCTURED:
        parity_ptr += probe * (channels * ((positions + 127) // 128) * 4)
    out_ptr += probe * out_probe + sample * out_batch
    for i in range(TILES):
        block, channel, start, inside = place_signs(chunk * TILES + i, channels, positions, ROWS, CHANNEL_FAST, WIDE)
        a, b, c, d = sign_words(parity_ptr, block, inside, identity, step, seed, purpose, STRUCTURED)
        for j in tl.static_range(0, 128, LANES):
            position = start + j + tl.arange(0, LANES)[None, :]
            value = (sign_bits(a, b, c, d, j, LANES) | ONE_BITS).to(tl.float32, bitcast=True)
            write(out_ptr + channel * out_channel + position * out_position, value, inside & (position < positions), MASKED)


def launch(out: Tensor, key: Tensor, codes: Tensor, rows: Tensor, index: int, first: int, share: int) -> None:
    """Run ``fm_fast::probe``: fill out [K, B, ...] with probes first, first + 1, ..."""
    if out.numel() == 0:
        return
    check_numbers(out, codes, rows, index, first, share)
    plan = sign_plan("out", out)
    _launch.run(
        probe_kernel,
        plan,
        (out, key, parities(plan, codes, rows, first)),
        (out.stride(0), plan.probes, index, first, share),
        STRUCTURED=codes.numel() > 0,
        EXPLICIT_IDS=_launch.explicit_ids(key, plan.batch),
    )
