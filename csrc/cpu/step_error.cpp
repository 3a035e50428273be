// The error of a step beside what is tolerated: of each sample the sum of (e / (atol + rtol max(|y|, |end|)))^2, e = sum_j c_j k_j
// (Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, equations II.4.10 and II.4.11).
#include "../step_error.h"
#include "weighted_sum.h"

namespace fm {
namespace FM_ISA {
namespace {

// Errors become the squares of their ratios to what is tolerated.
template <class T>
FM_INLINE void square_ratios(const T* y, const T* end, T rtol, T atol, int64_t count, T* errors) {
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) errors[i] = square_of_ratio(errors[i], y[i], end[i], rtol, atol);
}

// Sixteen sums side by side: the compiler makes vectors of them, and their order is the same for every instruction set.
template <class T>
FM_INLINE double sum_of(const T* values, int64_t count) {
  int64_t whole = count / kLineElements * kLineElements;
  T sum = 0;
  for (int64_t i = whole; i < count; ++i) sum += values[i];
  if (whole == 0) return static_cast<double>(sum);
  T lanes[kLineElements] = {};
  for (int64_t i = 0; i < whole; i += kLineElements)
    for (int64_t j = 0; j < kLineElements; ++j) lanes[j] += values[i + j];
  for (T lane : lanes) sum += lane;
  return static_cast<double>(sum);
}

// The squares of a tile, in rows of `squares` that are tile.pitch apart.
template <class T>
FM_INLINE void squares_of(const ErrorArgs& args, const Tile& tile, T* squares) {
  StepBuffers<T> buffers;
  weighted_sum<T>(args.error, tile, Rows<T>{squares, tile.pitch}, Rows<T>{}, &buffers);
  Rows<const T> y = read_rows<T>(args.y, tile, buffers.x), end = read_rows<T>(args.end, tile, buffers.y);
  T rtol = static_cast<T>(args.rtol), atol = static_cast<T>(args.atol);
  for (int64_t c = 0; c < tile.channels; ++c) square_ratios(y.row(c), end.row(c), rtol, atol, tile.positions, squares + c * tile.pitch);
}

template <class T>
FM_INLINE void error_tile(const ErrorArgs& args, const Tile& tile) {
  alignas(64) T squares[kTileBuffer];
  squares_of<T>(args, tile, squares);
  double sum = 0;
  for (int64_t c = 0; c < tile.channels; ++c) sum += sum_of(squares + c * tile.pitch, tile.positions);
  args.partial[tile.sample * tiles_per_sample(args.error.tiling) + tile.index] = sum;
}

// Small samples that follow each other without a gap, as one row.
template <class T>
FM_INLINE void error_run(const ErrorArgs& args, int64_t first, int64_t samples) {
  alignas(64) T squares[kTileBuffer];
  int64_t positions = args.error.shape.positions;
  squares_of<T>(args, Tile{first, 0, 0, 1, 0, samples * positions, 0}, squares);
  for (int64_t i = 0; i < samples; ++i) args.partial[first + i] = sum_of(squares + i * positions, positions);
}

template <class T>
FM_INLINE bool in_runs(const ErrorArgs& args) {
  const StepArgs& error = args.error;
  const auto follows = [&](const View& view) { return usable_in_place<T>(view) && view.batch_stride == error.shape.positions; };
  bool result = error.tiling.samples_per_unit > 1 && error.shape.channels == 1 && follows(args.y) && follows(args.end);
  result = result && follows(error.x);
  for (int64_t j = 0; result && j < error.count; ++j) result = follows(error.terms[j].k.first);
  return result;
}

template <class T>
void error_units(const ErrorArgs& args, int64_t begin, int64_t end) {
  const StepArgs& error = args.error;
  if (!in_runs<T>(args)) return walk_tiles(error.shape, error.tiling, begin, end, [&](const Tile& tile) { error_tile<T>(args, tile); });
  int64_t each = error.tiling.samples_per_unit, last = lesser(end * each, error.shape.batch);
  for (int64_t first = begin * each; first < last; first += each) error_run<T>(args, first, lesser(each, last - first));
}

}  // namespace

void step_error_units(const ErrorArgs& args, int64_t begin, int64_t end) {
  args.error.wide ? error_units<double>(args, begin, end) : error_units<float>(args, begin, end);
}

}  // namespace FM_ISA
}  // namespace fm
