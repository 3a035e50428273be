// dW[o, c, i, j] = sum_{b, h, w} dy[b, o, h, w] x[b, c, h + i - r, w + j - r], db[o] = sum_{b, h, w} dy[b, o, h, w]: the gradients of the
// parameters of a convolution of size 1 or 3 = 2 r + 1 that keeps the height and width, of float32 tensors in channels_last.
//
// Size 1 is a matrix product over the positions. Size 3 is the transpose of Winograd's algorithm (winograd.h),
// G' [sum_t (A dy A') (B' d B)] G with sums over the tiles: 16 matrix products over a fourth of the positions. Along each dimension
//
//   A dy: y0, y0 + y1, y0 - y1, -y1    G' u: u0 + (u1 + u2) / 2, (u1 - u2) / 2, (u1 + u2) / 2 + u3
#include <string.h>

#include "scratch.h"
#include "winograd.h"

namespace fm {
namespace FM_ISA {
namespace {

// Channels whose sums stay in registers with those of the outputs: 12 registers of 16, and with AVX-512 16 of 32.
#if defined(__AVX512F__)
constexpr int64_t kChannelsAbreast = 16;
#else
constexpr int64_t kChannelsAbreast = 12 / kOutputVectors;
#endif
constexpr int64_t kPositions = 64;  // of size 1, at a time: they fit the L1 cache

// The channels of positions or tiles, which lie `stride` apart.
struct Points {
  const float* data;
  int64_t stride;
};

// --- sums of products ----------------------------------------------------------------------------------------------------------------

// Adds x[c..c + kChannels] dy[16 outputs] of all points to sums [kChannels, 16].
template <int kChannels>
FM_INLINE void add_products(const Points& x, const Points& dy, int64_t count, float* sums) {
  Floats sum[kChannels][kOutputVectors];
#pragma GCC unroll 16
  for (int k = 0; k < kChannels; ++k)
#pragma GCC unroll 4
    for (int v = 0; v < kOutputVectors; ++v) sum[k][v] = load_whole(sums + k * kConvOutputs + v * kWidth<float>);
  const float *point = x.data, *d = dy.data;
  for (int64_t p = 0; p < count; ++p, point += x.stride, d += dy.stride) {
    Floats gradient[kOutputVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kOutputVectors; ++v) gradient[v] = load_whole(d + v * kWidth<float>);
#pragma GCC unroll 16
    for (int k = 0; k < kChannels; ++k) {
      Floats value = all(point[k]);
#pragma GCC unroll 4
      for (int v = 0; v < kOutputVectors; ++v) sum[k][v] = fused(value, gradient[v], sum[k][v]);
    }
  }
#pragma GCC unroll 16
  for (int k = 0; k < kChannels; ++k)
#pragma GCC unroll 4
    for (int v = 0; v < kOutputVectors; ++v) store_whole(sums + k * kConvOutputs + v * kWidth<float>, sum[k][v]);
}

// A part of the channels that are left, for which there is a kernel: few sums at a time wait for each other.
FM_INLINE int64_t next_channels(int64_t left) {
  if (left >= kChannelsAbreast && left != kChannelsAbreast + 1 && left != kChannelsAbreast + 2) return kChannelsAbreast;
  return left >= 4 ? lesser(4, kChannelsAbreast) : left >= 2 ? 2 : 1;
}

template <int kChannels>
FM_INLINE void add_blocks(const ConvArgs& args, const Points& x, const Points& dy, int64_t count, int64_t blocks, float* sums) {
  for (int64_t block = 0; block < blocks; ++block)
    add_products<kChannels>(x, Points{dy.data + block * kConvOutputs, dy.stride}, count, sums + block * conv_block_sums(args));
}

// Adds the products of all channels with some blocks of outputs; of each block the sums are [C, 16].
FM_INLINE void add_channels(const ConvArgs& args, const Points& x, const Points& dy, int64_t count, int64_t blocks, float* sums) {
  for (int64_t c = 0, width; c < args.inputs; c += width) {
    width = next_channels(args.inputs - c);
    Points from = {x.data + c, x.stride};
    float* to = sums + c * kConvOutputs;
    if (width == kChannelsAbreast)
      add_blocks<kChannelsAbreast>(args, from, dy, count, blocks, to);
    else if (width == 4)
      add_blocks<4>(args, from, dy, count, blocks, to);
    else if (width == 2)
      add_blocks<2>(args, from, dy, count, blocks, to);
    else
      add_blocks<1>(args, from, dy, count, blocks, to);
  }
}

FM_INLINE void add_bias(const Points& dy, int64_t count, float* sums) {
  for (int64_t v = 0; v < kConvOutputs; v += kWidth<float>) {
    Floats sum = load_whole(sums + v);
    for (int64_t p = 0; p < count; ++p) sum += load_whole(dy.data + p * dy.stride + v);
    store_whole(sums + v, sum);
  }
}

// --- tiles ---------------------------------------------------------------------------------------------------------------------------

FM_INLINE void spread_line(Floats first, Floats second, Floats d[4]) {
  d[0] = first, d[1] = first + second, d[2] = first - second, d[3] = -second;
}

// A dy A' of one vector of outputs; the products lie `stride` apart.
FM_INLINE void transform_gradient(const float* const from[2][2], int64_t output, float* to, int64_t stride) {
  Floats rows[2][4];
#pragma GCC unroll 2
  for (int64_t i = 0; i < 2; ++i) spread_line(load_whole(from[i][0] + output), load_whole(from[i][1] + output), rows[i]);
#pragma GCC unroll 4
  for (int64_t j = 0; j < 4; ++j) {
    Floats d[4];
    spread_line(rows[0][j], rows[1][j], d);
#pragma GCC unroll 4
    for (int64_t i = 0; i < 4; ++i) store_whole(to + (i * 4 + j) * stride, d[i]);
  }
}

// The outputs of a unit: `count` channels of dy from `first`.
struct OutputRange {
  int64_t first, count;
};

// The transformed gradients of some tiles, [16, tiles, outputs of the unit].
FM_INLINE void transform_gradients(const Images& dy, const OutputRange& outputs, int64_t first, int64_t count, const float* zeros,
                                   float* to, int64_t stride) {
  for (int64_t t = 0; t < count; ++t) {
    Corner corner = corner_of(dy, first + t);
    const float* from[2][2];
    for (int64_t i = 0; i < 2; ++i)
      for (int64_t j = 0; j < 2; ++j) from[i][j] = channels_at(dy, corner.sample, corner.row + i, corner.column + j, zeros);
    for (int64_t o = 0; o < outputs.count; o += kWidth<float>)
      transform_gradient(from, outputs.first + o, to + t * outputs.count + o, stride);
  }
}

// G' u of two dimensions: 16 sums of one input channel and one output, to 9 taps.
FM_INLINE void transform_sums(const float u[16], float taps[9]) {
  float rows[3][4];
  for (int64_t j = 0; j < 4; ++j) {
    float sum = 0.5f * (u[4 + j] + u[8 + j]);
    rows[0][j] = u[j] + sum, rows[1][j] = 0.5f * (u[4 + j] - u[8 + j]), rows[2][j] = sum + u[12 + j];
  }
  for (int64_t i = 0; i < 3; ++i) {
    float sum = 0.5f * (rows[i][1] + rows[i][2]);
    taps[i * 3] = rows[i][0] + sum, taps[i * 3 + 1] = 0.5f * (rows[i][1] - rows[i][2]), taps[i * 3 + 2] = sum + rows[i][3];
  }
}

// --- units ---------------------------------------------------------------------------------------------------------------------------

FM_INLINE void add_tiles(const ConvArgs& args, const OutputRange& outputs, int64_t first, int64_t count, float* buffer, float* sums) {
  int64_t x_stride = args.unit_tiles * args.inputs, dy_stride = args.unit_tiles * outputs.count;
  // The zeros come first, since another unit may have fewer outputs.
  float *zeros = on_a_line(buffer), *x = zeros + greater(args.inputs, args.outputs), *dy = x + kTileProducts * x_stride;
  transform_inputs(Images{args.x, args.height, args.width, args.inputs}, first, count, zeros, x, x_stride);
  transform_gradients(Images{args.grad_y, args.height, args.width, args.outputs}, outputs, first, count, zeros, dy, dy_stride);
  for (int64_t product = 0; product < kTileProducts; ++product)
    add_channels(args, Points{x + product * x_stride, args.inputs}, Points{dy + product * dy_stride, outputs.count}, count,
                 outputs.count / kConvOutputs, sums + product * args.inputs * kConvOutputs);
}

FM_INLINE int64_t buffer_size(const ConvArgs& args) {
  int64_t outputs = lesser(args.unit_blocks * kConvOutputs, args.outputs);
  return args.size == 1 ? 0 : kTileProducts * args.unit_tiles * (args.inputs + outputs) + greater(args.inputs, args.outputs) + 16;
}

// Adds the samples from `begin` to `end`.
FM_INLINE void add_samples(const ConvArgs& args, const OutputRange& outputs, int64_t begin, int64_t end, float* buffer, float* sums) {
  int64_t positions = args.height * args.width, blocks = outputs.count / kConvOutputs;
  int64_t tiles = divide_up(args.height, 2) * divide_up(args.width, 2);
  for (int64_t t = begin * tiles; args.size == 3 && t < end * tiles; t += args.unit_tiles)
    add_tiles(args, outputs, t, lesser(args.unit_tiles, end * tiles - t), buffer, sums);
  for (int64_t p = begin * positions; p < end * positions; p += kPositions) {
    int64_t count = lesser(kPositions, end * positions - p);
    Points dy = {args.grad_y + p * args.outputs + outputs.first, args.outputs};
    if (args.size == 1) add_channels(args, Points{args.x + p * args.inputs, args.inputs}, dy, count, blocks, sums);
    for (int64_t k = 0; k < blocks; ++k)
      add_bias(Points{dy.data + k * kConvOutputs, dy.stride}, count, sums + (k + 1) * conv_block_sums(args) - kConvOutputs);
  }
}

// The sum of all parts at one place of the first.
FM_INLINE float over_parts(const ConvArgs& args, const float* from) {
  float sum = 0;
  for (int64_t part = 0; part < args.parts; ++part) sum += from[part * args.outputs / kConvOutputs * conv_block_sums(args)];
  return sum;
}

FM_INLINE void store_weight(const ConvArgs& args, const float* block, int64_t channel, int64_t lane, float* to) {
  float sums[kTileProducts], taps[9];
  for (int64_t k = 0; k < conv_products(args); ++k) sums[k] = over_parts(args, block + (k * args.inputs + channel) * kConvOutputs + lane);
  if (args.size == 1) {
    to[0] = sums[0];
    return;
  }
  transform_sums(sums, taps);
  for (int64_t i = 0; i < 3; ++i)
    for (int64_t j = 0; j < 3; ++j) to[i * args.tap_stride[0] + j * args.tap_stride[1]] = taps[i * 3 + j];
}

}  // namespace

// A unit sums some blocks of outputs over one part of the batch, in the order of its positions.
void conv_weight_grad_units(const ConvArgs& args, int64_t begin, int64_t end) {
  int64_t blocks = args.outputs / kConvOutputs, each = divide_up(blocks, args.unit_blocks);
  Scratch<float, 16> buffer(buffer_size(args));
  if (args.size == 3) memset(buffer.data(), 0, static_cast<size_t>(buffer_size(args)) * sizeof(float));
  for (int64_t unit = begin; unit < end; ++unit) {
    int64_t part = unit / each, first = unit % each * args.unit_blocks, count = lesser(args.unit_blocks, blocks - first);
    float* sums = args.partial + (part * blocks + first) * conv_block_sums(args);
    memset(sums, 0, static_cast<size_t>(count * conv_block_sums(args)) * sizeof(float));
    int64_t sample = part * args.samples_per_part, last = lesser(sample + args.samples_per_part, args.batch);
    add_samples(args, OutputRange{first * kConvOutputs, count * kConvOutputs}, sample, last, buffer.data(), sums);
  }
}

// A unit is one input channel of one block of outputs, or its bias: the parts of the batch in order.
void conv_weight_grad_sums(const ConvArgs& args, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; ++unit) {
    int64_t block = unit / (args.inputs + 1), channel = unit % (args.inputs + 1);
    const float* from = args.partial + block * conv_block_sums(args);
    for (int64_t lane = 0; lane < kConvOutputs; ++lane) {
      int64_t output = block * kConvOutputs + lane;
      if (channel < args.inputs)
        store_weight(args, from, channel, lane, args.grad_weight + output * args.output_stride + channel * args.input_stride);
      else if (args.grad_bias)
        args.grad_bias[output * args.bias_stride] = over_parts(args, from + conv_block_sums(args) - kConvOutputs + lane);
    }
  }
}

}  // namespace FM_ISA
}  // namespace fm
