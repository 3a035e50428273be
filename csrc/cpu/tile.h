// Tiles: which part of a sample is worked on, its noise, and its rows of x1, x0, o as plain runs of the compute type.
#pragma once

#include "convert.h"
#include "draw.h"

namespace fm {
namespace FM_ISA {

// Channels [channel, channel + channels) and positions [position, position + positions) of one sample. Rows of buffers are `pitch` apart.
struct Tile {
  int64_t sample, index, channel, channels, position, positions, pitch;
  int64_t noise_rows = 1;  // as in Tiling
};

// Rows of a tile in the compute type, either in the tensor itself or in a buffer.
template <class T>
struct Rows {
  T* data;
  int64_t pitch;

  T* row(int64_t channel) const { return data + channel * pitch; }
};

FM_INLINE Tile tile_of(const Shape& shape, const Tiling& tiling, int64_t sample, int64_t index) {
  int64_t channel = index / tiling.position_tiles * tiling.tile_channels, position = index % tiling.position_tiles * tiling.tile_positions;
  int64_t channels = lesser(tiling.tile_channels, shape.channels - channel),
          positions = lesser(tiling.tile_positions, shape.positions - position);
  return Tile{sample, index, channel, channels, position, positions, padded(positions), tiling.noise_rows};
}

FM_INLINE int64_t offset_of(const View& view, const Tile& tile) {
  return tile.sample * view.batch_stride + tile.channel * view.channel_stride + tile.position * view.position_stride;
}

template <class T>
FM_INLINE bool usable_in_place(const View& view) {
  return view.dtype == DtypeOf<T>::value && view.position_stride == 1;
}

// --- noise ---------------------------------------------------------------------------------------------------------------------------

// Blocks that a row of a tile touches.
template <class Finish>
FM_INLINE int64_t row_blocks(const Tile& tile) {
  return divide_up(tile.position + tile.positions, Finish::kPositions) - tile.position / Finish::kPositions;
}

// Moves rows of whole blocks together, so that only their positions remain. A row's last block moves whole: what it writes too much lies
// before the next row as drawn, and that row then covers it.
FM_INLINE void close_gaps(float* numbers, int64_t rows, int64_t positions) {
  int64_t pitch = padded(positions);
  for (int64_t row = 1; row < rows; ++row)
    for (int64_t i = 0; i < pitch; i += 4) {
      float block[4];
      __builtin_memcpy(block, numbers + row * pitch + i, sizeof(block));
      __builtin_memcpy(numbers + row * positions + i, block, sizeof(block));
    }
}

// Draws of one whole sample whose channels are merged across gaps.
template <class Finish>
static void draw_rows(const Generator& generator, const Key& key, const Tile& tile, const Ahead& ahead, float* out) {
  int64_t positions = tile.positions / tile.noise_rows;
  fill_run<Finish>(generator, sample_id(key, tile.sample), 0, tile.noise_rows * divide_up(positions, Finish::kPositions), ahead, out);
  close_gaps(out, tile.noise_rows, positions);
}

// Draws of one tile: whole rows are one run of counters, parts of rows one run each.
template <class Finish>
static void draw_tile(const Generator& generator, const Shape& shape, const Key& key, const Tile& tile, const Ahead& ahead, float* out) {
  if (tile.noise_rows > 1) return draw_rows<Finish>(generator, key, tile, ahead, out);
  int64_t blocks = divide_up(shape.positions, Finish::kPositions), row = row_blocks<Finish>(tile);
  int64_t runs = tile.positions == shape.positions ? 1 : tile.channels;
  for (int64_t i = 0; i < runs; ++i) {
    uint32_t block = static_cast<uint32_t>((tile.channel + i) * blocks + tile.position / Finish::kPositions);
    fill_run<Finish>(generator, sample_id(key, tile.sample), block, row * (tile.channels / runs), ahead, out + i * 4 * row);
  }
}

// Blocks of a whole sample.
template <class Finish>
FM_INLINE int64_t sample_blocks(const Shape& shape, const Tiling& tiling) {
  return shape.channels * tiling.noise_rows * divide_up(shape.positions / tiling.noise_rows, Finish::kPositions);
}

// Draws of those of `samples` whole small samples from `first` on that want some, one after the other.
template <class Finish, class Draws>
static void draw_samples(const Generator& generator, const Shape& shape, const Tiling& tiling, const Key& key, int64_t first,
                         int64_t samples, const Draws& draws, float* out) {
  uint32_t ids[kTileElements / 4 + kLineElements], blocks[kTileElements / 4 + kLineElements];
  int64_t each = sample_blocks<Finish>(shape, tiling), count = 0;
  for (int64_t b = first; b < first + samples; ++b) {
    if (!draws(b)) continue;
    for (int64_t i = 0; i < each; ++i, ++count) {
      ids[count] = sample_id(key, b);
      blocks[count] = static_cast<uint32_t>(i);
    }
  }
  for (int64_t i = count; i < count + kLineElements; ++i) ids[i] = blocks[i] = 0;
  fill_listed<Finish>(generator, ids, blocks, count, out);
  if (tiling.noise_rows > 1 && count) close_gaps(out, count / each * tiling.noise_rows, shape.positions / tiling.noise_rows);
}

// --- rows ----------------------------------------------------------------------------------------------------------------------------

// Positions of all channels side by side, as channels_last keeps images, to and from one row a channel.
// kChannels = 0: any number of them.
template <int kChannels, class T>
static void split_channels(const T* packed, const Tile& tile, T* rows) {
  const int64_t channels = kChannels ? kChannels : tile.channels, pitch = tile.pitch;
#pragma GCC ivdep
  for (int64_t p = 0; p < tile.positions; ++p)
    for (int64_t c = 0; c < channels; ++c) rows[c * pitch + p] = packed[p * channels + c];
}

template <int kChannels, class T>
static void join_channels(const T* rows, const Tile& tile, T* packed) {
  const int64_t channels = kChannels ? kChannels : tile.channels, pitch = tile.pitch;
#pragma GCC ivdep
  for (int64_t p = 0; p < tile.positions; ++p)
    for (int64_t c = 0; c < channels; ++c) packed[p * channels + c] = rows[c * pitch + p];
}

FM_INLINE bool row_by_row(const View& view, const Tile& tile) { return view.channel_stride >= view.position_stride || tile.channels == 1; }

FM_INLINE bool is_packed(const View& view, const Tile& tile) { return view.channel_stride == 1 && view.position_stride == tile.channels; }

// Where channels are the faster dimension every line of memory is read once: in one run, or position by position.
template <class T, class S>
static void gather(const View& view, const Tile& tile, T* out) {
  const S* from = static_cast<const S*>(view.data) + offset_of(view, tile);
  if (row_by_row(view, tile)) {
    for (int64_t c = 0; c < tile.channels; ++c)
      load_run<T, S>(from + c * view.channel_stride, view.position_stride, tile.positions, out + c * tile.pitch);
  } else if (is_packed(view, tile)) {
    T packed[kTileElements];
    load_run<T, S>(from, 1, tile.positions * tile.channels, packed);
    tile.channels == 3 ? split_channels<3>(packed, tile, out) : split_channels<0>(packed, tile, out);
  } else {
    for (int64_t p = 0; p < tile.positions; ++p)
      for (int64_t c = 0; c < tile.channels; ++c)
        out[c * tile.pitch + p] = load_as<T>(from[c * view.channel_stride + p * view.position_stride]);
  }
}

template <class T, class S>
static void scatter(const T* rows, const Tile& tile, const View& view) {
  S* to = static_cast<S*>(view.data) + offset_of(view, tile);
  if (row_by_row(view, tile)) {
    for (int64_t c = 0; c < tile.channels; ++c)
      store_run<T, S>(rows + c * tile.pitch, view.position_stride, tile.positions, to + c * view.channel_stride);
  } else if (is_packed(view, tile)) {
    T packed[kTileElements];
    tile.channels == 3 ? join_channels<3>(rows, tile, packed) : join_channels<0>(rows, tile, packed);
    store_run<T, S>(packed, 1, tile.positions * tile.channels, to);
  } else {
    for (int64_t p = 0; p < tile.positions; ++p)
      for (int64_t c = 0; c < tile.channels; ++c)
        store_as(rows[c * tile.pitch + p], to + c * view.channel_stride + p * view.position_stride);
  }
}

template <class T>
static void gather_any(const View& view, const Tile& tile, T* out) {
  switch (view.dtype) {
    case Dtype::float32:
      return gather<T, float>(view, tile, out);
    case Dtype::float64:
      return gather<T, double>(view, tile, out);
    case Dtype::bfloat16:
      return gather<T, Bfloat16>(view, tile, out);
    case Dtype::float16:
      return gather<T, Float16>(view, tile, out);
    case Dtype::uint8:
      return gather<T, uint8_t>(view, tile, out);
    case Dtype::int64:
      return;
  }
}

template <class T>
static void scatter_any(const T* rows, const Tile& tile, const View& view) {
  switch (view.dtype) {
    case Dtype::float32:
      return scatter<T, float>(rows, tile, view);
    case Dtype::float64:
      return scatter<T, double>(rows, tile, view);
    case Dtype::bfloat16:
      return scatter<T, Bfloat16>(rows, tile, view);
    case Dtype::float16:
      return scatter<T, Float16>(rows, tile, view);
    default:
      return;
  }
}

template <class T>
FM_INLINE Rows<const T> read_rows(const View& view, const Tile& tile, T* buffer) {
  if (usable_in_place<T>(view)) return Rows<const T>{static_cast<const T*>(view.data) + offset_of(view, tile), view.channel_stride};
  gather_any<T>(view, tile, buffer);
  return Rows<const T>{buffer, tile.pitch};
}

// Where results go: the tensor itself or a buffer, which `finish_rows` then stores.
template <class T>
FM_INLINE Rows<T> result_rows(const View& view, const Tile& tile, T* buffer) {
  if (usable_in_place<T>(view)) return Rows<T>{static_cast<T*>(view.data) + offset_of(view, tile), view.channel_stride};
  return Rows<T>{buffer, tile.pitch};
}

template <class T>
FM_INLINE void finish_rows(const View& view, const Tile& tile, const T* buffer) {
  if (!usable_in_place<T>(view)) scatter_any<T>(buffer, tile, view);
}

// The one row of a sample that is used in place.
template <class T>
FM_INLINE T* row_of(const View& view, int64_t sample) {
  return static_cast<T*>(view.data) + sample * view.batch_stride;
}

// What is worth fetching early: runs used in place.
template <int N>
FM_INLINE Ahead runs_ahead(const Tile& tile, const View* const (&views)[N]) {
  Ahead ahead = {};
  for (const View* view : views)
    if (tile.channels == 1 && view->data && usable_in_place<float>(*view))
      ahead.runs[ahead.count++] = static_cast<const float*>(view->data) + offset_of(*view, tile);
  return ahead;
}

// --- x1 ------------------------------------------------------------------------------------------------------------------------------

// The tile of a sample mirrored along its last dimension, one piece of each image line at a time.
template <class T>
static void gather_mirrored(const Shape& shape, const View& view, const Tile& tile, T* out) {
  View reversed = view;
  reversed.position_stride = -view.position_stride;
  for (int64_t done = 0; done < tile.positions;) {
    int64_t position = tile.position + done, column = position % shape.width, piece = lesser(shape.width - column, tile.positions - done);
    Tile part = tile;
    part.positions = piece;
    part.position = -(position - column + shape.width - 1 - column);  // times the negated stride: the mirrored position
    gather_any<T>(reversed, part, out + done);
    done += piece;
  }
}

template <class T>
static void map_data(const Shape& shape, const Key& key, const DataTransform& transform, const Tile& tile, T* rows) {
  alignas(64) float u[kTileBuffer];
  int64_t count = tile.channels * tile.pitch;
  if (transform.dequantise)
    draw_tile<ToUniforms>(make_generator(stream_of(key, kStreamDequantise)), shape, key, tile, Ahead{}, u);
  else
    for (int64_t i = 0; i < count; ++i) u[i] = 0.5f;
  T scale = static_cast<T>(2.0 / transform.levels);
  for (int64_t i = 0; i < count; ++i) rows[i] = data_map<T>(rows[i], static_cast<T>(u[i]), scale);
}

template <class T>
FM_INLINE Rows<const T> read_data(const Shape& shape, const View& x1, const Key& key, const DataTransform& transform, const Tile& tile,
                                  T* buffer) {
  bool mirror = transform.flip > 0 && flips(stream_of(key, kStreamFlip), sample_id(key, tile.sample), transform.flip);
  if (!mirror && x1.dtype != Dtype::uint8) return read_rows<T>(x1, tile, buffer);
  if (mirror)
    gather_mirrored<T>(shape, x1, tile, buffer);
  else
    gather_any<T>(x1, tile, buffer);
  if (x1.dtype == Dtype::uint8) map_data<T>(shape, key, transform, tile, buffer);
  return Rows<const T>{buffer, tile.pitch};
}

// --- the walk over units -------------------------------------------------------------------------------------------------------------

const auto nothing_ahead = [](const Tile&) { return Ahead{}; };
const auto always = [](int64_t) { return true; };

// Calls body(tile) for every tile of the units.
template <class Body>
FM_INLINE void walk_tiles(const Shape& shape, const Tiling& tiling, int64_t begin, int64_t end, const Body& body) {
  int64_t tiles = tiles_per_sample(tiling), samples = tiles > 1 ? 1 : tiling.samples_per_unit;
  for (int64_t unit = begin; unit < end; ++unit) {
    int64_t first = unit / tiles * samples, last = lesser(first + samples, shape.batch);
    for (int64_t b = first; b < last; ++b) body(tile_of(shape, tiling, b, unit % tiles));
  }
}

// Calls body(sample, noise) for the small samples of one unit. Their noise is drawn in one go, for full vectors.
template <class Finish, class Draws, class Body>
FM_INLINE void walk_samples(const Generator& generator, const Shape& shape, const Tiling& tiling, const Key& key, const Draws& draws,
                            int64_t unit, float* noise, const Body& body) {
  int64_t first = unit * tiling.samples_per_unit, last = lesser(first + tiling.samples_per_unit, shape.batch);
  int64_t numbers = tiling.noise_rows > 1 ? shape.positions : 4 * sample_blocks<Finish>(shape, tiling);
  draw_samples<Finish>(generator, shape, tiling, key, first, last - first, draws, noise);
  for (int64_t sample = first; sample < last; ++sample) {
    bool drawn = draws(sample);
    body(sample, drawn ? noise : nullptr);
    if (drawn) noise += numbers;
  }
}

// Calls body(tile, noise) for every tile of the units; noise is nullptr for samples without draws(sample).
// ahead(tile) names what the body will touch.
template <class Finish, class Draws, class NextRuns, class Body>
FM_INLINE void for_each_tile(const Shape& shape, const Tiling& tiling, const Key& key, uint32_t purpose, const Draws& draws, int64_t begin,
                             int64_t end, const NextRuns& ahead, const Body& body) {
  alignas(64) float noise[kTileBuffer];
  Generator generator = make_generator(stream_of(key, purpose));
  int64_t tiles = tiles_per_sample(tiling);
  for (int64_t unit = begin; unit < end; ++unit) {
    if (tiles > 1 || tiling.samples_per_unit == 1) {
      Tile tile = tile_of(shape, tiling, unit / tiles, unit % tiles);
      bool drawn = draws(tile.sample);
      if (drawn) draw_tile<Finish>(generator, shape, key, tile, ahead(tile), noise);
      body(tile, drawn ? noise : nullptr);
      continue;
    }
    walk_samples<Finish>(generator, shape, tiling, key, draws, unit, noise,
                         [&](int64_t sample, const float* drawn) { body(tile_of(shape, tiling, sample, 0), drawn); });
  }
}

// The same for small samples of one row each that need no tile: body(sample, noise).
template <class Finish, class Draws, class Body>
FM_INLINE void for_each_row(const Shape& shape, const Tiling& tiling, const Key& key, uint32_t purpose, const Draws& draws, int64_t begin,
                            int64_t end, const Body& body) {
  alignas(64) float noise[kTileBuffer];
  Generator generator = make_generator(stream_of(key, purpose));
  for (int64_t unit = begin; unit < end; ++unit) walk_samples<Finish>(generator, shape, tiling, key, draws, unit, noise, body);
}

// Whether `for_each_row` may stand for `for_each_tile`: every sample is one row that is read and written where it lies.
template <class T, int N>
FM_INLINE bool rows_in_place(const Shape& shape, const Tiling& tiling, const DataTransform& transform, const View* const (&views)[N]) {
  bool result = tiling.samples_per_unit > 1 && shape.channels == 1 && transform.flip <= 0;
  for (const View* view : views) result = result && (!view->data || usable_in_place<T>(*view));
  return result;
}

}  // namespace FM_ISA
}  // namespace fm
