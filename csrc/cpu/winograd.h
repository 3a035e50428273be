// Winograd's minimal filtering F(2x2, 3x3) (Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016, Algorithm 1):
// a tile of 2x2 results is A' [sum_c (G g G') (B' d B)] A for the 4x4 inputs d around it and the 3x3 taps g, so that 16 products an input
// channel stand for 36. Along each dimension
//
//   B' d: d0 - d2, d1 + d2, d2 - d1, d1 - d3    G g: g0, (g0 + g1 + g2) / 2, (g0 - g1 + g2) / 2, g2    A' m: m0 + m1 + m2, m1 - m2 - m3
//
// Internal linkage: the same names are compiled under different instruction sets.
#pragma once

#include "tiling.h"
#include "vector.h"

namespace fm {
namespace FM_ISA {
namespace {

constexpr int64_t kTileProducts = 16;                             // of a tile, an input and an output channel
constexpr int64_t kOutputVectors = kConvOutputs / kWidth<float>;  // of a block of outputs

using Floats = Vector<float>;

// Float32 images in channels_last.
struct Images {
  const float* data;
  int64_t height, width, channels;
};

// The first of the 2x2 positions of a tile.
struct Corner {
  int64_t sample, row, column;
};

FM_INLINE Corner corner_of(const Images& images, int64_t tile) {
  int64_t down = divide_up(images.height, 2), across = divide_up(images.width, 2);
  return Corner{tile / (down * across), tile / across % down * 2, tile % across * 2};
}

// Where the channels of a position begin; zeros beyond the border.
FM_INLINE const float* channels_at(const Images& images, int64_t sample, int64_t h, int64_t w, const float* zeros) {
  bool inside = h >= 0 && h < images.height && w >= 0 && w < images.width;
  return inside ? images.data + ((sample * images.height + h) * images.width + w) * images.channels : zeros;
}

FM_INLINE void transform_line(const Floats d[4], Floats v[4]) {
  v[0] = d[0] - d[2], v[1] = d[1] + d[2], v[2] = d[2] - d[1], v[3] = d[1] - d[3];
}

// B' d B of one vector of channels; the products lie `stride` apart.
FM_INLINE void transform_input(const float* const from[4][4], int64_t channel, float* to, int64_t stride) {
  Floats rows[4][4];
#pragma GCC unroll 4
  for (int64_t i = 0; i < 4; ++i) {
    Floats d[4];
#pragma GCC unroll 4
    for (int64_t j = 0; j < 4; ++j) d[j] = load_whole(from[i][j] + channel);
    transform_line(d, rows[i]);
  }
#pragma GCC unroll 4
  for (int64_t j = 0; j < 4; ++j) {
    Floats d[4] = {rows[0][j], rows[1][j], rows[2][j], rows[3][j]}, v[4];
    transform_line(d, v);
#pragma GCC unroll 4
    for (int64_t i = 0; i < 4; ++i) store_whole(to + (i * 4 + j) * stride, v[i]);
  }
}

// The transformed inputs of some tiles, [16, tiles, channels] with the products `stride` apart.
FM_INLINE void transform_inputs(const Images& images, int64_t first, int64_t count, const float* zeros, float* to, int64_t stride) {
  for (int64_t t = 0; t < count; ++t) {
    Corner corner = corner_of(images, first + t);
    const float* from[4][4];
    for (int64_t i = 0; i < 4; ++i)
      for (int64_t j = 0; j < 4; ++j) from[i][j] = channels_at(images, corner.sample, corner.row + i - 1, corner.column + j - 1, zeros);
    for (int64_t c = 0; c < images.channels; c += kWidth<float>) transform_input(from, c, to + t * images.channels + c, stride);
  }
}

}  // namespace
}  // namespace FM_ISA
}  // namespace fm
