// dW[o, c, i, j] = sum_{b, h, w} dy[b, o, h, w] x[b, c, h + i - r, w + j - r], db[o] = sum_{b, h, w} dy[b, o, h, w]: the gradients of the
// parameters of a convolution of size 1 or 3 = 2 r + 1 that keeps the height and width, of float32 tensors in channels_last.
#include <string.h>

#include "scratch.h"
#include "tiling.h"
#include "vector.h"

namespace fm {
namespace FM_ISA {
namespace {

constexpr int64_t kVectors = kConvOutputs / kWidth<float>;  // of a block of outputs
// Channels whose sums stay in registers with those of the outputs: 12 registers of 16, and with AVX-512 16 of 32.
#if defined(__AVX512F__)
constexpr int64_t kChannelsAbreast = 16;
#else
constexpr int64_t kChannelsAbreast = 12 / kVectors;
#endif
constexpr int64_t kPositions = 64;  // of the rows that a unit works on at a time, about: with their surroundings they fit the L1 cache

// Rows of an image and what surrounds them, zero outside of the image. What tap (i, j) meets begins at at(i, j).
struct Window {
  const float* data;
  int64_t row_stride, channels;

  const float* at(int64_t i, int64_t j) const { return data + i * row_stride + j * channels; }
};

struct ImageRows {
  int64_t sample, first, count;
};

// Some blocks of outputs; their gradient at the first position of the rows.
struct Outputs {
  const float* dy;
  int64_t blocks;
};

FM_INLINE const float* image_row(const ConvArgs& args, int64_t sample, int64_t row) {
  return args.x + (sample * args.height + row) * args.width * args.inputs;
}

// Copies the rows with a frame of zeros of width r; of size 1 they lie there as they are.
FM_INLINE Window window_of(const ConvArgs& args, const ImageRows& rows, float* buffer) {
  int64_t length = args.width * args.inputs;
  if (args.size == 1) return Window{image_row(args, rows.sample, rows.first), length, args.inputs};
  int64_t stride = length + 2 * args.inputs;
  for (int64_t r = -1; r <= rows.count; ++r) {
    float* row = buffer + (r + 1) * stride;
    int64_t h = rows.first + r;
    bool inside = h >= 0 && h < args.height;
    memset(row, 0, static_cast<size_t>(inside ? args.inputs : stride) * sizeof(float));
    if (!inside) continue;
    memcpy(row + args.inputs, image_row(args, rows.sample, h), static_cast<size_t>(length) * sizeof(float));
    memset(row + args.inputs + length, 0, static_cast<size_t>(args.inputs) * sizeof(float));
  }
  return Window{buffer, stride, args.inputs};
}

// Adds x[c..c + kChannels] dy[16 outputs] of all positions of the rows to sums [kChannels, 16].
template <int kChannels>
FM_INLINE void add_products(const ConvArgs& args, const ImageRows& rows, const Window& x, const float* from, const float* dy, float* sums) {
  Vector<float> sum[kChannels][kVectors];
#pragma GCC unroll 16
  for (int k = 0; k < kChannels; ++k)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[k][v] = load_whole(sums + k * kConvOutputs + v * kWidth<float>);
  for (int64_t r = 0; r < rows.count; ++r) {
    const float *point = from + r * x.row_stride, *d = dy + r * args.width * args.outputs;
    for (int64_t w = 0; w < args.width; ++w, point += args.inputs, d += args.outputs) {
      Vector<float> gradient[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) gradient[v] = load_whole(d + v * kWidth<float>);
#pragma GCC unroll 16
      for (int k = 0; k < kChannels; ++k) {
        Vector<float> value = all(point[k]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sum[k][v] = fused(value, gradient[v], sum[k][v]);
      }
    }
  }
#pragma GCC unroll 16
  for (int k = 0; k < kChannels; ++k)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store_whole(sums + k * kConvOutputs + v * kWidth<float>, sum[k][v]);
}

// A part of the channels that are left, for which there is a kernel: few sums at a time wait for each other.
FM_INLINE int64_t next_channels(int64_t left) {
  if (left >= kChannelsAbreast && left != kChannelsAbreast + 1 && left != kChannelsAbreast + 2) return kChannelsAbreast;
  return left >= 4 ? lesser(4, kChannelsAbreast) : left >= 2 ? 2 : 1;
}

template <int kChannels>
FM_INLINE void add_blocks(const ConvArgs& args, const ImageRows& rows, const Window& x, const float* from, const Outputs& outputs,
                          float* sums) {
  for (int64_t block = 0; block < outputs.blocks; ++block)
    add_products<kChannels>(args, rows, x, from, outputs.dy + block * kConvOutputs, sums + block * conv_block_sums(args));
}

// All channels of one tap.
FM_INLINE void add_tap(const ConvArgs& args, const ImageRows& rows, const Window& x, const float* tap, const Outputs& outputs,
                       float* sums) {
  for (int64_t c = 0, width; c < args.inputs; c += width) {
    width = next_channels(args.inputs - c);
    float* to = sums + c * kConvOutputs;
    if (width == kChannelsAbreast)
      add_blocks<kChannelsAbreast>(args, rows, x, tap + c, outputs, to);
    else if (width == 4)
      add_blocks<4>(args, rows, x, tap + c, outputs, to);
    else if (width == 2)
      add_blocks<2>(args, rows, x, tap + c, outputs, to);
    else
      add_blocks<1>(args, rows, x, tap + c, outputs, to);
  }
}

FM_INLINE void add_bias(const ConvArgs& args, const ImageRows& rows, const float* dy, float* sums) {
  for (int64_t v = 0; v < kConvOutputs; v += kWidth<float>) {
    Vector<float> sum = load_whole(sums + v);
    for (int64_t p = 0; p < rows.count * args.width; ++p) sum += load_whole(dy + p * args.outputs + v);
    store_whole(sums + v, sum);
  }
}

FM_INLINE void add_rows(const ConvArgs& args, const ImageRows& rows, int64_t block, int64_t blocks, float* buffer, float* sums) {
  Window x = window_of(args, rows, buffer);
  int64_t position = (rows.sample * args.height + rows.first) * args.width;
  Outputs outputs = {args.grad_y + position * args.outputs + block * kConvOutputs, blocks};
  for (int64_t i = 0; i < args.size; ++i)
    for (int64_t j = 0; j < args.size; ++j)
      add_tap(args, rows, x, x.at(i, j), outputs, sums + (i * args.size + j) * args.inputs * kConvOutputs);
  for (int64_t k = 0; k < blocks; ++k)
    add_bias(args, rows, outputs.dy + k * kConvOutputs, sums + (k + 1) * conv_block_sums(args) - kConvOutputs);
}

}  // namespace

// A unit sums some blocks of outputs over one part of the batch, in the order of its positions.
void conv_weight_grad_units(const ConvArgs& args, int64_t begin, int64_t end) {
  int64_t blocks = args.outputs / kConvOutputs, each = divide_up(blocks, args.unit_blocks);
  int64_t rows = greater(kPositions / greater(args.width, 1), 1);
  Scratch<float, 16> buffer(args.size == 1 ? 0 : (rows + 2) * (args.width + 2) * args.inputs);
  for (int64_t unit = begin; unit < end; ++unit) {
    int64_t part = unit / each, first = unit % each * args.unit_blocks, count = lesser(args.unit_blocks, blocks - first);
    float* sums = args.partial + (part * blocks + first) * conv_block_sums(args);
    memset(sums, 0, static_cast<size_t>(count * conv_block_sums(args)) * sizeof(float));
    int64_t last = lesser((part + 1) * args.samples_per_part, args.batch);
    for (int64_t sample = part * args.samples_per_part; sample < last; ++sample)
      for (int64_t row = 0; row < args.height; row += rows)
        add_rows(args, ImageRows{sample, row, lesser(rows, args.height - row)}, first, count, buffer.data(), sums);
  }
}

// A unit is one tap of one block of outputs, or its bias: the parts of the batch in order.
void conv_weight_grad_sums(const ConvArgs& args, int64_t begin, int64_t end) {
  int64_t blocks = args.outputs / kConvOutputs, taps = args.size * args.size;
  for (int64_t unit = begin; unit < end; ++unit) {
    int64_t block = unit / (taps + 1), tap = unit % (taps + 1), rows = tap == taps ? 1 : args.inputs;
    const float* from = args.partial + block * conv_block_sums(args) + tap * args.inputs * kConvOutputs;
    float* to =
        tap == taps ? args.grad_bias : args.grad_weight + tap / args.size * args.tap_stride[0] + tap % args.size * args.tap_stride[1];
    int64_t stride = tap == taps ? args.bias_stride : args.output_stride;
    if (!to) continue;
    for (int64_t c = 0; c < rows; ++c)
      for (int64_t o = 0; o < kConvOutputs; ++o) {
        float sum = 0;
        for (int64_t part = 0; part < args.parts; ++part) sum += from[part * blocks * conv_block_sums(args) + c * kConvOutputs + o];
        to[(block * kConvOutputs + o) * stride + c * args.input_stride] = sum;
      }
  }
}

}  // namespace FM_ISA
}  // namespace fm
