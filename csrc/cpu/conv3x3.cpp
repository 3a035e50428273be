// y[b, o, h, w] = bias[o] + sum_{c, i, j} W[o, c, i, j] x[b, c, h + i - 1, w + j - 1] of float32 tensors in channels_last, by Winograd's
// algorithm (winograd.h). The sums over c are 16 matrix products of a block of tiles with the transformed weights.
#include <string.h>

#include "products.h"
#include "scratch.h"
#include "winograd.h"

namespace fm {
namespace FM_ISA {
namespace {

// The transformed inputs [16, tiles, C] and the products [16, tiles, O] of a block of tiles.
struct TileBuffers {
  const float* inputs;
  float* products;
};

FM_INLINE Images images_of(const Conv3x3Args& args) { return Images{args.x, args.height, args.width, args.inputs}; }

// --- weights -------------------------------------------------------------------------------------------------------------------------

// Input channels whose weights are transformed together: a line of memory holds so many.
constexpr int64_t kChannelGroup = kConvOutputs;
constexpr int64_t kTaps = 9 * kConvOutputs;  // of an input channel and a block of outputs: [3, 3, kConvOutputs]

// The taps of some input channels and a block of outputs, [kChannelGroup, 3, 3, kConvOutputs]; every line of memory is read once.
FM_INLINE void gather_taps(const Conv3x3Args& args, int64_t block, int64_t channel, float* taps) {
  const float* first = args.weight + block * kConvOutputs * args.output_stride + channel * args.input_stride;
  for (int64_t i = 0; i < 3; ++i)
    for (int64_t j = 0; j < 3; ++j) {
      const float* from = first + i * args.tap_stride[0] + j * args.tap_stride[1];
      float* to = taps + (i * 3 + j) * kConvOutputs;
      if (args.output_stride == 1) {
        for (int64_t c = 0; c < kChannelGroup; ++c) memcpy(to + c * kTaps, from + c * args.input_stride, kConvOutputs * sizeof(float));
        continue;
      }
      for (int64_t o = 0; o < kConvOutputs; ++o)
        for (int64_t c = 0; c < kChannelGroup; ++c) to[c * kTaps + o] = from[o * args.output_stride + c * args.input_stride];
    }
}

FM_INLINE void transform_taps(const Floats g[3], Floats u[4]) {
  Floats sum = 0.5f * (g[0] + g[2]), middle = 0.5f * g[1];
  u[0] = g[0], u[1] = sum + middle, u[2] = sum - middle, u[3] = g[2];
}

// G g G' of one vector of outputs; the products lie `stride` apart.
FM_INLINE void transform_weight(const float* taps, float* to, int64_t stride) {
  Floats columns[3][4];
#pragma GCC unroll 3
  for (int64_t j = 0; j < 3; ++j) {
    Floats g[3];
#pragma GCC unroll 3
    for (int64_t i = 0; i < 3; ++i) g[i] = load_whole(taps + (i * 3 + j) * kConvOutputs);
    transform_taps(g, columns[j]);
  }
#pragma GCC unroll 4
  for (int64_t i = 0; i < 4; ++i) {
    Floats g[3] = {columns[0][i], columns[1][i], columns[2][i]}, u[4];
    transform_taps(g, u);
#pragma GCC unroll 4
    for (int64_t j = 0; j < 4; ++j) store_whole(to + (i * 4 + j) * stride, u[j]);
  }
}

// --- products ------------------------------------------------------------------------------------------------------------------------

// Each of the 16 products: of all tiles with one block of outputs after the other.
FM_INLINE void multiply_all(const Conv3x3Args& args, int64_t count, const TileBuffers& buffers) {
  int64_t blocks = args.outputs / kConvOutputs;
  for (int64_t product = 0; product < kTileProducts; ++product)
    for (int64_t block = 0; block < blocks; ++block)
      multiply<false>(Left<float>{buffers.inputs + product * args.unit_tiles * args.inputs, args.inputs, 1},
                      Right<float>{args.transformed + (product * blocks + block) * args.inputs * kConvOutputs, kConvOutputs}, args.inputs,
                      count, kConvOutputs,
                      Result{buffers.products + product * args.unit_tiles * args.outputs + block * kConvOutputs, args.outputs});
}

// --- results -------------------------------------------------------------------------------------------------------------------------

FM_INLINE void transform_products(const Floats m[4], Floats y[2]) { y[0] = m[0] + m[1] + m[2], y[1] = m[1] - m[2] - m[3]; }

// A' m A of one vector of outputs; the products lie `stride` apart.
FM_INLINE void transform_result(const float* from, int64_t stride, Floats y[2][2]) {
  Floats rows[2][4];
#pragma GCC unroll 4
  for (int64_t j = 0; j < 4; ++j) {
    Floats m[4], column[2];
#pragma GCC unroll 4
    for (int64_t i = 0; i < 4; ++i) m[i] = load_whole(from + (i * 4 + j) * stride);
    transform_products(m, column);
    rows[0][j] = column[0], rows[1][j] = column[1];
  }
  transform_products(rows[0], y[0]);
  transform_products(rows[1], y[1]);
}

FM_INLINE void store_results(const Conv3x3Args& args, int64_t first, int64_t count, const float* bias, const TileBuffers& buffers) {
  for (int64_t t = 0; t < count; ++t) {
    Corner corner = corner_of(images_of(args), first + t);
    float* to = args.y + ((corner.sample * args.height + corner.row) * args.width + corner.column) * args.outputs;
    int64_t rows = lesser(2, args.height - corner.row), columns = lesser(2, args.width - corner.column);
    for (int64_t o = 0; o < args.outputs; o += kWidth<float>) {
      Floats y[2][2], offset = load_whole(bias + o);
      transform_result(buffers.products + t * args.outputs + o, args.unit_tiles * args.outputs, y);
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; ++j) store_whole(to + (i * args.width + j) * args.outputs + o, y[i][j] + offset);
    }
  }
}

}  // namespace

// A unit is the transformed weights of some input channels and one block of outputs.
void conv3x3_weights(const Conv3x3Args& args, int64_t begin, int64_t end) {
  int64_t groups = args.inputs / kChannelGroup, stride = args.outputs * args.inputs;
  float taps[kChannelGroup * kTaps];
  for (int64_t unit = begin; unit < end; ++unit) {
    int64_t block = unit / groups, channel = unit % groups * kChannelGroup;
    gather_taps(args, block, channel, taps);
    float* to = args.transformed + (block * args.inputs + channel) * kConvOutputs;
    for (int64_t c = 0; c < kChannelGroup; ++c)
      for (int64_t o = 0; o < kConvOutputs; o += kWidth<float>) transform_weight(taps + c * kTaps + o, to + c * kConvOutputs + o, stride);
  }
}

// A unit is `unit_tiles` tiles, of which the last unit may have fewer.
void conv3x3_units(const Conv3x3Args& args, int64_t begin, int64_t end) {
  int64_t tiles = args.batch * divide_up(args.height, 2) * divide_up(args.width, 2), each = kTileProducts * args.unit_tiles;
  Scratch<float, 16> memory(each * (args.inputs + args.outputs) + args.inputs + args.outputs + 16);
  float *inputs = on_a_line(memory.data()), *products = inputs + each * args.inputs, *bias = products + each * args.outputs;
  float* zeros = bias + args.outputs;
  memset(zeros, 0, static_cast<size_t>(args.inputs) * sizeof(float));
  for (int64_t o = 0; o < args.outputs; ++o) bias[o] = args.bias ? args.bias[o * args.bias_stride] : 0.0f;
  TileBuffers buffers = {inputs, products};
  for (int64_t unit = begin; unit < end; ++unit) {
    int64_t first = unit * args.unit_tiles, count = lesser(args.unit_tiles, tiles - first);
    transform_inputs(images_of(args), first, count, zeros, inputs, args.unit_tiles * args.inputs);
    multiply_all(args, count, buffers);
    store_results(args, first, count, bias, buffers);
  }
}

}  // namespace FM_ISA
}  // namespace fm
