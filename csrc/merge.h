// Elementwise work may walk its tensors in any order: dimensions that all views keep together become one, and runs become long.
#pragma once

#include "tensors.h"

namespace fm {

// Views that are walked together.
struct Views {
  View* const* items;
  int64_t count;

  template <class Test>
  bool all(const Test& test) const {
    for (int64_t i = 0; i < count; ++i)
      if (!test(*items[i])) return false;
    return true;
  }

  template <class Edit>
  void each(const Edit& edit) const {
    for (int64_t i = 0; i < count; ++i) edit(*items[i]);
  }
};

// Channels and positions become one run of positions: contiguous or channels_last memory, if it is the same for all.
static inline void merge_channels(Shape* shape, const Views& views) {
  int64_t channels = shape->channels, positions = shape->positions;
  bool rows = views.all([=](const View& v) { return v.channel_stride == positions * v.position_stride; });
  bool columns = positions == 1 || views.all([=](const View& v) { return v.position_stride == channels * v.channel_stride; });
  if (channels == 1 || (!rows && !columns)) return;
  if (!rows) views.each([](View& v) { v.position_stride = v.channel_stride; });
  shape->positions *= channels;
  shape->channels = 1;
}

// Samples that follow each other without a gap become one.
static inline void merge_batch(Shape* shape, const Views& views) {
  int64_t positions = shape->positions;
  bool runs = positions == 1 || views.all([=](const View& v) { return v.batch_stride == positions * v.position_stride; });
  if (shape->channels != 1 || shape->batch == 1 || !runs) return;
  if (positions == 1) views.each([](View& v) { v.position_stride = v.batch_stride; });
  shape->positions *= shape->batch;
  shape->batch = 1;
}

constexpr int64_t kShortRow = 16;

// Many tiny samples: a position of all of them is a longer run than the positions of one.
static inline void swap_short_positions(Shape* shape, const Views& views) {
  if (shape->channels != 1 || shape->positions >= kShortRow || shape->batch <= shape->positions) return;
  int64_t batch = shape->batch;
  shape->batch = shape->positions;
  shape->positions = batch;
  views.each([](View& v) {
    int64_t stride = v.batch_stride;
    v.batch_stride = v.position_stride;
    v.position_stride = stride;
  });
}

// Edits the shape and the views in place.
static inline void merge(Shape* shape, const Views& views) {
  merge_channels(shape, views);
  merge_batch(shape, views);
  swap_short_positions(shape, views);
}

}  // namespace fm
