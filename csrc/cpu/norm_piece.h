// Pieces of a group_norm_silu unit: some channels of one input and some positions, as lines of lanes, in place wherever memory allows.
// Lines are what the tensor's layout makes runs of: the positions of a channel, or the channels of a position (channels_last).
#pragma once

#include "scratch.h"
#include "tile.h"
#include "vector.h"

namespace fm {
namespace FM_ISA {

constexpr int64_t kPieceElements = 2048;
constexpr int64_t kPieceChannels = 64;                 // of a channels_last piece, at most
constexpr int64_t kMostChannels = kPieceElements / 4;  // of any piece
constexpr int64_t kInlineChannels = 512;               // of a unit, whose numbers need no memory of the heap

// The groups of a unit and their channels.
struct NormUnit {
  int64_t sample, group, groups, channel, channels;
};

FM_INLINE NormUnit norm_unit(const NormArgs& args, int64_t unit) {
  int64_t each = divide_up(args.groups, args.unit_groups), group = unit % each * args.unit_groups;
  int64_t groups = lesser(args.unit_groups, args.groups - group), width = args.shape.channels / args.groups;
  return NormUnit{unit / each, group, groups, group * width, groups * width};
}

// An input and the channels it holds, out of all channels.
struct Input {
  View view;
  int64_t first, last;
};

// channels, positions: the piece's; `tile` has what the generators need.
struct Piece {
  Tile tile;
  int64_t first;  // channel of the input that the piece lies in
  bool columns;   // a line is a position

  int64_t lines() const { return columns ? tile.positions : tile.channels; }
  int64_t width() const { return columns ? tile.channels : tile.positions; }
  int64_t elements() const { return tile.channels * tile.positions; }
};

FM_INLINE bool in_columns(const View& view, int64_t channels, int64_t positions) {
  return positions == 1 || (channels > 1 && view.channel_stride < view.position_stride);
}

template <class Body>
FM_INLINE void for_each_piece_of(const Shape& shape, const NormUnit& unit, const Input& input, const Body& body) {
  int64_t begin = greater(unit.channel, input.first), end = lesser(unit.channel + unit.channels, input.last);
  bool columns = in_columns(input.view, input.last - input.first, shape.positions);
  int64_t row = padded(lesser(shape.positions, kPieceElements));
  int64_t most = columns ? kPieceChannels : kPieceElements / row;
  for (int64_t c = begin; c < end; c += most) {
    int64_t channels = lesser(most, end - c), positions = kPieceElements / channels / 4 * 4;
    for (int64_t p = 0; p < shape.positions; p += positions) {
      int64_t count = lesser(positions, shape.positions - p);
      body(Piece{Tile{unit.sample, 0, c, channels, p, count, padded(count)}, input.first, columns});
    }
  }
}

// Calls body(piece, view) for all pieces of the unit in both inputs: of one run of channels all positions, then of the next.
template <class Body>
FM_INLINE void for_each_piece(const NormArgs& args, const NormUnit& unit, const Body& body) {
  const Input inputs[2] = {{args.x, 0, args.first_channels}, {args.second, args.first_channels, args.shape.channels}};
  for (int i = 0; i < (args.second.data ? 2 : 1); ++i)
    for_each_piece_of(args.shape, unit, inputs[i], [&](const Piece& piece) { body(piece, inputs[i].view); });
}

// --- blocks --------------------------------------------------------------------------------------------------------------------------

// Lines of lanes next to each other.
template <class S>
struct Block {
  S* data;
  int64_t pitch;

  FM_METHOD S* at(int64_t line, int64_t lane) const { return data + line * pitch + lane; }
};

struct Steps {
  int64_t offset, line, lane;  // element strides
};

FM_INLINE Steps steps_of(const View& view, const Piece& piece, int64_t first_channel) {
  const Tile& tile = piece.tile;
  int64_t offset =
      tile.sample * view.batch_stride + (tile.channel - first_channel) * view.channel_stride + tile.position * view.position_stride;
  return piece.columns ? Steps{offset, view.position_stride, view.channel_stride}
                       : Steps{offset, view.channel_stride, view.position_stride};
}

FM_INLINE bool in_place(const Steps& steps, const Piece& piece) { return steps.lane == 1 || piece.width() == 1; }

// Calls body(line, lane) for all elements in the order of their memory.
template <class Body>
FM_INLINE void in_memory_order(const Steps& steps, const Piece& piece, const Body& body) {
  if (steps.line < steps.lane) {
    for (int64_t lane = 0; lane < piece.width(); ++lane)
      for (int64_t line = 0; line < piece.lines(); ++line) body(line, lane);
  } else {
    for (int64_t line = 0; line < piece.lines(); ++line)
      for (int64_t lane = 0; lane < piece.width(); ++lane) body(line, lane);
  }
}

// The piece of a tensor whose channel 0 is channel `first_channel` of all.
template <class S>
static Block<const S> input_block(const View& view, const Piece& piece, int64_t first_channel, S* buffer) {
  Steps steps = steps_of(view, piece, first_channel);
  const S* from = static_cast<const S*>(view.data) + steps.offset;
  if (in_place(steps, piece)) return Block<const S>{from, steps.line};
  in_memory_order(steps, piece,
                  [&](int64_t line, int64_t lane) { buffer[line * piece.width() + lane] = from[line * steps.line + lane * steps.lane]; });
  return Block<const S>{buffer, piece.width()};
}

// Where results go: the tensor itself or the buffer, which `finish_block` then stores.
template <class S>
FM_INLINE Block<S> output_block(const View& view, const Piece& piece, int64_t first_channel, S* buffer) {
  Steps steps = steps_of(view, piece, first_channel);
  if (in_place(steps, piece)) return Block<S>{static_cast<S*>(view.data) + steps.offset, steps.line};
  return Block<S>{buffer, piece.width()};
}

template <class S>
static void finish_block(const View& view, const Piece& piece, int64_t first_channel, const S* buffer) {
  Steps steps = steps_of(view, piece, first_channel);
  if (in_place(steps, piece)) return;
  S* to = static_cast<S*>(view.data) + steps.offset;
  in_memory_order(steps, piece,
                  [&](int64_t line, int64_t lane) { to[line * steps.line + lane * steps.lane] = buffer[line * piece.width() + lane]; });
}

// --- dropout -------------------------------------------------------------------------------------------------------------------------

// The factors of a piece: 0 where a uniform is below the probability, else 1 / (1 - probability).
template <class T>
class Mask {
 public:
  explicit Mask(const NormArgs& args)
      : args_(args), probability_(static_cast<float>(args.dropout)), factor_(static_cast<float>(1.0 / (1.0 - args.dropout))) {
    if (args.dropout > 0) generator_ = make_generator(stream_of(args.key, args.purpose));
  }

  // Not inlined: the generator's code once a compute type is enough.
  __attribute__((noinline)) Block<const T> of(const Piece& piece) {
    if (args_.dropout == 0) return Block<const T>{nullptr, 0};
    const Tile& tile = piece.tile;
    draw_tile<ToUniforms>(generator_, args_.shape, args_.key, tile, Ahead{}, uniforms_);
    int64_t line = piece.columns ? 1 : tile.pitch, lane = piece.columns ? tile.pitch : 1, width = piece.width();
    for (int64_t i = 0; i < piece.lines(); ++i)
      for (int64_t j = 0; j < width; ++j) factors_[i * width + j] = uniforms_[i * line + j * lane] < probability_ ? T(0) : T(factor_);
    return Block<const T>{factors_, width};
  }

 private:
  const NormArgs& args_;
  float probability_, factor_;
  Generator generator_;
  alignas(64) float uniforms_[kPieceElements + 64];
  alignas(64) T factors_[kPieceElements];
};

// --- loops over a block --------------------------------------------------------------------------------------------------------------

// Where in an array of numbers a channel those of a vector lie: side by side, or one for all lanes.
template <class How>
struct Lanes {
  int64_t lane;
  How how;
};
struct Line {
  int64_t line;
};

template <class T, class How>
FM_INLINE Vector<T> per_channel(const T* values, Lanes<How> place) {
  return load(values + place.lane, place.how);
}
template <class T>
FM_INLINE Vector<T> per_channel(const T* values, Line place) {
  return all(values[place.line]);
}

// Sums over a block's positions.
template <class T, class How>
FM_INLINE void store_sum(T* sums, Lanes<How> place, Vector<T> sum) {
  store(sums + place.lane, sum, place.how);
}
template <class T>
FM_INLINE void store_sum(T* sums, Line place, Vector<T> sum) {
  sums[place.line] = sum_of_lanes<T>(sum);
}

// A kernel is begun at some channels, stepped over their positions, with accumulators k < kAbreast in turn, and ended.
template <class Kernel, class How>
FM_INLINE void run_column(const Kernel& kernel, int64_t lines, int64_t lane, How how) {
  auto registers = kernel.begin(Lanes<How>{lane, how});
  int64_t line = 0;
  for (; line + Kernel::kAbreast <= lines; line += Kernel::kAbreast)
    for (int k = 0; k < Kernel::kAbreast; ++k) kernel.step(&registers, k, line + k, lane, how);
  for (; line < lines; ++line) kernel.step(&registers, 0, line, lane, how);
  kernel.end(registers, Lanes<How>{lane, how});
}

template <class T, class Kernel>
FM_INLINE void run_line(const Kernel& kernel, int64_t line, int64_t width) {
  constexpr int64_t kStride = kWidth<T> * Kernel::kAbreast;
  auto registers = kernel.begin(Line{line});
  int64_t lane = 0;
  for (; lane + kStride <= width; lane += kStride)
    for (int k = 0; k < Kernel::kAbreast; ++k) kernel.step(&registers, k, line, lane + k * kWidth<T>, Whole{});
  for (; lane + kWidth<T> <= width; lane += kWidth<T>) kernel.step(&registers, 0, line, lane, Whole{});
  if (lane < width) kernel.step(&registers, 0, line, lane, First{width - lane});
  kernel.end(registers, Line{line});
}

template <class T, class Kernel>
FM_INLINE void run(const Kernel& kernel, const Piece& piece) {
  int64_t lines = piece.lines(), width = piece.width(), lane = 0;
  if (!piece.columns) {
    for (int64_t line = 0; line < lines; ++line) run_line<T>(kernel, line, width);
    return;
  }
  for (; lane + kWidth<T> <= width; lane += kWidth<T>) run_column(kernel, lines, lane, Whole{});
  if (lane < width) run_column(kernel, lines, lane, First{width - lane});
}

template <class T, int N>
FM_INLINE Vector<T> sum_of_vectors(const Vector<T> (&sums)[N]) {
  Vector<T> sum = sums[0];
  for (int i = 1; i < N; ++i) sum += sums[i];
  return sum;
}

}  // namespace FM_ISA
}  // namespace fm
