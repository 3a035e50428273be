// What attention's kernels of all number formats share: how the rows of a head lie, and the passes over rows of scores.
#pragma once

#include "products.h"
#include "scratch.h"
#include "silu.h"
#include "tiling.h"

namespace fm {
namespace FM_ISA {
namespace {

constexpr int64_t kQueries = 48;  // at a time: a multiple of the rows of all tiles

template <class S>
FM_INLINE void load_row(const S* from, int64_t count, float scale, float* to) {
  for (int64_t d = 0; d < count; d += kWidth<float>) store_whole(to + d, load_whole(from + d) * scale);
}

template <class S>
FM_INLINE void store_row(const float* from, int64_t count, float scale, S* to) {
  for (int64_t d = 0; d < count; d += kWidth<float>) store_whole(to + d, load_whole(from + d) * scale);
}

// The rows of one head: pixel n at data + n * stride.
template <class S>
struct Head {
  S* data;
  int64_t stride;

  FM_METHOD S* row(int64_t n) const { return data + n * stride; }
};

// Part 0 (queries), 1 (keys) or 2 (values) of a joint projection or its gradient; a unit is a head of a sample.
template <class S>
FM_INLINE Head<S> part_of(const AttentionArgs& args, S* joint, int64_t unit, int64_t part) {
  int64_t sample = unit / args.heads, head = unit % args.heads, channels = args.heads * args.features;
  return Head<S>{joint + (sample * args.pixels * 3 + part) * channels + head * args.features, 3 * channels};
}

template <class S>
FM_INLINE Head<S> result_of(const AttentionArgs& args, S* out, int64_t unit) {
  int64_t sample = unit / args.heads, head = unit % args.heads, channels = args.heads * args.features;
  return Head<S>{out + sample * args.pixels * channels + head * args.features, channels};
}

// Calls body(n, how) for the vectors of a row.
template <class Body>
FM_INLINE void over_row(int64_t count, const Body& body) {
  int64_t n = 0;
  for (; n + kWidth<float> <= count; n += kWidth<float>) body(n, Whole{});
  if (n < count) body(n, First{count - n});
}

FM_INLINE float largest(const float* row, int64_t count) {
  Vector<float> most = all(row[0]);
  int64_t n = 0;
  for (; n + kWidth<float> <= count; n += kWidth<float>) {
    Vector<float> scores = load_whole(row + n);
    most = scores > most ? scores : most;
  }
  float value = most[0];
  for (int64_t i = 1; i < kWidth<float>; ++i) value = most[i] > value ? most[i] : value;
  for (; n < count; ++n) value = row[n] > value ? row[n] : value;
  return value;
}

// A row of scores becomes exp(score - level); their sum.
FM_INLINE float exponentials(float* row, int64_t count, float level) {
  Vector<float> sum = {};
  over_row(count, [&](int64_t n, auto how) {
    Vector<float> weight = exponential(load(row + n, how) - level);
    store(row + n, weight, how);
    sum += kept<float>(weight, how);
  });
  return sum_of_lanes<float>(sum);
}

struct Sizes {
  int64_t pixels, features, columns;  // columns: whole vectors of pixels
  int64_t pitch;  // of rows of pixels: an odd number of lines of memory, or those of rows below each other would share a few places in the
                  // cache
  float scale;
};

FM_INLINE Sizes sizes_of(const AttentionArgs& args) {
  int64_t lines = divide_up(args.pixels, kLineElements);
  return Sizes{args.pixels, args.features, lines * kLineElements, (lines | 1) * kLineElements,
               static_cast<float>(1.0 / sqrt(static_cast<double>(args.features)))};
}

template <class S>
FM_INLINE float dot(const S* a, const S* b, int64_t count) {
  Vector<float> sum = {};
  for (int64_t d = 0; d < count; d += kWidth<float>) sum = fused(load_whole(a + d), load_whole(b + d), sum);
  return sum_of_lanes<float>(sum);
}

// ds = p (dp - level) in place of dp.
FM_INLINE void score_gradients(const float* weights, float* gradients, int64_t count, float level) {
  over_row(count, [&](int64_t n, auto how) { store(gradients + n, load(weights + n, how) * (load(gradients + n, how) - level), how); });
}

}  // namespace
}  // namespace FM_ISA
}  // namespace fm
