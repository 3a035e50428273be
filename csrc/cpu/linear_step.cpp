// y = a x + sum_j c_j m(k_j): every explicit update of a Runge-Kutta or multistep method, with the mixing of guided velocities.
#include "weighted_sum.h"

namespace fm {
namespace FM_ISA {
namespace {

template <class T>
FM_INLINE void store_copy(const HalvedView& copy, const Tile& tile, const Rows<T>& y) {
  Tile rows = tile;
  rows.pitch = y.pitch;
  scatter_any<T>(y.data, rows, copy.first);
  if (copy.second) scatter_any<T>(y.data, rows, second_half(copy));
}

// Where the sum is to keep the last k. What is not of the compute type goes there now: the sum may end up where that k is.
template <class T>
FM_INLINE Rows<T> kept_rows(const StepArgs& args, const Tile& tile, T* buffer) {
  if (!args.kept.data) return Rows<T>{};
  if (usable_in_place<T>(args.kept)) return result_rows<T>(args.kept, tile, buffer);
  Rows<const T> k = read_rows<T>(args.terms[args.count - 1].k.first, tile, buffer);
  Tile rows = tile;
  rows.pitch = k.pitch;
  scatter_any<T>(k.data, rows, args.kept);
  return Rows<T>{};
}

template <class T>
FM_INLINE void step_tile(const StepArgs& args, const Tile& tile) {
  StepBuffers<T> buffers;
  Rows<T> kept = kept_rows<T>(args, tile, buffers.y);
  Rows<T> y = result_rows<T>(args.out, tile, buffers.y);
  weighted_sum<T>(args, tile, y, kept, &buffers);
  finish_rows<T>(args.out, tile, buffers.y);
  if (args.copy.first.data) store_copy(args.copy, tile, y);
}

// Whether no tensor needs a buffer, so that a tile may be as long as the row.
template <class T>
bool needs_no_buffer(const StepArgs& args) {
  bool direct = args.shape.batch == 1 && args.shape.channels == 1 && !args.copy.first.data && terms_of_pass(args, 0) == args.count;
  direct = direct && usable_in_place<T>(args.out) && usable_in_place<T>(args.x);
  direct = direct && (!args.kept.data || usable_in_place<T>(args.kept));
  for (int64_t i = 0; direct && i < args.count; ++i) direct = usable_in_place<T>(args.terms[i].k.first);
  return direct;
}

template <class T>
void step_units(const StepArgs& args, int64_t begin, int64_t end) {
  if (needs_no_buffer<T>(args)) {
    int64_t position = begin * args.tiling.tile_positions, last = lesser(end * args.tiling.tile_positions, args.shape.positions);
    return step_tile<T>(args, Tile{0, 0, 0, 1, position, last - position, 0});
  }
  walk_tiles(args.shape, args.tiling, begin, end, [&](const Tile& tile) { step_tile<T>(args, tile); });
}

}  // namespace

void linear_step_units(const StepArgs& args, int64_t begin, int64_t end) {
  args.wide ? step_units<double>(args, begin, end) : step_units<float>(args, begin, end);
}

}  // namespace FM_ISA
}  // namespace fm
