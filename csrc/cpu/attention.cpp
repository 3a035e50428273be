// Self-attention of the pixels of an image, head by head, from a joint projection [B, N, 3, H, D] of queries, keys and values:
//   s = q k' / sqrt(D)    p = exp(s - l) with l = log sum exp s of each query    o = p v
// and its gradients, with dp = do v' and ds = p (dp - sum_d do o):
//   dq = ds k / sqrt(D)    dk = ds' q / sqrt(D)    dv = p' do
// Weights of some queries at a time are made in the cache, and made again for the gradients: they are never stored.
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

template <class S>
FM_INLINE Head<const S> part_of(const AttentionArgs& args, const void* joint, int64_t unit, int64_t part) {
  int64_t sample = unit / args.heads, head = unit % args.heads, channels = args.heads * args.features;
  return Head<const S>{static_cast<const S*>(joint) + (sample * args.pixels * 3 + part) * channels + head * args.features, 3 * channels};
}

template <class S>
FM_INLINE Head<const S> result_of(const AttentionArgs& args, const void* out, int64_t unit) {
  int64_t sample = unit / args.heads, head = unit % args.heads, channels = args.heads * args.features;
  return Head<const S>{static_cast<const S*>(out) + sample * args.pixels * channels + head * args.features, channels};
}

template <class S>
FM_INLINE Head<S> writable(const Head<const S>& head) {
  return Head<S>{const_cast<S*>(head.data), head.stride};
}

// Float32 rows as they lie; others are converted into the buffer.
FM_INLINE Right rows_of(const Head<const float>& head, int64_t, int64_t, float*) { return Right{head.data, head.stride}; }
template <class S>
FM_INLINE Right rows_of(const Head<const S>& head, int64_t rows, int64_t features, float* buffer) {
  for (int64_t n = 0; n < rows; ++n) load_row(head.row(n), features, 1.0f, buffer + n * features);
  return Right{buffer, features};
}

// to [D, pitch]: column n is row n.
template <class S>
FM_INLINE void transpose(const Head<const S>& head, int64_t rows, int64_t features, int64_t pitch, float* to) {
  float line[kWidth<float>];
  for (int64_t d = 0; d < features; d += kWidth<float>)
    for (int64_t n = 0; n < rows; ++n) {
      store_whole(line, load_whole(head.row(n) + d));
      for (int64_t i = 0; i < kWidth<float>; ++i) to[(d + i) * pitch + n] = line[i];
    }
  for (int64_t d = 0; d < features; ++d)
    for (int64_t n = rows; n < pitch; ++n) to[d * pitch + n] = 0.0f;
}

// Calls body(n, how) for the vectors of a row.
template <class Body>
FM_INLINE void over_row(int64_t count, const Body& body) {
  int64_t n = 0;
  for (; n + kWidth<float> <= count; n += kWidth<float>) body(n, Whole{});
  if (n < count) body(n, First{count - n});
}

// Of rows that begin on whole vectors and are as long as one or longer; the lanes beyond `count` hold nothing that counts.
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
  int64_t pixels, features, pitch;  // pitch: of rows of weights, whole lines of memory
  float scale;
};

FM_INLINE Sizes sizes_of(const AttentionArgs& args) {
  return Sizes{args.pixels, args.features, divide_up(args.pixels, kLineElements) * kLineElements,
               static_cast<float>(1.0 / sqrt(static_cast<double>(args.features)))};
}

// The scores of some queries, which are scaled on the way: scores [rows, pitch].
template <class S>
FM_INLINE void score(const Sizes& n, const Head<const S>& query, int64_t first, int64_t rows, const float* keys, float* queries,
                     float* scores) {
  for (int64_t i = 0; i < rows; ++i) load_row(query.row(first + i), n.features, n.scale, queries + i * n.features);
  multiply<false>(Left{queries, n.features, 1}, Right{keys, n.pitch}, n.features, rows, n.pitch, Result{scores, n.pitch});
}

// --- forward -------------------------------------------------------------------------------------------------------------------------

template <class S>
void attend(const AttentionArgs& args, int64_t begin, int64_t end) {
  Sizes n = sizes_of(args);
  int64_t chunks = divide_up(n.pixels, kAttentionQueries), matrix = n.features * n.pitch, block = kQueries * n.features;
  Scratch<float, 16> memory(2 * matrix + 2 * block + kQueries * n.pitch);
  float *keys = memory.data(), *values = keys + matrix, *queries = values + matrix, *sums = queries + block, *scores = sums + block;
  for (int64_t i = begin; i < end; ++i) {
    int64_t unit = i / chunks, from = i % chunks * kAttentionQueries, to = lesser(from + kAttentionQueries, n.pixels);
    transpose(part_of<S>(args, args.joint, unit, 1), n.pixels, n.features, n.pitch, keys);
    Right value = rows_of(part_of<S>(args, args.joint, unit, 2), n.pixels, n.features, values);
    Head<S> out = writable(result_of<S>(args, args.out, unit));
    for (int64_t first = from; first < to; first += kQueries) {
      int64_t rows = lesser(kQueries, to - first);
      score(n, part_of<S>(args, args.joint, unit, 0), first, rows, keys, queries, scores);
      float factors[kQueries];
      for (int64_t r = 0; r < rows; ++r) {
        float level = largest(scores + r * n.pitch, n.pixels), sum = exponentials(scores + r * n.pitch, n.pixels, level);
        factors[r] = 1.0f / sum;
        args.log_sums[unit * n.pixels + first + r] = level + logf(sum);
      }
      multiply<false>(Left{scores, n.pitch, 1}, value, n.pixels, rows, n.features, Result{sums, n.features});
      for (int64_t r = 0; r < rows; ++r) store_row(sums + r * n.features, n.features, factors[r], out.row(first + r));
    }
  }
}

// --- gradients -----------------------------------------------------------------------------------------------------------------------

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

template <class S>
void differentiate(const AttentionArgs& args, int64_t begin, int64_t end) {
  Sizes n = sizes_of(args);
  int64_t matrix = n.features * n.pitch, block = kQueries * n.features;
  Scratch<float, 16> memory(5 * matrix + 3 * block + 2 * kQueries * n.pitch);
  float *keys = memory.data(), *values = keys + matrix, *key_rows = values + matrix;
  float *grad_keys = key_rows + matrix, *grad_values = grad_keys + matrix;
  float *queries = grad_values + matrix, *gradients = queries + block, *sums = gradients + block;
  float *weights = sums + block, *grad_scores = weights + kQueries * n.pitch;
  for (int64_t unit = begin; unit < end; ++unit) {
    Head<const S> query = part_of<S>(args, args.joint, unit, 0), key = part_of<S>(args, args.joint, unit, 1);
    Head<const S> out = result_of<S>(args, args.out, unit), grad_out = result_of<S>(args, args.grad_out, unit);
    transpose(key, n.pixels, n.features, n.pitch, keys);
    transpose(part_of<S>(args, args.joint, unit, 2), n.pixels, n.features, n.pitch, values);
    Right key_matrix = rows_of(key, n.pixels, n.features, key_rows);
    for (int64_t i = 0; i < 2 * matrix; ++i) grad_keys[i] = 0.0f;
    Head<S> grad_query = writable(part_of<S>(args, args.grad_joint, unit, 0));
    for (int64_t first = 0; first < n.pixels; first += kQueries) {
      int64_t rows = lesser(kQueries, n.pixels - first);
      score(n, query, first, rows, keys, queries, weights);
      Right gradient = rows_of(Head<const S>{grad_out.row(first), grad_out.stride}, rows, n.features, gradients);
      multiply<false>(Left{gradient.data, gradient.row, 1}, Right{values, n.pitch}, n.features, rows, n.pitch,
                      Result{grad_scores, n.pitch});
      for (int64_t r = 0; r < rows; ++r) {
        exponentials(weights + r * n.pitch, n.pixels, args.log_sums[unit * n.pixels + first + r]);
        score_gradients(weights + r * n.pitch, grad_scores + r * n.pitch, n.pixels,
                        dot(out.row(first + r), grad_out.row(first + r), n.features));
      }
      multiply<false>(Left{grad_scores, n.pitch, 1}, key_matrix, n.pixels, rows, n.features, Result{sums, n.features});
      for (int64_t r = 0; r < rows; ++r) store_row(sums + r * n.features, n.features, n.scale, grad_query.row(first + r));
      multiply<true>(Left{grad_scores, 1, n.pitch}, Right{queries, n.features}, rows, n.pixels, n.features, Result{grad_keys, n.features});
      multiply<true>(Left{weights, 1, n.pitch}, gradient, rows, n.pixels, n.features, Result{grad_values, n.features});
    }
    Head<S> grad_key = writable(part_of<S>(args, args.grad_joint, unit, 1)),
            grad_value = writable(part_of<S>(args, args.grad_joint, unit, 2));
    for (int64_t i = 0; i < n.pixels; ++i) {
      store_row(grad_keys + i * n.features, n.features, 1.0f, grad_key.row(i));
      store_row(grad_values + i * n.features, n.features, 1.0f, grad_value.row(i));
    }
  }
}

}  // namespace

// A unit is kAttentionQueries queries of one head of one sample.
void attention_units(const AttentionArgs& args, int64_t begin, int64_t end) {
  switch (args.dtype) {
    case Dtype::bfloat16:
      return attend<Bfloat16>(args, begin, end);
    case Dtype::float16:
      return attend<Float16>(args, begin, end);
    default:
      return attend<float>(args, begin, end);
  }
}

// A unit is one head of one sample.
void attention_backward_units(const AttentionArgs& args, int64_t begin, int64_t end) {
  switch (args.dtype) {
    case Dtype::bfloat16:
      return differentiate<Bfloat16>(args, begin, end);
    case Dtype::float16:
      return differentiate<Float16>(args, begin, end);
    default:
      return differentiate<float>(args, begin, end);
  }
}

}  // namespace FM_ISA
}  // namespace fm
