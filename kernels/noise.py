"""fm_fast::noise on CUDA: normals, uniforms, signs or words of the noise contract (``fm_fast.random``), in one write of the output."""

# Device functions are written in Triton's own language.
# pyright: reportGeneralTypeIssues=false, reportInvalidTypeForm=false

import triton
import triton.language as tl
from torch import Tensor

from fm_fast._philox import Kind
from fm_fast.kernels import _launch
from fm_fast.kernels._philox import SIGN, numbers, read_key, signs
from fm_fast.kernels._tile import offset, place, sample_and_chunk, write


@triton.jit(do_not_specialize=["batch", "purpose"])
def noise_kernel(
    out_ptr,  # [B, C, P]
    key_ptr,  # [3] or [2 + B] int64
    out_batch,
    out_channel,
    out_position,
    batch,
    channels,
    positions,
    purpose,  # stream | index << 8
    KIND: tl.constexpr,
    EXPLICIT_IDS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    TILES: tl.constexpr,
    FLAT: tl.constexpr,
    CHANNEL_FAST: tl.constexpr,
    MASKED: tl.constexpr,
    WIDE: tl.constexpr,
):
    sample, chunk = sample_and_chunk()
    if sample >= batch:
        return
    sample = sample.to(tl.int64)
    seed, step, identity = read_key(key_ptr, sample, EXPLICIT_IDS)
    for i in range(TILES):
        block, channel, position, inside = place(chunk * TILES + i, channels, positions, ROWS, BLOCKS, FLAT, CHANNEL_FAST, WIDE)
        if KIND == SIGN:
            value = signs(channel, position, positions, identity, step, seed, purpose)
        else:
            value = numbers(block, identity, step, seed, purpose, KIND, BLOCKS)
        write(out_ptr + sample * out_batch + offset(channel, position, out_channel, out_position, FLAT), value, inside, MASKED)


def launch(out: Tensor, key: Tensor, kind: int, stream: int, index: int) -> None:
    """Run ``fm_fast::noise``: fill out [B, ...] with numbers of the kind; words need int64."""
    _launch.check_code("kind", kind, Kind)
    purpose = _launch.counter_purpose(stream, index)
    if out.numel() == 0:
        return
    plan = _launch.plan(out, by_channel=kind == Kind.sign, out=out)
    _launch.run(noise_kernel, plan, (out, key), (purpose,), KIND=kind, EXPLICIT_IDS=_launch.explicit_ids(key, out.shape[0]))
