// dW[o, c, i, j] = sum_{b, h, w} dy[b, o, h, w] x[b, c, h + i - r, w + j - r], db[o] = sum_{b, h, w} dy[b, o, h, w]: the gradients of the
// parameters of a convolution of size 1 or 3 = 2 r + 1 that keeps the height and width, of tensors in channels_last, in float32.
//
// Size 1 is a matrix product over the positions. Size 3 is the transpose of Winograd's algorithm (winograd.h),
// G' [sum_t (A dy A') (B' d B)] G with sums over the tiles: 36 matrix products over a sixteenth of the positions. Along each dimension
//
//   A dy: y0, (y0 + y2 / 2) +- p (y1 + y3 / 2), (y0 + 2 y2) +- q (y1 + 2 y3), y3
//   G' u: u0 - 2/3 (u1 + u2) + 1/6 (u3 + u4), -2/3 p (u1 - u2) + 1/6 q (u3 - u4), -1/3 (u1 + u2) + 1/3 (u3 + u4) + u5
#include <string.h>

#include "products.h"
#include "scratch.h"
#include "winograd.h"

namespace fm {
namespace FM_ISA {
namespace {

constexpr int64_t kPositions = 64;  // of size 1, at a time: they fit the L1 cache

// The channels of positions or tiles, which lie `stride` apart.
struct Points {
  const float* data;
  int64_t stride;
};

// What a unit sums: some channels of x with some of dy, over some positions or tiles.
struct Unit {
  Range inputs, outputs;
  int64_t begin, end;
  float *sums, *bias;  // of its first channels; the bias is summed with the first inputs, and else nullptr
};

// Adds x' dy of some points to sums [C, O].
FM_INLINE void add_products(const ConvArgs& args, const Unit& unit, const Points& x, const Points& dy, int64_t count, float* sums) {
  multiply<true>(Left<float>{x.data, 1, x.stride}, Right<float>{dy.data, dy.stride}, count, unit.inputs.count, unit.outputs.count,
                 Result{sums, args.outputs});
}

// --- positions -----------------------------------------------------------------------------------------------------------------------

FM_INLINE void add_bias(const Points& dy, int64_t count, int64_t outputs, float* sums) {
  for (int64_t o = 0; o < outputs; o += kWidth<float>) {
    Floats sum{};
    for (int64_t p = 0; p < count; ++p) sum += load_whole(dy.data + p * dy.stride + o);
    store_whole(sums + o, load_whole(sums + o) + sum);
  }
}

FM_INLINE void add_positions(const ConvArgs& args, const Unit& unit) {
  for (int64_t p = unit.begin; p < unit.end; p += kPositions) {
    int64_t count = lesser(kPositions, unit.end - p);
    Points x = {static_cast<const float*>(args.x) + p * args.inputs + unit.inputs.first, args.inputs};
    Points dy = {static_cast<const float*>(args.grad_y) + p * args.row + unit.outputs.first, args.row};
    add_products(args, unit, x, dy, count, unit.sums);
    if (unit.bias) add_bias(dy, count, unit.outputs.count, unit.bias);
  }
}

// --- tiles ---------------------------------------------------------------------------------------------------------------------------

FM_INLINE void spread_line(const Floats y[kTileSide], Floats d[kReach]) {
  Floats near_even = fused(y[2], all(0.5f), y[0]), near_odd = fused(y[3], all(0.5f), y[1]);
  Floats far_even = fused(y[2], all(2.0f), y[0]), far_odd = fused(y[3], all(2.0f), y[1]);
  d[0] = y[0], d[5] = y[3];
  d[1] = fused(near_odd, all(kNearPoint), near_even), d[2] = fused(near_odd, all(-kNearPoint), near_even);
  d[3] = fused(far_odd, all(kFarPoint), far_even), d[4] = fused(far_odd, all(-kFarPoint), far_even);
}

// A dy A' of one vector of outputs; the products lie `stride` apart. Returns the sum of dy.
template <class S>
FM_INLINE Floats transform_gradient(const S* const from[kTileSide][kTileSide], int64_t output, float* to, int64_t stride) {
  Floats rows[kTileSide][kReach], sum{};
#pragma GCC unroll 4
  for (int64_t i = 0; i < kTileSide; ++i) {
    Floats y[kTileSide];
#pragma GCC unroll 4
    for (int64_t j = 0; j < kTileSide; ++j) y[j] = load_whole(from[i][j] + output);
    sum += (y[0] + y[1]) + (y[2] + y[3]);
    spread_line(y, rows[i]);
  }
#pragma GCC unroll 6
  for (int64_t j = 0; j < kReach; ++j) {
    Floats y[kTileSide] = {rows[0][j], rows[1][j], rows[2][j], rows[3][j]}, d[kReach];
    spread_line(y, d);
#pragma GCC unroll 6
    for (int64_t i = 0; i < kReach; ++i) store_whole(to + (i * kReach + j) * stride, d[i]);
  }
  return sum;
}

// The transformed gradients of some tiles, [36, tiles, outputs of the unit]; adds the gradients to those of the bias.
template <class S>
FM_INLINE void transform_gradients(const Images<S>& dy, const Unit& unit, int64_t first, int64_t count, const S* zeros, float* to,
                                   int64_t stride) {
  for (int64_t t = 0; t < count; ++t) {
    const S* from[kTileSide][kTileSide];
    channels_of_square<kTileSide>(dy, corner_of(dy, first + t), 0, zeros, from);
    for (int64_t o = 0; o < unit.outputs.count; o += kWidth<float>) {
      Floats sum = transform_gradient(from, unit.outputs.first + o, to + t * unit.outputs.count + o, stride);
      if (unit.bias) store_whole(unit.bias + o, load_whole(unit.bias + o) + sum);
    }
  }
}

// The transformed inputs and gradients of some tiles, and zeros that stand for what is beyond the border.
template <class S>
struct GradientBuffers {
  float *inputs, *gradients;
  int64_t input_stride, gradient_stride;
  const S* zeros;
};

template <class S>
FM_INLINE void add_tiles(const ConvArgs& args, const Unit& unit, const GradientBuffers<S>& buffers) {
  Images<S> x = {static_cast<const S*>(args.x), args.height, args.width, args.inputs};
  Images<S> dy = {static_cast<const S*>(args.grad_y), args.height, args.width, args.row};
  for (int64_t first = unit.begin, count; first < unit.end; first += count) {
    count = lesser(args.unit_tiles, unit.end - first);
    transform_inputs(x, unit.inputs, first, count, buffers.zeros, buffers.inputs, buffers.input_stride);
    transform_gradients(dy, unit, first, count, buffers.zeros, buffers.gradients, buffers.gradient_stride);
    for (int64_t product = 0; product < kTileProducts; ++product) {
      prefetch_tiles(x, unit.inputs, first + count, lesser(first + 2 * count, unit.end), product);
      prefetch_tiles(dy, unit.outputs, first + count, lesser(first + 2 * count, unit.end), product);
      add_products(args, unit, Points{buffers.inputs + product * buffers.input_stride, unit.inputs.count},
                   Points{buffers.gradients + product * buffers.gradient_stride, unit.outputs.count}, count,
                   unit.sums + product * args.inputs * args.outputs);
    }
  }
}

// --- units ---------------------------------------------------------------------------------------------------------------------------

// The n-th unit, where a sample has so many positions or tiles; its sums are set to zero.
FM_INLINE Unit start_unit(const ConvArgs& args, int64_t n, int64_t points) {
  int64_t across = divide_up(args.outputs, args.unit_outputs), down = conv_input_ranges(args);
  int64_t part = n / (across * down), o = n % across * args.unit_outputs, c = n / across % down * args.unit_inputs;
  int64_t sample = part * args.samples_per_part, last = lesser(sample + args.samples_per_part, args.batch);
  float *sums = args.partial + part * conv_sums(args), *bias = sums + conv_products(args) * args.inputs * args.outputs;
  Range inputs = {c, lesser(args.unit_inputs, args.inputs - c)}, outputs = {o, lesser(args.unit_outputs, args.outputs - o)};
  Unit unit = {inputs, outputs, sample * points, last * points, sums + c * args.outputs + o, c == 0 ? bias + o : nullptr};
  size_t row = static_cast<size_t>(outputs.count) * sizeof(float);
  for (int64_t k = 0; k < conv_products(args); ++k)
    for (int64_t i = 0; i < inputs.count; ++i) memset(unit.sums + (k * args.inputs + i) * args.outputs, 0, row);
  if (unit.bias) memset(unit.bias, 0, row);
  return unit;
}

void add_pointwise(const ConvArgs& args, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) add_positions(args, start_unit(args, n, args.height * args.width));
}

template <class S>
void add_tilewise(const ConvArgs& args, int64_t begin, int64_t end) {
  int64_t inputs = lesser(args.unit_inputs, args.inputs), outputs = lesser(args.unit_outputs, args.outputs);
  int64_t input_stride = product_stride(args.unit_tiles, inputs), gradient_stride = product_stride(args.unit_tiles, outputs);
  int64_t channels = greater(args.inputs, args.outputs);
  Scratch<float, 16> memory(kTileProducts * (input_stride + gradient_stride) + channels + 16);
  float *x = on_a_line(memory.data()), *dy = x + kTileProducts * input_stride;
  S* zeros = reinterpret_cast<S*>(dy + kTileProducts * gradient_stride);
  memset(zeros, 0, static_cast<size_t>(channels) * sizeof(S));
  GradientBuffers<S> buffers = {x, dy, input_stride, gradient_stride, zeros};
  for (int64_t n = begin; n < end; ++n) add_tiles(args, start_unit(args, n, tiles_of(1, args.height, args.width)), buffers);
}

// --- gradients -----------------------------------------------------------------------------------------------------------------------

// G' u along one dimension.
FM_INLINE void transform_line_of_sums(const Floats u[kReach], Floats taps[3]) {
  Floats near_sum = -2.0f / 3.0f * (u[1] + u[2]), far_sum = 1.0f / 6.0f * (u[3] + u[4]);
  taps[0] = u[0] + near_sum + far_sum;
  taps[1] = fused(u[3] - u[4], all(kFarPoint / 6.0f), -2.0f / 3.0f * kNearPoint * (u[1] - u[2]));
  taps[2] = fused(near_sum, all(0.5f), fused(far_sum, all(2.0f), u[5]));
}

// The sum of all parts at one place of the first.
FM_INLINE Floats over_parts(const ConvArgs& args, const float* from) {
  Floats sum{};
  for (int64_t part = 0; part < args.parts; ++part) sum += load_whole(from + part * conv_sums(args));
  return sum;
}

// G' u G of one input channel and a vector of outputs; the products lie `stride` apart.
FM_INLINE void transform_sums(const ConvArgs& args, const float* from, Floats taps[3][3]) {
  int64_t stride = args.inputs * args.outputs;
  Floats rows[3][kReach];
  for (int64_t j = 0; j < kReach; ++j) {
    Floats u[kReach], column[3];
    for (int64_t i = 0; i < kReach; ++i) u[i] = over_parts(args, from + (i * kReach + j) * stride);
    transform_line_of_sums(u, column);
    for (int64_t i = 0; i < 3; ++i) rows[i][j] = column[i];
  }
  for (int64_t i = 0; i < 3; ++i) transform_line_of_sums(rows[i], taps[i]);
}

// Gradients of some input channels and a vector of outputs, [taps, outputs, channels], which are stored together: a line of memory may hold
// either.
using Taps = float[9][kWidth<float>][kGradientChannels];

FM_INLINE void collect_taps(const ConvArgs& args, int64_t channel, int64_t count, int64_t output, Taps& taps) {
  for (int64_t c = 0; c < count; ++c) {
    const float* from = args.partial + (channel + c) * args.outputs + output;
    Floats values[3][3];
    if (args.size == 1)
      values[0][0] = over_parts(args, from);
    else
      transform_sums(args, from, values);
    for (int64_t k = 0; k < args.size * args.size; ++k)
      for (int64_t o = 0; o < kWidth<float>; ++o) taps[k][o][c] = values[k / 3][k % 3][o];
  }
}

template <class S>
FM_INLINE void store_channels(const ConvArgs& args, int64_t channel) {
  int64_t count = lesser(kGradientChannels, args.inputs - channel);
  Taps taps;
  for (int64_t output = 0; output < args.outputs; output += kWidth<float>) {
    collect_taps(args, channel, count, output, taps);
    for (int64_t o = 0; o < kWidth<float>; ++o)
      for (int64_t k = 0; k < args.size * args.size; ++k) {
        S* to = static_cast<S*>(args.grad_weight) + (output + o) * args.output_stride + channel * args.input_stride +
                k / args.size * args.tap_stride[0] + k % args.size * args.tap_stride[1];
        for (int64_t c = 0; c < count; ++c) store_as(taps[k][o][c], to + c * args.input_stride);
      }
  }
}

template <class S>
FM_INLINE void store_bias(const ConvArgs& args) {
  const float* from = args.partial + conv_products(args) * args.inputs * args.outputs;
  for (int64_t output = 0; output < args.outputs; output += kWidth<float>) {
    Floats sums = over_parts(args, from + output);
    for (int64_t o = 0; o < kWidth<float>; ++o) store_as(sums[o], static_cast<S*>(args.grad_bias) + (output + o) * args.bias_stride);
  }
}

template <class S>
void store_gradients(const ConvArgs& args, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; ++unit) store_channels<S>(args, unit * kGradientChannels);
  if (begin == 0 && args.grad_bias) store_bias<S>(args);
}

}  // namespace

// A unit is a Unit: its sums are over one part of the batch, in the order of the positions or tiles.
void conv_weight_grad_units(const ConvArgs& args, int64_t begin, int64_t end) {
  if (args.size == 1) return add_pointwise(args, begin, end);
  switch (args.dtype) {
    case Dtype::bfloat16:
      return add_tilewise<Bfloat16>(args, begin, end);
    case Dtype::float16:
      return add_tilewise<Float16>(args, begin, end);
    default:
      return add_tilewise<float>(args, begin, end);
  }
}

// A unit is some input channels, the first one the bias too: the parts of the batch in order.
void conv_weight_grad_sums(const ConvArgs& args, int64_t begin, int64_t end) {
  switch (args.dtype) {
    case Dtype::bfloat16:
      return store_gradients<Bfloat16>(args, begin, end);
    case Dtype::float16:
      return store_gradients<Float16>(args, begin, end);
    default:
      return store_gradients<float>(args, begin, end);
  }
}

}  // namespace FM_ISA
}  // namespace fm
