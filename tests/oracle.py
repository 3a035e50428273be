"""An independent NumPy float64 model of the noise contract and of the training loss: what the tests compare every backend with.

It shares no code with fm_fast: Philox in uint64, library logarithm, sine and cosine, and the paper's formulas typed in again.
"""

import math

import numpy as np

M32 = np.uint64(0xFFFFFFFF)
TAGS = {"x0": 0, "t": 1, "probe": 2, "dequantise": 3, "label_drop": 4, "flip": 5, "dropout": 6, "bridge": 9}


def philox(c0, c1, c2, c3, seed):
    c0, c1, c2, c3 = (np.asarray(c, dtype=np.uint64) for c in np.broadcast_arrays(c0, c1, c2, c3))
    k0, k1 = np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32)
    shift = np.uint64(32)
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (p1 >> shift) ^ c1 ^ k0, p1 & M32, (p0 >> shift) ^ c3 ^ k1, p0 & M32
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & M32, (k1 + np.uint64(0xBB67AE85)) & M32
    return np.stack([c0, c1, c2, c3], axis=-1)


def words(shape, seed, step, stream, ids=None, index=0, lanes=4):
    """[B, C, padded P] words for lanes = 4; [B, C, blocks, 4] for sign streams."""
    batch, channels = shape[0], shape[1] if len(shape) > 2 else 1
    positions = int(np.prod(shape[2:] if len(shape) > 2 else shape[1:]))
    blocks = -(-positions // lanes)
    ids = np.arange(batch) if ids is None else np.asarray(ids)
    block = np.arange(channels * blocks)
    w = philox(block[None], ids[:, None], step, TAGS[stream] | index << 8, seed)
    return w.reshape(batch, channels, blocks, 4), positions


def trim(values, positions, shape):
    """The first ``positions`` of each channel's padded numbers, in the given shape."""
    return values.reshape(*values.shape[:2], int(np.prod(values.shape[2:])))[:, :, :positions].reshape(shape)


def uniform32(w):
    return w.astype(np.float32) * np.float32(2.0**-32) + np.float32(2.0**-33)


def uniform(shape, seed, step, stream, ids=None, index=0):
    w, positions = words(shape, seed, step, stream, ids, index)
    return trim(uniform32(w), positions, shape).astype(np.float64)


def normal(shape, seed, step, stream="x0", ids=None, index=0):
    w, positions = words(shape, seed, step, stream, ids, index)
    radius = np.sqrt(-2.0 * np.log(uniform32(w[..., 0::2]).astype(np.float64)))
    angle = 2.0 * np.pi * w[..., 1::2].astype(np.float64) * 2.0**-32
    z = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)
    return trim(z, positions, shape)


def sign(shape, seed, step, stream="probe", ids=None, index=0):
    w, positions = words(shape, seed, step, stream, ids, index, lanes=128)
    bits = (w[..., None] >> np.arange(32, dtype=np.uint64)) & np.uint64(1)
    return trim(1.0 - 2.0 * bits.astype(np.float64), positions, shape)


def schedule(path, t):
    """(a, s, a', s') of the default paths, and of OT with sigma_min = 0.1 under the name "ot-0.1"."""
    one = np.ones_like(t)
    if path.startswith("ot"):
        m = 0.1 if path == "ot-0.1" else 0.0
        return t, 1 - (1 - m) * t, one, -(1 - m) * one
    if path == "vp":
        r = 1 - t
        alpha = np.exp(-0.5 * (0.1 * r + 9.95 * r**2))
        s = np.sqrt(-np.expm1(2 * np.log(alpha)))
        d_alpha = 0.5 * (0.1 + 19.9 * r) * alpha
        return alpha, s, d_alpha, -alpha * d_alpha / s
    if path == "ve":
        s = 0.01 * 5000.0 ** (1 - t)
        return one, s, 0 * one, -np.log(5000.0) * s
    return np.sin(np.pi * t / 2), np.cos(np.pi * t / 2), np.pi / 2 * np.cos(np.pi * t / 2), -np.pi / 2 * np.sin(np.pi * t / 2)


def time_range(path, objective):
    low, high = 0.0, 1.0 - 1e-5 if path == "vp" else 1.0
    if objective == "scoreflow" and (path.startswith("ot") or path == "cosine"):
        low = 1e-5
        high = high if path == "ot-0.1" else 1.0 - 1e-5
    return low, high


def raw_time(sampler, batch, seed, step, ids=None):
    ids = np.arange(batch) if ids is None else np.asarray(ids)
    if sampler == "stratified":
        offset = philox(0, 0, step, TAGS["t"], seed)[0]
        return uniform32((offset + ids.astype(np.uint64) * np.uint64(0x9E3779B9)) & M32).astype(np.float64)
    if sampler == "uniform":
        return uniform((batch, 1), seed, step, "t", ids)[:, 0]
    return 1.0 / (1.0 + np.exp(-normal((batch, 1), seed, step, "t", ids)[:, 0]))


def coefficients(path, objective, t):
    a, s, da, ds = schedule(path, t)
    one, zero = np.ones_like(t), np.zeros_like(t)
    row = {
        "velocity": lambda: (da, ds, one, one),
        "noise": lambda: (zero, one, one, one),
        "score": lambda: (zero, -one, s, one),
        "scoreflow": lambda: (zero, -one, s, 2 * (da / a - ds / s)),
        "data": lambda: (one, zero, one, one),
    }[objective]()
    return np.stack([a, s, *row], axis=1)


def data(x1, seed, step, ids=None, flip=0.0, levels=256, dequantise=False):
    if flip:
        chosen = uniform((x1.shape[0], 1), seed, step, "flip", ids)[:, 0] < flip
        x1 = np.where(chosen.reshape(-1, *[1] * (x1.ndim - 1)), x1[..., ::-1], x1)
    if x1.dtype != np.uint8:
        return x1.astype(np.float64)
    u = uniform(x1.shape, seed, step, "dequantise", ids) if dequantise else 0.5
    return 2.0 * (x1.astype(np.float64) + u) / levels - 1.0


def column(values, like):
    return values.reshape(-1, *[1] * (like.ndim - 1))


def sample(x1, x0, rows):
    return column(rows[:, 0], x1) * x1 + column(rows[:, 1], x1) * x0


def loss(o, x1, x0, rows, weight=None, reduction="mean"):
    """(loss, d loss / d o for grad_output 1)."""
    c1, c0, k, w = (column(rows[:, i], o) for i in range(2, 6))
    w = w if weight is None else w * (column(weight, o) if weight.ndim == 1 else weight)
    error = k * o - (c1 * x1 + c0 * x0)
    count = {"mean": o.size, "sum": 1, "none": o[0].size}[reduction]
    values = w * error**2
    total = values.reshape(o.shape[0], -1).sum(1) / count if reduction == "none" else values.sum() / count
    return total, np.broadcast_to(2 * w * k * error / count, o.shape)


def guided(output, scale):
    """v_u + scale (v_c - v_u) of the conditional and the unconditional half of a doubled batch."""
    conditional, unconditional = np.split(output, 2)
    return unconditional + scale * (conditional - unconditional)


def linear_step(x, outputs, coefficients, guidance=1.0):
    """(a x + sum_j c_j m(k_j), the sum of the magnitudes that were added): the second is what rounding errors are measured in."""
    total, size = coefficients[0] * x, abs(coefficients[0]) * np.abs(x)
    for output, c in zip(outputs, coefficients[1:], strict=True):
        halves = len(output) != len(x)
        total = total + c * (guided(output, guidance) if halves else output)
        parts = np.split(np.abs(output), 2) if halves else [np.abs(output)]
        size = size + abs(c) * (parts[0] if not halves else parts[1] + abs(guidance) * (parts[0] + parts[1]))
    return total, size


def step_error(y, end, outputs, coefficients, rtol, atol):
    """(mean squares of a sample's errors beside the tolerance, how much those grow with the relative error of the errors' terms)."""
    error, size = np.zeros_like(y), np.zeros_like(y)
    for output, c in zip(outputs, coefficients, strict=True):
        error, size = error + c * output, size + abs(c) * np.abs(output)
    tolerated = atol + rtol * np.maximum(np.abs(y), np.abs(end))
    squares, growth = (error / tolerated) ** 2, 2 * np.abs(error) * size / tolerated**2
    return squares.reshape(len(y), -1).mean(1), growth.reshape(len(y), -1).mean(1)


def step_control(numbers, counts, means, stops, nodes, order, evaluations):
    """One sample after the other: (numbers, counts, totals, accepted, times, factors), as the op leaves them if the totals were 0."""
    columns = [_controlled(*column, stops, nodes, order, evaluations) for column in zip(numbers.T, counts.T, means.T, strict=True)]
    widths = (3, 3, 1, len(nodes), 2, 1)
    rows = [np.array([column[i] for column in columns]).reshape(len(columns), width).T for i, width in enumerate(widths)]
    numbers, counts, accepted, times, factors, lost = rows
    return numbers, counts, np.array([(counts[2] == 1).sum(), lost.sum(), accepted.sum()]), accepted[0], times, factors


def _controlled(numbers, counts, means, stops, nodes, order, evaluations):
    (t, length, tried), (stop, spent, status) = (float(x) for x in numbers), (int(n) for n in counts)
    before, accepted, lost = tried, False, False
    if len(means) and status == 1:
        square, left = max((float(m) for m in means), key=lambda m: (math.isnan(m), m)), float(stops[stop]) - t
        factor = 0.2 if not math.isfinite(square) else 10.0 if square == 0.0 else min(10.0, max(0.2, 0.9 * square ** (-0.5 / order)))
        factor = max(factor, 1.0) if square < 1.0 else factor
        cut, accepted, spent = abs(length) >= abs(left), square <= 1.0, spent + evaluations
        if accepted:
            t = float(stops[stop]) if cut else t + tried
        length = length if accepted and cut and abs(length) > abs(tried * factor) else tried * factor
        if accepted and cut:
            stop, status = (stop, 0) if stop == len(stops) - 1 else (stop + 1, 1)
    if status == 1 and t + length == t:
        status, lost = 2, True
    tried = (length if abs(length) < abs(stops[stop] - t) else float(stops[stop]) - t) if status == 1 else 0.0
    times = [min(max(t + c * tried, min(stops[0], stops[-1])), max(stops[0], stops[-1])) for c in nodes]
    return (t, length, tried), (stop, spent, status), accepted, times, (tried, tried / before if before else 0.0), lost


def hadamard_sign(codes, row):
    """(-1)^(number of ones that code and row have in common), one number a code."""
    return np.array([-1.0 if bin(int(code) & int(row) & (2**64 - 1)).count("1") % 2 else 1.0 for code in codes])


def probes(shape, seed, step, first, count, index=0, share=1, codes=(), rows=(), ids=None):
    """Signs of probes first, first + 1, ...: [count, B, ...]."""
    z = np.stack([sign(shape, seed, step, "probe", ids, index + q // share) for q in range(first, first + count)])
    if len(codes):
        z = z * np.stack([hadamard_sign(codes, rows[q]) for q in range(first, first + count)]).reshape(count, 1, *shape[1:])
    return z


def divergence_sums(dots, groups, bias, factor):
    """[2, B]: the mean over probes and the variance of that mean, scaled, from independent groups of consecutive probes; dots [K, B]."""
    means = np.stack([group.mean(0) for group in np.split(dots, groups)])
    variance = means.var(0, ddof=1) / groups if groups > 1 else np.zeros(dots.shape[1])
    return np.stack([bias + factor * means.mean(0), factor**2 * variance])
