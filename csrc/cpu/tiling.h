// How tensors are cut into tiles that stay in the first-level cache.
#pragma once

#include "kernels.h"

namespace fm {

constexpr int64_t kTileElements = 1024;
constexpr int64_t kTileBuffer = kTileElements + 64;  // the generators write whole groups of 64
constexpr int64_t kLineElements = 16;

static inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

static inline int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }

static inline int64_t greater(int64_t a, int64_t b) { return a > b ? a : b; }

// Of Winograd's algorithm.
static inline int64_t tiles_of(int64_t batch, int64_t height, int64_t width) {
  return batch * divide_up(height, kTileSide) * divide_up(width, kTileSide);
}

// Positions a row takes in a tile's buffer: whole Philox blocks.
static inline int64_t padded(int64_t positions) { return divide_up(positions, 4) * 4; }

static inline int64_t tiles_per_sample(const Tiling& tiling) { return tiling.channel_tiles * tiling.position_tiles; }

// Channels lie next to each other in memory (channels_last).
static inline bool channels_first_in_memory(const Shape& shape, const View& view) {
  return view.data && shape.channels > 1 && shape.positions > 1 && view.channel_stride < view.position_stride;
}

// A sample whose channels follow each other without a gap is one long row, if its noise blocks do too.
static inline bool channels_merge(const Shape& shape, const View& view) {
  return !view.data || shape.channels == 1 || view.channel_stride == shape.positions * view.position_stride;
}

static inline void set_tile_size(const Shape& shape, bool channels_last, Tiling* tiling) {
  int64_t row = padded(shape.positions);
  if (shape.channels * row <= kTileElements) {
    tiling->tile_positions = greater(shape.positions, 1);
    tiling->tile_channels = greater(shape.channels, 1);
    return;
  }
  int64_t wanted = channels_last ? kTileElements / lesser(shape.channels, kLineElements) / 64 * 64 : kTileElements;
  tiling->tile_positions = wanted < shape.positions ? wanted : shape.positions;
  tiling->tile_channels = lesser(shape.channels, kTileElements / padded(tiling->tile_positions));
}

static inline Tiling make_tiling(const Shape& shape, bool channels_last, int64_t noise_rows = 1) {
  Tiling tiling = {};
  tiling.noise_rows = noise_rows;
  int64_t sample = greater(shape.channels * noise_rows * padded(shape.positions / noise_rows), 1);
  set_tile_size(shape, channels_last, &tiling);
  tiling.channel_tiles = divide_up(shape.channels, tiling.tile_channels);
  tiling.position_tiles = divide_up(shape.positions, tiling.tile_positions);
  tiling.samples_per_unit = greater(kTileElements / sample, 1);
  int64_t tiles = tiles_per_sample(tiling);
  tiling.units = tiles > 1 ? shape.batch * tiles : divide_up(shape.batch, tiling.samples_per_unit) * tiles;
  return tiling;
}

// What is drawn for the elements: how many positions a block is for, and whether `close_gaps` takes out what none takes of a row's last
// block.
struct Drawn {
  int64_t block_positions;
  bool closes_gaps;
};

constexpr Drawn kDrawnNumbers = {4, true}, kDrawnWords = {4, false}, kDrawnSigns = {128, false};

// Merges channels where every view and the noise blocks allow it, and cuts the result. Edits the shape in place.
// Short rows are worth closing the gaps between them: one row of vectors instead of many that fill none.
template <int N>
static inline Tiling plan(Shape* shape, const View* const (&views)[N], const Drawn& drawn) {
  bool whole_blocks = shape->positions % drawn.block_positions == 0, channels_last = false;
  bool merge = whole_blocks || (drawn.closes_gaps && shape->channels * padded(shape->positions) <= kTileElements);
  for (const View* view : views) merge = merge && channels_merge(*shape, *view);
  int64_t noise_rows = merge && !whole_blocks ? greater(shape->channels, 1) : 1;  // of no channels: an empty sample
  if (merge) {
    shape->positions *= shape->channels;
    shape->channels = 1;
  }
  for (const View* view : views) channels_last = channels_last || channels_first_in_memory(*shape, *view);
  return make_tiling(*shape, channels_last, noise_rows);
}

}  // namespace fm
