// Samples whose elements take noise: as packs of neighbours, or a counter block at a time in any layout.
#pragma once

#include "../loss.h"
#include "draw.h"
#include "geometry.h"
#include "pack.h"

namespace fm {
namespace cuda {

constexpr int kBlock = 4;  // numbers of a Philox block

// How a sample [C, P] is cut into counter blocks, which lie in its rows (a row a channel) one after the other.
struct Blocks {
  int64_t channels, positions, row_blocks, size;
  Divisor row, width;  // blocks of a row, or channels where they are neighbours in memory; the last dimension's size
  bool channels_first;
};

inline Blocks blocks_of_sample(const Shape& shape, const View& fastest, int64_t size = kBlock) {
  int64_t row_blocks = (shape.positions + size - 1) / size, blocks = shape.channels * row_blocks;
  bool channels_first = shape.channels > 1 && fastest.channel_stride < fastest.position_stride;
  Divisor row = divisor(channels_first ? shape.channels : row_blocks, blocks), width = divisor(shape.width, shape.positions);
  return Blocks{shape.channels, shape.positions, row_blocks, size, row, width, channels_first};
}

inline int64_t padded_elements(const Blocks& blocks) { return blocks.channels * blocks.row_blocks * blocks.size; }

// Elements `position` .. position + count - 1 of a channel, and the counter of their noise.
struct BlockPlace {
  int64_t channel, position;
  int count;
  uint32_t counter;
};

FM_HD BlockPlace place_of_block(const Blocks& blocks, int64_t index) {
  int64_t quotient = divide(index, blocks.row), rest = index - quotient * blocks.row.value;
  int64_t channel = blocks.channels_first ? rest : quotient, block = blocks.channels_first ? quotient : rest;
  int64_t position = block * blocks.size, left = blocks.positions - position;
  int count = static_cast<int>(left < blocks.size ? left : blocks.size);
  return BlockPlace{channel, position, count, static_cast<uint32_t>(channel * blocks.row_blocks + block)};
}

// The i-th counter block of a thread.
FM_HD int64_t block_index(const Geometry& g, const Run& run, uint32_t chunk, int i) {
  return ((static_cast<int64_t>(chunk) * (kEach / kBlock) + i) << g.team_bits) + run.lane;
}

FM_HD int64_t offset_of(const View& view, int64_t sample, int64_t channel, int64_t position) {
  return sample * view.batch_stride + channel * view.channel_stride + position * view.position_stride;
}

// The position that a mirrored sample shows at `position`.
template <class Index>
FM_HD Index mirrored(Index position, const Divisor& width) {
  Index size = static_cast<Index>(width.value), column = position - divide(position, width) * size;
  return position - column + (size - 1 - column);
}

FM_HD bool is_mirrored(const DataTransform& transform, const Key& key, uint32_t id) {
  return transform.flip > 0 && flips(stream_of(key, kStreamFlip), id, transform.flip);
}

// Neighbours that a thread takes of a tensor with elements of S, and how often it does.
template <class S>
struct Packs {
  static constexpr int kWidth = sizeof(S) == 2 ? 8 : 4;
  static constexpr int kCount = kEach / kWidth;

  FM_HD uint32_t offset(const Geometry& g, uint32_t chunk, uint32_t lane, int i) {
    return (((chunk * kCount + static_cast<uint32_t>(i)) << g.team_bits) + lane) * kWidth;
  }
};

// A pack of x1 of the sample that begins at `base`, as it lies in memory: one load, for which nothing waits before it is mapped.
template <int kWidth, class X1>
FM_HD Pack<X1, kWidth> load_data_pack(const View& x1, int64_t base, uint32_t offset, bool mirror, const Divisor& width) {
  return load_pack<X1, kWidth>(x1.data, base + (mirror ? mirrored(offset + (kWidth - 1), width) : offset));
}

// Floating data is data already.
template <int kWidth, class X1>
FM_HD void map_data_pack(const Pack<X1, kWidth>& loaded, bool mirror, const DataTransform&, const Stream&, uint32_t, uint32_t,
                         float (&x1)[kWidth]) {
  widen_pack(mirror ? reversed(loaded) : loaded, x1);
}

template <int kWidth>
FM_HD void map_data_pack(const Pack<uint8_t, kWidth>& loaded, bool mirror, const DataTransform& transform, const Stream& dequantise,
                         uint32_t id, uint32_t block, float (&x1)[kWidth]) {
  Pack<uint8_t, kWidth> pack = mirror ? reversed(loaded) : loaded;
  float u[kWidth], scale = static_cast<float>(2.0 / transform.levels);
  for (int i = 0; i < kWidth; ++i) u[i] = 0.5f;
  if (transform.dequantise)
    for (int i = 0; i < kWidth / kBlock; ++i) draw_uniforms(dequantise, id, block + static_cast<uint32_t>(i), u + kBlock * i);
  widen_pack(pack, x1);
  for (int i = 0; i < kWidth; ++i) x1[i] = data_map<float>(x1[i], u[i], scale);
}

// x0 of a pack of elements: drawn, or as it was read.
template <bool kDraw, class S, int kWidth>
FM_HD void source_pack(const Pack<S, kWidth>& pack, const Stream& stream, uint32_t id, uint32_t block, float (&x0)[kWidth]) {
  if (!kDraw) widen_pack(pack, x0);
  for (int i = 0; kDraw && i < kWidth / kBlock; ++i) draw_normals(stream, id, block + static_cast<uint32_t>(i), x0 + kBlock * i);
}

// x1 of a counter block in any layout and dtype.
template <class T>
FM_HD void load_data_block(const View& x1, int64_t sample, const Blocks& blocks, const BlockPlace& place, bool mirror,
                           const DataTransform& transform, const Stream& dequantise, uint32_t id, T (&to)[kBlock]) {
  float u[kBlock] = {0.5f, 0.5f, 0.5f, 0.5f};
  bool integers = x1.dtype == Dtype::uint8;
  if (integers && transform.dequantise) draw_uniforms(dequantise, id, place.counter, u);
  T scale = static_cast<T>(2.0 / transform.levels);
  for (int i = 0; i < kBlock; ++i) {
    if (i >= place.count) continue;
    int64_t position = mirror ? mirrored(place.position + i, blocks.width) : place.position + i;
    T value = load_any<T>(x1, offset_of(x1, sample, place.channel, position));
    to[i] = integers ? data_map<T>(value, static_cast<T>(u[i]), scale) : value;
  }
}

template <class T>
FM_HD void load_block(const View& view, int64_t sample, const BlockPlace& place, T (&to)[kBlock]) {
  for (int i = 0; i < kBlock; ++i)
    if (i < place.count) to[i] = load_any<T>(view, offset_of(view, sample, place.channel, place.position + i));
}

template <class T>
FM_HD void store_block(const View& view, int64_t sample, const BlockPlace& place, const T (&from)[kBlock]) {
  for (int i = 0; i < kBlock; ++i)
    if (i < place.count) store_any<T>(view, offset_of(view, sample, place.channel, place.position + i), from[i]);
}

// x0 of a counter block: read, or drawn.
template <class T>
FM_HD void source_block(const View& x0, int64_t sample, const BlockPlace& place, const Stream& stream, uint32_t id, T (&to)[kBlock]) {
  if (x0.data) return load_block<T>(x0, sample, place, to);
  float z[kBlock];
  draw_normals(stream, id, place.counter, z);
  for (int i = 0; i < kBlock; ++i) to[i] = static_cast<T>(z[i]);
}

// Whether samples can be walked pack by pack of `width` elements, with 32-bit offsets inside a sample.
template <int kViews>
inline bool are_packed(const Shape& shape, const DataTransform& transform, int64_t width, const View* const (&views)[kViews]) {
  int64_t elements = shape.channels * shape.positions;
  bool rows = (shape.channels == 1 || shape.positions % kBlock == 0) && elements % width == 0 && elements < kWordLimit - kThreads * kEach;
  rows = rows && shape.batch < kWordLimit;
  if (transform.flip > 0 && shape.width % width != 0) return false;
  for (const View* view : views) rows = rows && is_packed(*view, shape, width);
  return rows;
}

}  // namespace cuda
}  // namespace fm
