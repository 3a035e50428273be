// Self-attention of the pixels of an image, head by head, from a joint projection [B, N, 3, H, D] of queries, keys and values:
//   s = q k' / sqrt(D)    p = exp(s - l) with l = log sum exp s of each query    o = p v
// and its gradients, with dp = do v' and ds = p (dp - sum_d do o):
//   dq = ds k / sqrt(D)    dk = ds' q / sqrt(D)    dv = p' do
// Weights of some queries at a time are made in the cache, and made again for the gradients: they are never stored.
#include "attention.h"
#if defined(__AVX512BF16__)
#include "attention_pairs.h"
#endif

namespace fm {
namespace FM_ISA {
namespace {

// Float32 rows as they lie; others are converted into the buffer.
FM_INLINE Right<float> rows_of(const Head<const float>& head, int64_t, int64_t, float*) { return Right<float>{head.data, head.stride}; }
template <class S>
FM_INLINE Right<float> rows_of(const Head<const S>& head, int64_t rows, int64_t features, float* buffer) {
  for (int64_t n = 0; n < rows; ++n) load_row(head.row(n), features, 1.0f, buffer + n * features);
  return Right<float>{buffer, features};
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

// The scores of some queries, which are scaled on the way: scores [rows, pitch].
template <class S>
FM_INLINE void score(const Sizes& n, const Head<const S>& query, int64_t first, int64_t rows, const float* keys, float* queries,
                     float* scores) {
  for (int64_t i = 0; i < rows; ++i) load_row(query.row(first + i), n.features, n.scale, queries + i * n.features);
  multiply<false>(Left<float>{queries, n.features, 1}, Right<float>{keys, n.pitch}, n.features, rows, n.columns, Result{scores, n.pitch});
}

// --- forward -------------------------------------------------------------------------------------------------------------------------

template <class S>
class Forward {
 public:
  explicit Forward(const AttentionArgs& args)
      : args_(args), n_(sizes_of(args)), memory_(2 * matrix() + 2 * block() + kQueries * n_.pitch + kLineElements) {}

  // Queries from..to of a head, whose keys and values stay from one run to the next.
  void run(int64_t unit, int64_t from, int64_t to) {
    if (unit != unit_) {
      transpose(part(unit, 1), n_.pixels, n_.features, n_.pitch, keys());
      value_ = rows_of(part(unit, 2), n_.pixels, n_.features, values());
      unit_ = unit;
    }
    for (int64_t first = from; first < to; first += kQueries) attend(unit, first, lesser(kQueries, to - first));
  }

 private:
  int64_t matrix() const { return n_.features * n_.pitch; }
  int64_t block() const { return n_.features * kQueries; }
  float* keys() { return on_a_line(memory_.data()); }
  float* values() { return keys() + matrix(); }
  float* queries() { return values() + matrix(); }
  float* sums() { return queries() + block(); }
  float* scores() { return sums() + block(); }
  Head<const S> part(int64_t unit, int64_t i) const { return part_of(args_, static_cast<const S*>(args_.joint), unit, i); }

  void attend(int64_t unit, int64_t first, int64_t rows) {
    float factors[kQueries];
    score(n_, part(unit, 0), first, rows, keys(), queries(), scores());
    for (int64_t r = 0; r < rows; ++r) factors[r] = weigh(scores() + r * n_.pitch, &args_.log_sums[unit * n_.pixels + first + r]);
    multiply<false>(Left<float>{scores(), n_.pitch, 1}, value_, n_.pixels, rows, n_.features, Result{sums(), n_.features});
    Head<S> out = result_of(args_, static_cast<S*>(args_.out), unit);
    for (int64_t r = 0; r < rows; ++r) store_row(sums() + r * n_.features, n_.features, factors[r], out.row(first + r));
  }

  // Scores become weights up to the factor that is returned.
  float weigh(float* row, float* log_sum) {
    float level = largest(row, n_.pixels), sum = exponentials(row, n_.pixels, level);
    *log_sum = level + logf(sum);
    return 1.0f / sum;
  }

  const AttentionArgs& args_;
  Sizes n_;
  Scratch<float, 16> memory_;
  int64_t unit_ = -1;
  Right<float> value_ = {};
};

template <class Kernel>
void attend(const AttentionArgs& args, int64_t begin, int64_t end) {
  int64_t chunks = divide_up(args.pixels, kAttentionQueries);
  Kernel forward(args);
  for (int64_t i = begin; i < end; ++i) {
    int64_t from = i % chunks * kAttentionQueries;
    forward.run(i / chunks, from, lesser(from + kAttentionQueries, args.pixels));
  }
}

// --- gradients -----------------------------------------------------------------------------------------------------------------------

template <class S>
class Backward {
 public:
  explicit Backward(const AttentionArgs& args)
      : args_(args), n_(sizes_of(args)), memory_(5 * matrix() + 3 * block() + 2 * kQueries * n_.pitch + kLineElements) {}

  // All gradients of a head.
  void run(int64_t unit) {
    Head<const S> key = part(unit, 1);
    transpose(key, n_.pixels, n_.features, n_.pitch, keys());
    transpose(part(unit, 2), n_.pixels, n_.features, n_.pitch, values());
    Right<float> key_matrix = rows_of(key, n_.pixels, n_.features, key_rows());
    for (int64_t i = 0; i < 2 * matrix(); ++i) grad_keys()[i] = 0.0f;
    for (int64_t first = 0; first < n_.pixels; first += kQueries)
      differentiate(unit, first, lesser(kQueries, n_.pixels - first), key_matrix);
    for (int64_t i = 0; i < n_.pixels; ++i) {
      store_row(grad_keys() + i * n_.features, n_.features, 1.0f, grad_part(unit, 1).row(i));
      store_row(grad_values() + i * n_.features, n_.features, 1.0f, grad_part(unit, 2).row(i));
    }
  }

 private:
  int64_t matrix() const { return n_.features * n_.pitch; }
  int64_t block() const { return n_.features * kQueries; }
  float* keys() { return on_a_line(memory_.data()); }
  float* values() { return keys() + matrix(); }
  float* key_rows() { return values() + matrix(); }
  float* grad_keys() { return key_rows() + matrix(); }
  float* grad_values() { return grad_keys() + matrix(); }
  float* queries() { return grad_values() + matrix(); }
  float* gradients() { return queries() + block(); }
  float* sums() { return gradients() + block(); }
  float* weights() { return sums() + block(); }
  float* grad_scores() { return weights() + kQueries * n_.pitch; }
  Head<const S> part(int64_t unit, int64_t i) const { return part_of(args_, static_cast<const S*>(args_.joint), unit, i); }
  Head<S> grad_part(int64_t unit, int64_t i) const { return part_of(args_, static_cast<S*>(args_.grad_joint), unit, i); }
  Head<const S> out(int64_t unit) const { return result_of(args_, static_cast<const S*>(args_.out), unit); }
  Head<const S> grad_out(int64_t unit) const { return result_of(args_, static_cast<const S*>(args_.grad_out), unit); }

  // The gradients of some queries, and what they add to those of all keys and values.
  void differentiate(int64_t unit, int64_t first, int64_t rows, const Right<float>& key_matrix) {
    const Result to_keys = {grad_keys(), n_.features}, to_values = {grad_values(), n_.features};
    Head<const S> gradient_rows = {grad_out(unit).row(first), grad_out(unit).stride};
    Right<float> gradient = rows_of(gradient_rows, rows, n_.features, gradients());
    make_weights(unit, first, rows, gradient);
    multiply<false>(Left<float>{grad_scores(), n_.pitch, 1}, key_matrix, n_.pixels, rows, n_.features, Result{sums(), n_.features});
    for (int64_t r = 0; r < rows; ++r) store_row(sums() + r * n_.features, n_.features, n_.scale, grad_part(unit, 0).row(first + r));
    multiply<true>(Left<float>{grad_scores(), 1, n_.pitch}, Right<float>{queries(), n_.features}, rows, n_.pixels, n_.features, to_keys);
    multiply<true>(Left<float>{weights(), 1, n_.pitch}, gradient, rows, n_.pixels, n_.features, to_values);
  }

  // The weights p and the gradients ds of the scores.
  void make_weights(int64_t unit, int64_t first, int64_t rows, const Right<float>& gradient) {
    score(n_, part(unit, 0), first, rows, keys(), queries(), weights());
    multiply<false>(Left<float>{gradient.data, gradient.row, 1}, Right<float>{values(), n_.pitch}, n_.features, rows, n_.columns,
                    Result{grad_scores(), n_.pitch});
    for (int64_t r = 0; r < rows; ++r) {
      float* row = weights() + r * n_.pitch;
      float level = dot(out(unit).row(first + r), grad_out(unit).row(first + r), n_.features);
      exponentials(row, n_.pixels, args_.log_sums[unit * n_.pixels + first + r]);
      score_gradients(row, grad_scores() + r * n_.pitch, n_.pixels, level);
    }
  }

  const AttentionArgs& args_;
  Sizes n_;
  Scratch<float, 16> memory_;
};

template <class Kernel>
void differentiate(const AttentionArgs& args, int64_t begin, int64_t end) {
  Kernel backward(args);
  for (int64_t unit = begin; unit < end; ++unit) backward.run(unit);
}

}  // namespace

// A unit is kAttentionQueries queries of one head of one sample, and of the backward pass one head of one sample.
#if defined(__AVX512BF16__)

// Other numbers have nothing of it.
void attention_units(const AttentionArgs& args, int64_t begin, int64_t end) {
  args.dtype == Dtype::bfloat16 ? attend<PairForward>(args, begin, end) : avx512::attention_units(args, begin, end);
}

void attention_backward_units(const AttentionArgs& args, int64_t begin, int64_t end) {
  args.dtype == Dtype::bfloat16 ? differentiate<PairBackward>(args, begin, end) : avx512::attention_backward_units(args, begin, end);
}

#else

void attention_units(const AttentionArgs& args, int64_t begin, int64_t end) {
  switch (args.dtype) {
    case Dtype::bfloat16:
      return attend<Forward<Bfloat16>>(args, begin, end);
    case Dtype::float16:
      return attend<Forward<Float16>>(args, begin, end);
    default:
      return attend<Forward<float>>(args, begin, end);
  }
}

void attention_backward_units(const AttentionArgs& args, int64_t begin, int64_t end) {
  switch (args.dtype) {
    case Dtype::bfloat16:
      return differentiate<Backward<Bfloat16>>(args, begin, end);
    case Dtype::float16:
      return differentiate<Backward<Float16>>(args, begin, end);
    default:
      return differentiate<Backward<float>>(args, begin, end);
  }
}

#endif

}  // namespace FM_ISA
}  // namespace fm
