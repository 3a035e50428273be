// Small samples side by side: where a sample is one row of at most four numbers, as 2-D toy data are, loops run over samples instead of
// over the few numbers of one. Its noise is one Philox block. The numbers are those of the loops that go sample by sample, to the bit.
#pragma once

#include <type_traits>

#include "tile.h"

namespace fm {
namespace FM_ISA {

constexpr int64_t kAbreast = 64;        // samples in one go
constexpr int64_t kBlockPositions = 4;  // numbers of a block

// One block of numbers for each of `count` <= kAbreast consecutive samples; writes kAbreast blocks at most.
template <class Finish>
FM_INLINE void draw_blocks(const Generator& generator, const Key& key, int64_t first, int64_t count, float* numbers) {
  uint32_t ids[kAbreast] = {}, blocks[kAbreast] = {};
  for (int64_t i = 0; i < count; ++i) ids[i] = sample_id(key, first + i);
  fill_listed<Finish>(generator, ids, blocks, count, numbers);
}

// Whether the samples are such rows, and follow each other without gaps in every tensor.
template <class T, int N>
FM_INLINE bool samples_abreast(const Shape& shape, const Tiling& tiling, const DataTransform& transform, const View* const (&views)[N]) {
  bool result = shape.positions >= 1 && shape.positions <= kBlockPositions && tiling.noise_rows == 1;
  for (const View* view : views) result = result && (!view->data || view->batch_stride == shape.positions);
  return result && rows_in_place<T>(shape, tiling, transform, views);
}

// Calls body(positions, first, count) for the samples of the units, positions being shape.positions as a constant.
template <int kPositions = 1, class Body>
FM_INLINE void for_each_run(const Shape& shape, const Tiling& tiling, int64_t begin, int64_t end, const Body& body) {
  if constexpr (kPositions < kBlockPositions)
    if (shape.positions > kPositions) return for_each_run<kPositions + 1>(shape, tiling, begin, end, body);
  int64_t last = lesser(end * tiling.samples_per_unit, shape.batch);
  for (int64_t first = begin * tiling.samples_per_unit; first < last; first += kAbreast)
    body(std::integral_constant<int, kPositions>{}, first, lesser(kAbreast, last - first));
}

}  // namespace FM_ISA
}  // namespace fm
