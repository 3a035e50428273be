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

// Channels and points become points: contiguous or channels_last memory, if it is the same for all.
static inline void merge_channels(Shape* shape, const Views& views) {
  int64_t channels = shape->channels, points = shape->points;
  bool rows = views.all([=](const View& v) { return v.channel_stride == points * v.point_stride; });
  bool columns = points == 1 || views.all([=](const View& v) { return v.point_stride == channels * v.channel_stride; });
  if (channels == 1 || (!rows && !columns)) return;
  if (!rows) views.each([](View& v) { v.point_stride = v.channel_stride; });
  shape->points *= channels;
  shape->channels = 1;
}

// Samples that follow each other without a gap become one.
static inline void merge_batch(Shape* shape, const Views& views) {
  int64_t points = shape->points;
  bool runs = points == 1 || views.all([=](const View& v) { return v.batch_stride == points * v.point_stride; });
  if (shape->channels != 1 || shape->batch == 1 || !runs) return;
  if (points == 1) views.each([](View& v) { v.point_stride = v.batch_stride; });
  shape->points *= shape->batch;
  shape->batch = 1;
}

constexpr int64_t kShortRow = 16;

// Many tiny samples: a point of all of them is a longer run than the points of one.
static inline void swap_short_points(Shape* shape, const Views& views) {
  if (shape->channels != 1 || shape->points >= kShortRow || shape->batch <= shape->points) return;
  int64_t batch = shape->batch;
  shape->batch = shape->points;
  shape->points = batch;
  views.each([](View& v) {
    int64_t stride = v.batch_stride;
    v.batch_stride = v.point_stride;
    v.point_stride = stride;
  });
}

// Edits the shape and the views in place.
static inline void merge(Shape* shape, const Views& views) {
  merge_channels(shape, views);
  merge_batch(shape, views);
  swap_short_points(shape, views);
}

}  // namespace fm
