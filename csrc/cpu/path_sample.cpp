// x_t = a x1 + s x0, with x0 read or drawn (paper eq. 20 for OT, 11 in general), tile by tile.
#include "../loss.h"
#include "tile.h"

namespace fm {
namespace FM_ISA {
namespace {

template <class T, class X0>
FM_INLINE void mix_row(T a, const T* __restrict x1, T s, const X0* __restrict x0, T* __restrict x_t, int64_t count) {
  for (int64_t i = 0; i < count; ++i) x_t[i] = interpolate<T>(a, x1[i], s, static_cast<T>(x0[i]));
}

template <class T>
FM_INLINE void sample_tile(const SampleArgs& args, const Tile& tile, const float* noise) {
  alignas(64) T x1_buffer[kTileBuffer], x0_buffer[kTileBuffer], x_t_buffer[kTileBuffer];
  T a = static_cast<T>(number_at(args.coefficients, args.coefficient_dtype, tile.sample * 6));
  T s = static_cast<T>(number_at(args.coefficients, args.coefficient_dtype, tile.sample * 6 + 1));
  Rows<const T> x1 = read_data<T>(args.shape, args.x1, args.key, args.transform, tile, x1_buffer);
  Rows<T> x_t = result_rows<T>(args.x_t, tile, x_t_buffer);
  Rows<const T> x0 = args.x0.data ? read_rows<T>(args.x0, tile, x0_buffer) : Rows<const T>{nullptr, 0};
  for (int64_t c = 0; c < tile.channels; ++c) {
    if (args.x0.data)
      mix_row(a, x1.row(c), s, x0.row(c), x_t.row(c), tile.points);
    else
      mix_row(a, x1.row(c), s, noise + c * tile.pitch, x_t.row(c), tile.points);
  }
  finish_rows<T>(args.x_t, tile, x_t_buffer);
}

template <class T>
void sample_units(const SampleArgs& args, int64_t begin, int64_t end) {
  for_each_tile<ToNormals>(
      args.shape, args.tiling, args.key, kStreamX0, [&](int64_t) { return args.x0.data == nullptr; }, begin, end,
      [&](const Tile& tile) { return runs_ahead(tile, {&args.x1, &args.x_t}); },
      [&](const Tile& tile, const float* noise) { sample_tile<T>(args, tile, noise); });
}

}  // namespace

void path_sample_units(const SampleArgs& args, int64_t begin, int64_t end) {
  args.wide ? sample_units<double>(args, begin, end) : sample_units<float>(args, begin, end);
}

}  // namespace FM_ISA
}  // namespace fm
