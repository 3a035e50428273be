// How elementwise work is cut into tiles.
#pragma once

#include "../merge.h"
#include "tiling.h"

namespace fm {

// Edits the shape and the views in place.
static inline Tiling plan_elementwise(Shape* shape, const Views& views) {
  merge(shape, views);
  bool rows = views.all([&](const View& v) { return !channels_first_in_memory(*shape, v); });
  return make_tiling(*shape, !rows);
}

}  // namespace fm
