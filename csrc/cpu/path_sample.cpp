// x_t = a x1 + s x0 (paper eq. 11; OT: eq. 22), with x0 read or drawn, tile by tile.
#include "../loss.h"
#include "abreast.h"

namespace fm {
namespace FM_ISA {
namespace {

// alpha_t and sigma_t of a sample.
template <class T>
struct Mix {
  T a, s;
};

template <class T>
FM_INLINE Mix<T> mix_of(const SampleArgs& args, int64_t sample) {
  return Mix<T>{static_cast<T>(coefficient_at(args.coefficients, args.coefficient_dtype, sample, kA)),
                static_cast<T>(coefficient_at(args.coefficients, args.coefficient_dtype, sample, kS))};
}

template <class T, class X0>
FM_INLINE void mix_row(const Mix<T>& mix, const T* __restrict x1, const X0* __restrict x0, T* __restrict x_t, int64_t count) {
  for (int64_t i = 0; i < count; ++i) x_t[i] = interpolate<T>(mix.a, x1[i], mix.s, static_cast<T>(x0[i]));
}

template <class T>
FM_INLINE void sample_tile(const SampleArgs& args, const Tile& tile, const float* noise) {
  alignas(64) T x1_buffer[kTileBuffer], x0_buffer[kTileBuffer], x_t_buffer[kTileBuffer];
  Mix<T> mix = mix_of<T>(args, tile.sample);
  Rows<const T> x1 = read_data<T>(args.shape, args.x1, args.key, args.transform, tile, x1_buffer);
  Rows<T> x_t = result_rows<T>(args.x_t, tile, x_t_buffer);
  Rows<const T> x0 = args.x0.data ? read_rows<T>(args.x0, tile, x0_buffer) : Rows<const T>{nullptr, 0};
  for (int64_t c = 0; c < tile.channels; ++c) {
    if (args.x0.data)
      mix_row(mix, x1.row(c), x0.row(c), x_t.row(c), tile.positions);
    else
      mix_row(mix, x1.row(c), noise + c * tile.pitch, x_t.row(c), tile.positions);
  }
  finish_rows<T>(args.x_t, tile, x_t_buffer);
}

template <class T>
FM_INLINE void sample_row(const SampleArgs& args, int64_t sample, const float* noise) {
  Mix<T> mix = mix_of<T>(args, sample);
  const T* x1 = row_of<const T>(args.x1, sample);
  T* x_t = row_of<T>(args.x_t, sample);
  if (noise)
    mix_row(mix, x1, noise, x_t, args.shape.positions);
  else
    mix_row(mix, x1, row_of<const T>(args.x0, sample), x_t, args.shape.positions);
}

// x0: kStride numbers a sample.
template <int kPositions, int kStride, class T, class X0>
FM_INLINE void mix_samples(const T* __restrict rows, const T* __restrict x1, const X0* __restrict x0, T* __restrict x_t, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    for (int64_t p = 0; p < kPositions; ++p)
      x_t[i * kPositions + p] =
          interpolate<T>(rows[kColumns * i + kA], x1[i * kPositions + p], rows[kColumns * i + kS], static_cast<T>(x0[i * kStride + p]));
}

template <class T>
void sample_units_abreast(const SampleArgs& args, int64_t begin, int64_t end) {
  alignas(64) float noise[kBlockPositions * kAbreast];
  Generator generator = make_generator(stream_of(args.key, kStreamX0));
  for_each_run(args.shape, args.tiling, begin, end, [&](auto positions, int64_t first, int64_t count) {
    const T *rows = static_cast<const T*>(args.coefficients) + kColumns * first, *x1 = row_of<const T>(args.x1, first);
    T* x_t = row_of<T>(args.x_t, first);
    if (args.x0.data) return mix_samples<positions, positions>(rows, x1, row_of<const T>(args.x0, first), x_t, count);
    draw_blocks<ToNormals>(generator, args.key, first, count, noise);
    mix_samples<positions, kBlockPositions>(rows, x1, noise, x_t, count);
  });
}

template <class T>
void sample_units(const SampleArgs& args, int64_t begin, int64_t end) {
  if (args.coefficient_dtype == DtypeOf<T>::value &&
      samples_abreast<T>(args.shape, args.tiling, args.transform, {&args.x1, &args.x0, &args.x_t}))
    return sample_units_abreast<T>(args, begin, end);
  const auto draws = [&](int64_t) { return args.x0.data == nullptr; };
  if (rows_in_place<T>(args.shape, args.tiling, args.transform, {&args.x1, &args.x0, &args.x_t}))
    return for_each_row<ToNormals>(args.shape, args.tiling, args.key, kStreamX0, draws, begin, end,
                                   [&](int64_t sample, const float* noise) { sample_row<T>(args, sample, noise); });
  for_each_tile<ToNormals>(
      args.shape, args.tiling, args.key, kStreamX0, draws, begin, end,
      [&](const Tile& tile) { return runs_ahead(tile, {&args.x1, &args.x_t}); },
      [&](const Tile& tile, const float* noise) { sample_tile<T>(args, tile, noise); });
}

}  // namespace

void path_sample_units(const SampleArgs& args, int64_t begin, int64_t end) {
  args.wide ? sample_units<double>(args, begin, end) : sample_units<float>(args, begin, end);
}

}  // namespace FM_ISA
}  // namespace fm
