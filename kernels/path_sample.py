"""fm_fast::path_sample on CUDA: x_t = a x1 + s x0 (paper equation 11, 22 for OT), one read of x1 and one write of x_t.

The noise x0 is drawn at its counters unless given, and so is the time t; t and the row (a, s, c1, c0, k, w) of each sample are written
for the loss by the sample's first program.
"""

# Device functions are written in Triton's own language.
# pyright: reportGeneralTypeIssues=false, reportInvalidTypeForm=false

import math

import triton
import triton.language as tl
from torch import Tensor

from fm_fast._codes import ObjectiveCode, PathCode, TimeCode
from fm_fast.kernels import _launch
from fm_fast.kernels._coefficients import COLUMNS, GIVEN_PATH, A, S, loss_target, sample_time, schedule, write_row
from fm_fast.kernels._philox import read_key
from fm_fast.kernels._tile import data_scale, mirror, offset, place, read, sample_and_chunk, source, write


@triton.jit
def _write_sample(t_ptr, coef_ptr, sample, t, a, s, d_a, d_s, OBJECTIVE: tl.constexpr):
    """Keep t and the row of coefficients for the loss."""
    c1, c0, k, w = loss_target(a, s, d_a, d_s, OBJECTIVE)
    tl.store(t_ptr + sample, t)
    write_row(coef_ptr, sample, a, s, c1, c0, k, w)


@triton.jit(do_not_specialize=["batch"])
def path_sample_kernel(
    x_t_ptr,  # [B, C, P]
    t_ptr,  # [B] float32 or float64
    coef_ptr,  # [B, 6] in t's dtype
    x1_ptr,  # [B, C, P]
    x0_ptr,  # [B, C, P], not read with DRAW
    key_ptr,  # [3] or [2 + B] int64
    x_t_batch,
    x_t_channel,
    x_t_position,
    x1_batch,
    x1_channel,
    x1_position,
    x0_batch,
    x0_channel,
    x0_position,
    batch,
    channels,
    positions,
    path_a: tl.float64,
    path_b: tl.float64,
    t_mean: tl.float64,
    t_std: tl.float64,
    t_min: tl.float64,
    t_max: tl.float64,
    flip,
    PATH: tl.constexpr,
    OBJECTIVE: tl.constexpr,
    T_SAMPLER: tl.constexpr,
    EXPLICIT_IDS: tl.constexpr,
    DRAW: tl.constexpr,
    LEVELS: tl.constexpr,
    DEQUANTISE: tl.constexpr,
    WIDTH: tl.constexpr,
    COMPUTE: tl.constexpr,
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
    if PATH == GIVEN_PATH:
        a, s = tl.load(coef_ptr + sample * COLUMNS + A), tl.load(coef_ptr + sample * COLUMNS + S)
    else:
        t = sample_time(t_ptr, sample, identity, step, seed, t_mean, t_std, t_min, t_max, T_SAMPLER)
        a, s, d_a, d_s = schedule(t, path_a, path_b, PATH)
    x1_factor, x0_factor = a.to(COMPUTE), s.to(COMPUTE)
    for i in range(TILES):
        block, channel, position, inside = place(chunk * TILES + i, channels, positions, ROWS, BLOCKS, FLAT, CHANNEL_FAST, WIDE)
        x1_place = offset(channel, mirror(position, identity, step, seed, flip, WIDTH), x1_channel, x1_position, FLAT)
        x1 = read(x1_ptr + sample * x1_batch + x1_place, inside, MASKED)
        x1 = data_scale(x1, block, identity, step, seed, LEVELS, DEQUANTISE, BLOCKS, COMPUTE)
        x0_place = sample * x0_batch + offset(channel, position, x0_channel, x0_position, FLAT)
        x0 = source(x0_ptr, x0_place, block, inside, identity, step, seed, DRAW, MASKED, BLOCKS, COMPUTE)
        x_t_place = sample * x_t_batch + offset(channel, position, x_t_channel, x_t_position, FLAT)
        write(x_t_ptr + x_t_place, x1_factor * x1 + x0_factor * x0, inside, MASKED)
    # Behind the tiles, whose loads no store may hold up.
    if PATH != GIVEN_PATH:  # noqa: SIM102 (not by "and": on a given path there is no t)
        if chunk == 0:
            _write_sample(t_ptr, coef_ptr, sample, t, a, s, d_a, d_s, OBJECTIVE)


def _check_codes(path: int, objective: int, t_sampler: int) -> None:
    _launch.check_code("path", path, PathCode)
    if path != PathCode.given:  # else the coefficients are there, and their objective is known to the caller alone
        _launch.check_code("objective", objective, ObjectiveCode)
    _launch.check_code("t_sampler", t_sampler, TimeCode)


def _path_numbers(path: int, path_a: float, path_b: float) -> tuple[float, float]:
    """The path's parameters as ``schedule`` wants them: the ratio of a VE path by its logarithm."""
    return (path_a, math.log(path_b / path_a)) if path == PathCode.ve else (path_a, path_b)


def launch(
    x_t: Tensor,
    t: Tensor,
    coef: Tensor,
    x1: Tensor,
    x0: Tensor,
    key: Tensor,
    path: int,
    path_a: float,
    path_b: float,
    objective: int,
    t_sampler: int,
    t_mean: float,
    t_std: float,
    t_min: float,
    t_max: float,
    flip: float,
    levels: float,
    dequantise: bool,
) -> None:
    """Run ``fm_fast::path_sample``: fill x_t, and t and coef unless ``path`` is -1."""
    _check_codes(path, objective, t_sampler)
    if x1.shape[0] == 0:
        return
    plan, compute = _launch.plan(x_t, x_t=x_t, x1=x1, x0=x0), _launch.compute_dtype(coef)
    _launch.run(
        path_sample_kernel,
        plan,
        (x_t, t, coef, x1, x0, key),
        (*_path_numbers(path, path_a, path_b), t_mean, t_std, t_min, t_max, flip),
        PATH=path,
        OBJECTIVE=objective,
        T_SAMPLER=t_sampler,
        COMPUTE=compute,
        **_launch.early_loads(plan.flat, compute),
        **_launch.data_options(x1, x0, key, flip, levels, dequantise),
    )
