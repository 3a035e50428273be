// How work without noise is cut into tiles. The functions edit the shape and the views in place.
#pragma once

#include "../merge.h"
#include "tiling.h"

namespace fm {

static inline Tiling tiling_of(const Shape& shape, const Views& views) {
  bool rows = views.all([&](const View& v) { return !channels_first_in_memory(shape, v); });
  return make_tiling(shape, !rows);
}

static inline Tiling plan_elementwise(Shape* shape, const Views& views) {
  merge(shape, views);
  return tiling_of(*shape, views);
}

// Of sums over samples, which have no logical order either.
static inline Tiling plan_samples(Shape* shape, const Views& views) {
  merge_channels(shape, views);
  return tiling_of(*shape, views);
}

}  // namespace fm
