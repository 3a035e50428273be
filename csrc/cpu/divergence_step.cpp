// z . (J^T z) of each probe and sample (Hutchinson's estimate of the divergence, paper eq. 34), with the probes z drawn again, not read.
#include "probe.h"

namespace fm {
namespace FM_ISA {
namespace {

constexpr int64_t kSums = kWordSigns;  // sums side by side, of the elements of each bit of a word

// Halves onto halves: the same order for every instruction set.
template <class T>
FM_INLINE T sum_of(T* lanes) {
  for (int64_t half = kSums / 2; half > 0; half /= 2)
    for (int64_t j = 0; j < half; ++j) lanes[j] += lanes[j + half];
  return lanes[0];
}

template <class T>
FM_INLINE T signed_sum(const T* g, const SignWord* words, int64_t count) {
  T lanes[kSums] = {}, rest = 0;
  int64_t i = 0;
  for (; i + kSums <= count; i += kSums, ++words)
    for (int64_t j = 0; j < kSums; ++j) lanes[j] += with_sign(g[i + j], *words, j);
  for (int64_t j = 0; i + j < count; ++j) rest += with_sign(g[i + j], *words, j);
  return count < kSums ? rest : sum_of(lanes) + rest;
}

template <class T>
FM_INLINE T product_sum(const T* g, const float* z, int64_t count) {
  T lanes[kSums] = {}, rest = 0;
  int64_t i = 0;
  for (; i + kSums <= count; i += kSums)
    for (int64_t j = 0; j < kSums; ++j) lanes[j] = multiply_add(g[i + j], static_cast<T>(z[i + j]), lanes[j]);
  for (; i < count; ++i) rest = multiply_add(g[i], static_cast<T>(z[i]), rest);
  return count < kSums ? rest : sum_of(lanes) + rest;
}

// The model was given probes of its own dtype.
template <class S>
FM_INLINE void round_through(float* z, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    S rounded;
    store_as(z[i], &rounded);
    z[i] = widen(rounded);
  }
}

FM_INLINE void round_to(Dtype dtype, float* z, int64_t count) {
  if (dtype == Dtype::bfloat16) round_through<Bfloat16>(z, count);
  if (dtype == Dtype::float16) round_through<Float16>(z, count);
}

FM_INLINE void put_sum(const DivergenceArgs& args, int64_t probe, const Tile& tile, double sum) {
  const ProbeArgs& probes = args.probes;
  args.partial[(probe * probes.shape.batch + tile.sample) * tiles_per_sample(probes.tiling) + tile.index] = sum;
}

template <class T>
void sign_dots(const DivergenceArgs& args, int64_t begin, int64_t end) {
  for_each_sign_tile(args.probes, begin, end, [&](int64_t probe, const View& g, const Tile& tile, const SignWord* words) {
    alignas(64) T buffer[kTileBuffer];
    Rows<const T> rows = read_rows<T>(g, tile, buffer);
    double sum = 0;
    for (int64_t c = 0; c < tile.channels; ++c)
      sum += static_cast<double>(signed_sum(rows.row(c), row_words(words, tile, c), tile.positions));
    put_sum(args, probe, tile, sum);
  });
}

template <class T>
FM_INLINE double normal_dot(const View& g, const Tile& tile, const float* noise) {
  alignas(64) T buffer[kTileBuffer];
  alignas(64) float z[kTileBuffer];
  Rows<const T> rows = read_rows<T>(g, tile, buffer);
  double sum = 0;
  for (int64_t c = 0; c < tile.channels; ++c) {
    __builtin_memcpy(z, noise + c * tile.pitch, static_cast<size_t>(tile.positions) * sizeof(float));
    round_to(g.dtype, z, tile.positions);
    sum += static_cast<double>(product_sum(rows.row(c), z, tile.positions));
  }
  return sum;
}

template <class T>
void normal_dots(const DivergenceArgs& args, int64_t begin, int64_t end) {
  const ProbeArgs& probes = args.probes;
  for_each_probe(probes, begin, end, [&](int64_t probe, const View& g, int64_t first, int64_t last) {
    for_each_tile<ToNormals>(
        probes.shape, probes.tiling, probes.key, probe_tag(probes, probe), always, first, last,
        [&](const Tile& tile) { return runs_ahead(tile, {&g}); },
        [&](const Tile& tile, const float* noise) { put_sum(args, probe, tile, normal_dot<T>(g, tile, noise)); });
  });
}

template <class T>
void dots(const DivergenceArgs& args, int64_t begin, int64_t end) {
  args.normals ? normal_dots<T>(args, begin, end) : sign_dots<T>(args, begin, end);
}

}  // namespace

void divergence_step_units(const DivergenceArgs& args, int64_t begin, int64_t end) {
  args.probes.view.dtype == Dtype::float64 ? dots<double>(args, begin, end) : dots<float>(args, begin, end);
}

}  // namespace FM_ISA
}  // namespace fm
