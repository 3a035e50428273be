"""Times and loss coefficients of one sample, in float64 scalars, inside Triton kernels.

A sample's row is (a, s, c1, c0, k, w): x_t = a x1 + s x0 (paper equation 11), loss = w ||k o - (c1 x1 + c0 x0)||^2 (equation 14; Table 1
for the objectives). The paths' a and s are those of equations 16 (VE), 18 (VP) and 20 (OT).
"""

# Device functions are written in Triton's own language.
# pyright: reportGeneralTypeIssues=false, reportInvalidTypeForm=false

import triton
import triton.language as tl

from fm_fast._codes import ObjectiveCode, PathCode, TimeCode
from fm_fast.kernels._philox import GOLDEN, TIME_STREAM, first_word, normal_pair, uniform, words

GIVEN_PATH, OT, VP, VE, COSINE = (tl.constexpr(code.value) for code in PathCode)
VELOCITY, NOISE, SCORE, SCOREFLOW, DATA = (tl.constexpr(code.value) for code in ObjectiveCode)
GIVEN_TIME, UNIFORM, STRATIFIED, LOGIT_NORMAL = (tl.constexpr(code.value) for code in TimeCode)
HALF_PI = tl.constexpr(1.5707963267948966)
A, S, C1, C0, K, W = (tl.constexpr(i) for i in range(6))  # columns of a row
COLUMNS = tl.constexpr(6)


@triton.jit
def _raw_time(identity, step, seed, mean, std, T_SAMPLER: tl.constexpr):
    """The sampler's float64 value in (0, 1]."""
    if T_SAMPLER == STRATIFIED:
        offset = first_word(tl.full((), 0, tl.uint32), step, seed, TIME_STREAM)
        return uniform(offset + identity * GOLDEN).to(tl.float64)
    elif T_SAMPLER == LOGIT_NORMAL:
        word_0, word_1, _, _ = words(tl.full((), 0, tl.uint32), identity, step, seed, TIME_STREAM)
        z, _ = normal_pair(word_0, word_1)
        return 1.0 / (1.0 + tl.exp(-(z.to(tl.float64) * std + mean)))
    else:
        return uniform(first_word(identity, step, seed, TIME_STREAM)).to(tl.float64)


@triton.jit
def sample_time(t_ptr, sample, identity, step, seed, mean, std, t_min, t_max, T_SAMPLER: tl.constexpr):
    """The sample's time as the t tensor holds it, widened to float64: given and clamped (NaN stays NaN), or drawn."""
    low, high = tl.full((), t_min, tl.float64), tl.full((), t_max, tl.float64)
    if T_SAMPLER == GIVEN_TIME:
        t = tl.load(t_ptr + sample).to(tl.float64)
        t = tl.where(t < low, low, tl.where(t > high, high, t))
    else:
        t = low + (high - low) * _raw_time(identity, step, seed, mean, std, T_SAMPLER)
    return t.to(t_ptr.dtype.element_ty).to(tl.float64)


@triton.jit
def _one_minus_exp(x):
    """1 - exp(-x) for x >= 0 without cancellation: x (1 - x/2 (1 - x/3 (...))) where x is small."""
    series = 1.0 - x * (1.0 / 16)
    for i in tl.static_range(1, 15):
        series = 1.0 - x * (1.0 / (16 - i)) * series
    return tl.where(x < 0.5, x * series, 1.0 - tl.exp(-x))


@triton.jit
def _alternating_series(square, LAST: tl.constexpr):
    """1 - q/(m (m-1)) (1 - q/((m+2) (m+1)) (...)), ending with m = LAST: the common shape of sine and cosine."""
    result = 1.0 - square * (1.0 / (LAST * (LAST - 1)))
    for i in tl.static_range(1, LAST // 2):
        result = 1.0 - square * result * (1.0 / ((LAST - 2 * i) * (LAST - 2 * i - 1)))
    return result


@triton.jit
def _sin_cos_quarter(t):
    """sin(pi t / 2) and cos(pi t / 2) for t in [0, 1]: series up to an eighth of a turn, swapped beyond."""
    beyond = t > 0.5
    angle = tl.where(beyond, 1.0 - t, t) * HALF_PI
    sine, cosine = angle * _alternating_series(angle * angle, 19), _alternating_series(angle * angle, 18)
    return tl.where(beyond, cosine, sine), tl.where(beyond, sine, cosine)


@triton.jit
def schedule(t, path_a, path_b, PATH: tl.constexpr):
    """(a, s, a', s') of the path at time t. For VE, ``path_b`` is ln(sigma_max / sigma_min)."""
    if PATH == OT:
        return t, 1.0 - (1.0 - path_a) * t, t * 0.0 + 1.0, t * 0.0 - (1.0 - path_a)
    elif PATH == VP:
        s = 1.0 - t
        integral = path_a * s + 0.5 * (path_b - path_a) * s * s
        alpha, sigma = tl.exp(-0.5 * integral), tl.sqrt(_one_minus_exp(integral))
        d_alpha = 0.5 * (path_a + (path_b - path_a) * s) * alpha
        return alpha, sigma, d_alpha, -alpha * d_alpha / sigma
    elif PATH == VE:
        sigma = path_a * tl.exp((1.0 - t) * path_b)
        return t * 0.0 + 1.0, sigma, t * 0.0, -path_b * sigma
    else:
        sine, cosine = _sin_cos_quarter(t)
        return sine, cosine, cosine * HALF_PI, sine * -HALF_PI


@triton.jit
def loss_target(a, s, d_a, d_s, OBJECTIVE: tl.constexpr):
    """(c1, c0, k, w) of the objective on a path with these values."""
    zero = s * 0.0
    if OBJECTIVE == VELOCITY:
        return d_a, d_s, zero + 1.0, zero + 1.0
    elif OBJECTIVE == NOISE:
        return zero, zero + 1.0, zero + 1.0, zero + 1.0
    elif OBJECTIVE == SCORE:
        return zero, zero - 1.0, s, zero + 1.0
    elif OBJECTIVE == SCOREFLOW:
        return zero, zero - 1.0, s, 2.0 * (d_a / a - d_s / s)
    else:
        return zero + 1.0, zero, zero + 1.0, zero + 1.0


@triton.jit
def write_row(coef_ptr, sample, a, s, c1, c0, k, w):
    """Store the sample's row of the [B, 6] coefficients."""
    row = coef_ptr + sample * COLUMNS
    tl.store(row + A, a)
    tl.store(row + S, s)
    tl.store(row + C1, c1)
    tl.store(row + C0, c0)
    tl.store(row + K, k)
    tl.store(row + W, w)
