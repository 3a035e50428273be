// y[b, o, h, w] = bias[o] + sum_{c, i, j} W[o, c, i, j] x[b, c, h + i - 1, w + j - 1] of tensors in channels_last, by Winograd's algorithm
// (winograd.h) in float32. The sums over c are 36 matrix products of a block of tiles with the transformed weights.
#include <string.h>

#include "products.h"
#include "scratch.h"
#include "winograd.h"

namespace fm {
namespace FM_ISA {
namespace {

// The transformed inputs [36, tiles, C] and the products [36, tiles, O] of a block of tiles, and how far apart the 36 of each lie.
struct TileBuffers {
  float *inputs, *products;
  int64_t input_stride, product_stride;
};

template <class S>
FM_INLINE Images<S> images_of(const Conv3x3Args& args) {
  return Images<S>{static_cast<const S*>(args.x), args.height, args.width, args.inputs};
}

// Outputs whose transformed weights lie together, [C, width]: what a tile of sums reads follows each other in memory.
constexpr int64_t kPanel = kMostVectors * kWidth<float> > kConvOutputs ? kMostVectors * kWidth<float> : kConvOutputs;

struct Panel {
  int64_t first, width;
};

FM_INLINE Panel panel_of(const Conv3x3Args& args, int64_t output) {
  int64_t first = output / kPanel * kPanel;
  return Panel{first, lesser(kPanel, args.outputs - first)};
}

// --- weights -------------------------------------------------------------------------------------------------------------------------

// Input channels whose weights are transformed together: a line of memory holds so many.
constexpr int64_t kChannelGroup = kConvOutputs;
constexpr int64_t kTaps = 9 * kConvOutputs;  // of an input channel and a block of outputs: [3, 3, kConvOutputs]

// The taps of some input channels and a block of outputs, [kChannelGroup, 3, 3, kConvOutputs]; every line of memory is read once.
template <class S>
FM_INLINE void gather_taps(const Conv3x3Args& args, int64_t block, int64_t channel, float* taps) {
  const S* first = static_cast<const S*>(args.weight) + block * kConvOutputs * args.output_stride + channel * args.input_stride;
  for (int64_t i = 0; i < 3; ++i)
    for (int64_t j = 0; j < 3; ++j) {
      const S* from = first + i * args.tap_stride[0] + j * args.tap_stride[1];
      float* to = taps + (i * 3 + j) * kConvOutputs;
      if (args.output_stride == 1) {
        for (int64_t c = 0; c < kChannelGroup; ++c)
          for (int64_t o = 0; o < kConvOutputs; o += kWidth<float>)
            store_whole(to + c * kTaps + o, load_whole(from + c * args.input_stride + o));
        continue;
      }
      for (int64_t o = 0; o < kConvOutputs; ++o)
        for (int64_t c = 0; c < kChannelGroup; ++c)
          to[c * kTaps + o] = load_as<float>(from[o * args.output_stride + c * args.input_stride]);
    }
}

FM_INLINE void transform_taps(const Floats g[3], Floats u[kReach]) {
  Floats near_even = fused(g[2], all(0.5f), g[0]), near_odd = kNearPoint * g[1];
  Floats far_even = fused(g[2], all(2.0f), g[0]), far_odd = kFarPoint * g[1];
  u[0] = g[0], u[5] = g[2];
  u[1] = -2.0f / 3.0f * (near_even + near_odd), u[2] = -2.0f / 3.0f * (near_even - near_odd);
  u[3] = 1.0f / 6.0f * (far_even + far_odd), u[4] = 1.0f / 6.0f * (far_even - far_odd);
}

// G g G' of one vector of outputs; the products lie `stride` apart.
FM_INLINE void transform_weight(const float* taps, float* to, int64_t stride) {
  Floats columns[3][kReach];
#pragma GCC unroll 3
  for (int64_t j = 0; j < 3; ++j) {
    Floats g[3];
#pragma GCC unroll 3
    for (int64_t i = 0; i < 3; ++i) g[i] = load_whole(taps + (i * 3 + j) * kConvOutputs);
    transform_taps(g, columns[j]);
  }
#pragma GCC unroll 6
  for (int64_t i = 0; i < kReach; ++i) {
    Floats g[3] = {columns[0][i], columns[1][i], columns[2][i]}, u[kReach];
    transform_taps(g, u);
#pragma GCC unroll 6
    for (int64_t j = 0; j < kReach; ++j) store_whole(to + (i * kReach + j) * stride, u[j]);
  }
}

// --- products ------------------------------------------------------------------------------------------------------------------------

// Each of the 36 products: of all tiles with all outputs. Meanwhile the tiles from `next` on are fetched.
template <class S>
FM_INLINE void multiply_all(const Conv3x3Args& args, int64_t next, int64_t count, const TileBuffers& buffers) {
  int64_t end = lesser(next + args.unit_tiles, tiles_of(args.batch, args.height, args.width));
  for (int64_t product = 0; product < kTileProducts; ++product) {
    prefetch_tiles(images_of<S>(args), Range{0, args.inputs}, next, end, product);
    const float* weights = args.transformed + product * args.inputs * args.outputs;
    Left<float> tiles = {buffers.inputs + product * buffers.input_stride, args.inputs, 1};
    for (int64_t output = 0; output < args.outputs; output += kPanel) {
      Panel panel = panel_of(args, output);
      multiply<false>(tiles, Right<float>{weights + panel.first * args.inputs, panel.width}, args.inputs, count, panel.width,
                      Result{buffers.products + product * buffers.product_stride + panel.first, args.outputs});
    }
  }
}

// --- results -------------------------------------------------------------------------------------------------------------------------

FM_INLINE void transform_products(const Floats m[kReach], Floats y[kTileSide]) {
  Floats near_sum = m[1] + m[2], near_difference = m[1] - m[2], far_sum = m[3] + m[4], far_difference = m[3] - m[4];
  y[0] = m[0] + near_sum + far_sum;
  y[1] = fused(far_difference, all(kFarPoint), kNearPoint * near_difference);
  y[2] = fused(far_sum, all(2.0f), 0.5f * near_sum);
  y[3] = fused(far_difference, all(2.0f * kFarPoint), fused(near_difference, all(0.5f * kNearPoint), m[5]));
}

// A' m A of one vector of outputs; the products lie `stride` apart.
FM_INLINE void transform_result(const float* from, int64_t stride, Floats y[kTileSide][kTileSide]) {
  Floats rows[kTileSide][kReach];
#pragma GCC unroll 6
  for (int64_t j = 0; j < kReach; ++j) {
    Floats m[kReach], column[kTileSide];
#pragma GCC unroll 6
    for (int64_t i = 0; i < kReach; ++i) m[i] = load_whole(from + (i * kReach + j) * stride);
    transform_products(m, column);
#pragma GCC unroll 4
    for (int64_t i = 0; i < kTileSide; ++i) rows[i][j] = column[i];
  }
#pragma GCC unroll 4
  for (int64_t i = 0; i < kTileSide; ++i) transform_products(rows[i], y[i]);
}

template <class S>
FM_INLINE void store_results(const Conv3x3Args& args, int64_t first, int64_t count, const float* bias, const TileBuffers& buffers) {
  for (int64_t t = 0; t < count; ++t) {
    Corner corner = corner_of(images_of<S>(args), first + t);
    S* to = static_cast<S*>(args.y) + ((corner.sample * args.height + corner.row) * args.width + corner.column) * args.row;
    int64_t rows = lesser(kTileSide, args.height - corner.row), columns = lesser(kTileSide, args.width - corner.column);
    for (int64_t o = 0; o < args.outputs; o += kWidth<float>) {
      Floats y[kTileSide][kTileSide], offset = load_whole(bias + o);
      transform_result(buffers.products + t * args.outputs + o, buffers.product_stride, y);
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; ++j) store_whole(to + (i * args.width + j) * args.row + o, y[i][j] + offset);
    }
  }
}

template <class S>
void transform_weights(const Conv3x3Args& args, int64_t begin, int64_t end) {
  int64_t groups = args.inputs / kChannelGroup, stride = args.inputs * args.outputs;
  float taps[kChannelGroup * kTaps];
  for (int64_t unit = begin; unit < end; ++unit) {
    int64_t block = unit / groups, channel = unit % groups * kChannelGroup;
    gather_taps<S>(args, block, channel, taps);
    Panel panel = panel_of(args, block * kConvOutputs);
    float* to = args.transformed + panel.first * args.inputs + channel * panel.width + block * kConvOutputs - panel.first;
    for (int64_t c = 0; c < kChannelGroup; ++c)
      for (int64_t o = 0; o < kConvOutputs; o += kWidth<float>) transform_weight(taps + c * kTaps + o, to + c * panel.width + o, stride);
  }
}

template <class S>
void convolve(const Conv3x3Args& args, int64_t begin, int64_t end) {
  int64_t tiles = tiles_of(args.batch, args.height, args.width);
  int64_t input_stride = product_stride(args.unit_tiles, args.inputs), output_stride = product_stride(args.unit_tiles, args.outputs);
  Scratch<float, 16> memory(kTileProducts * (input_stride + output_stride) + args.inputs + args.outputs + 16);
  float *inputs = on_a_line(memory.data()), *products = inputs + kTileProducts * input_stride;
  float* bias = products + kTileProducts * output_stride;
  S* zeros = reinterpret_cast<S*>(bias + args.outputs);
  memset(zeros, 0, static_cast<size_t>(args.inputs) * sizeof(S));
  for (int64_t o = 0; o < args.outputs; ++o)
    bias[o] = args.bias ? load_as<float>(static_cast<const S*>(args.bias)[o * args.bias_stride]) : 0.0f;
  TileBuffers buffers = {inputs, products, input_stride, output_stride};
  for (int64_t unit = begin; unit < end; ++unit) {
    int64_t first = unit * args.unit_tiles, count = lesser(args.unit_tiles, tiles - first);
    transform_inputs(images_of<S>(args), Range{0, args.inputs}, first, count, zeros, inputs, input_stride);
    multiply_all<S>(args, first + count, count, buffers);
    store_results<S>(args, first, count, bias, buffers);
  }
}

}  // namespace

// A unit is the transformed weights of some input channels and one block of outputs.
void conv3x3_weights(const Conv3x3Args& args, int64_t begin, int64_t end) {
  switch (args.dtype) {
    case Dtype::bfloat16:
      return transform_weights<Bfloat16>(args, begin, end);
    case Dtype::float16:
      return transform_weights<Float16>(args, begin, end);
    default:
      return transform_weights<float>(args, begin, end);
  }
}

// A unit is `unit_tiles` tiles, of which the last unit may have fewer.
void conv3x3_units(const Conv3x3Args& args, int64_t begin, int64_t end) {
  switch (args.dtype) {
    case Dtype::bfloat16:
      return convolve<Bfloat16>(args, begin, end);
    case Dtype::float16:
      return convolve<Float16>(args, begin, end);
    default:
      return convolve<float>(args, begin, end);
  }
}

}  // namespace FM_ISA
}  // namespace fm
