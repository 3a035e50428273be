// Winograd's minimal filtering F(4x4, 3x3) (Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016, Algorithm 1):
// a tile of 4x4 results is A' [sum_c (G g G') (B' d B)] A for the 6x6 inputs d around it and the 3x3 taps g, so that 36 products an input
// channel stand for 144. Along each dimension, with p = 1/sqrt(2) and q = sqrt(2),
//
//   B' d: d0 - 5/2 d2 + d4, (d4 - 2 d2) +- p (d3 - 2 d1), (d4 - d2 / 2) +- q (d3 - d1 / 2), d1 - 5/2 d3 + d5
//   G g:  g0, -2/3 ((g0 + g2 / 2) +- p g1), 1/6 ((g0 + 2 g2) +- q g1), g2
//   A' m: m0 + (m1 + m2) + (m3 + m4), p (m1 - m2) + q (m3 - m4), (m1 + m2) / 2 + 2 (m3 + m4), p / 2 (m1 - m2) + 2 q (m3 - m4) + m5
//
// The polynomials are evaluated at 0, +-p, +-q and infinity. The usual points, 0, +-1 and +-2, lose twice as much: root mean square errors
// of 17e-7 of the result's, with these points 8e-7, of a direct sum 4e-7 (64 channels).
//
// Internal linkage: the same names are compiled under different instruction sets.
#pragma once

#include "tiling.h"
#include "vector.h"

namespace fm {
namespace FM_ISA {
namespace {

constexpr int kReach = kTileSide + 2;  // inputs of a tile, along each dimension
constexpr float kNearPoint = 0.70710678f, kFarPoint = 1.41421356f;

using Floats = Vector<float>;

// Images in channels_last.
template <class S>
struct Images {
  const S* data;
  int64_t height, width, channels;
};

// `count` channels from `first`.
struct Range {
  int64_t first, count;
};

// The first position of a tile.
struct Corner {
  int64_t sample, row, column;
};

template <class S>
FM_INLINE Corner corner_of(const Images<S>& images, int64_t tile) {
  int64_t down = divide_up(images.height, kTileSide), across = divide_up(images.width, kTileSide);
  return Corner{tile / (down * across), tile / across % down * kTileSide, tile % across * kTileSide};
}

// Where the channels of a kSide x kSide square of positions begin, the first `before` those of the corner; zeros beyond the border.
template <int kSide, class S>
FM_INLINE void channels_of_square(const Images<S>& images, const Corner& corner, int64_t before, const S* zeros,
                                  const S* from[kSide][kSide]) {
  for (int64_t i = 0; i < kSide; ++i) {
    int64_t h = corner.row + i - before, w = corner.column - before;
    bool within = h >= 0 && h < images.height;
    const S* line = images.data + ((corner.sample * images.height + h) * images.width + w) * images.channels;
    for (int64_t j = 0; j < kSide; ++j) from[i][j] = within && w + j >= 0 && w + j < images.width ? line + j * images.channels : zeros;
  }
}

FM_INLINE void transform_line(const Floats d[kReach], Floats v[kReach]) {
  Floats near_even = fused(d[2], all(-2.0f), d[4]), near_odd = fused(d[1], all(-2.0f), d[3]);
  Floats far_even = fused(d[2], all(-0.5f), d[4]), far_odd = fused(d[1], all(-0.5f), d[3]);
  v[0] = fused(d[2], all(-2.5f), d[0] + d[4]), v[5] = fused(d[3], all(-2.5f), d[1] + d[5]);
  v[1] = fused(near_odd, all(kNearPoint), near_even), v[2] = fused(near_odd, all(-kNearPoint), near_even);
  v[3] = fused(far_odd, all(kFarPoint), far_even), v[4] = fused(far_odd, all(-kFarPoint), far_even);
}

// B' d B of one vector of channels; the products lie `stride` apart.
template <class S>
FM_INLINE void transform_input(const S* const from[kReach][kReach], int64_t channel, float* to, int64_t stride) {
  Floats rows[kReach][kReach];
#pragma GCC unroll 6
  for (int64_t i = 0; i < kReach; ++i) {
    Floats d[kReach];
#pragma GCC unroll 6
    for (int64_t j = 0; j < kReach; ++j) d[j] = load_whole(from[i][j] + channel);
    transform_line(d, rows[i]);
  }
#pragma GCC unroll 6
  for (int64_t j = 0; j < kReach; ++j) {
    Floats d[kReach], v[kReach];
#pragma GCC unroll 6
    for (int64_t i = 0; i < kReach; ++i) d[i] = rows[i][j];
    transform_line(d, v);
#pragma GCC unroll 6
    for (int64_t i = 0; i < kReach; ++i) store_whole(to + (i * kReach + j) * stride, v[i]);
  }
}

// How far apart the products of some tiles and channels lie: an odd number of lines of memory, or all 36 of a channel would share few sets
// of the L1 cache.
FM_INLINE int64_t product_stride(int64_t tiles, int64_t channels) { return divide_up(tiles * channels, 16) / 2 * 32 + 16; }

// The transformed inputs of some tiles, [36, tiles, channels of the range] with the products `stride` apart.
template <class S>
FM_INLINE void transform_inputs(const Images<S>& images, const Range& channels, int64_t first, int64_t count, const S* zeros, float* to,
                                int64_t stride) {
  for (int64_t t = 0; t < count; ++t) {
    const S* from[kReach][kReach];
    channels_of_square<kReach>(images, corner_of(images, first + t), 1, zeros, from);
    for (int64_t c = 0; c < channels.count; c += kWidth<float>)
      transform_input(from, channels.first + c, to + t * channels.count + c, stride);
  }
}

// Fetches one of kTileProducts shares of the tiles from `first` to `end` into the L2 cache, as if their positions lay one after the other,
// which those of whole rows of tiles do.
template <class S>
FM_INLINE void prefetch_tiles(const Images<S>& images, const Range& channels, int64_t first, int64_t end, int64_t share) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(S));
  Corner corner = corner_of(images, first);
  int64_t position = (corner.sample * images.height + corner.row) * images.width + corner.column;
  int64_t each = divide_up((end - first) * kTileSide * kTileSide, kTileProducts);
  const S* from = images.data + (position + share * each) * images.channels + channels.first;
  for (int64_t p = 0; p < each; ++p, from += images.channels)
    for (int64_t c = 0; c < channels.count; c += kLine) __builtin_prefetch(from + c, 0, 2);
}

}  // namespace
}  // namespace FM_ISA
}  // namespace fm
