// attention.cpp's formulas for bfloat16 by products of pairs (AVX512_BF16), two terms an instruction where float32 has one. Weights and
// the gradients of scores are rounded to bfloat16 before they are multiplied; sums, exponentials and log sums stay float32. A pair is
// two neighbours in the sum of a product: of features in s and dp, of keys in o and dq, of queries in dk and dv.
#pragma once

#include "attention.h"

namespace fm {
namespace FM_ISA {
namespace {

using HeadRows = Head<const Bfloat16>;

FM_INLINE const Pair* pairs(const Bfloat16* numbers) { return reinterpret_cast<const Pair*>(numbers); }
FM_INLINE __m256i rounded(Vector<float> v) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)); }
FM_INLINE __m256i sixteen(const Bfloat16* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
FM_INLINE void store_pairs(Pair* to, __m256i first, __m256i second) {
  _mm512_storeu_si512(to, _mm512_or_si512(_mm512_cvtepu16_epi32(first), _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16)));
}

// Pairs of features to [D / 2, pitch]: column n is row n, zeros beyond the rows.
FM_INLINE void transpose_pairs(const HeadRows& head, int64_t rows, int64_t features, int64_t pitch, Pair* to) {
  constexpr int64_t kPairs = 8;  // of the least number of features
  Pair line[kPairs];
  for (int64_t d = 0; d < features / 2; d += kPairs) {
    for (int64_t n = 0; n < rows; ++n) {
      __builtin_memcpy(line, head.row(n) + 2 * d, sizeof(line));
      for (int64_t i = 0; i < kPairs; ++i) to[(d + i) * pitch + n] = line[i];
    }
    for (int64_t i = 0; i < kPairs; ++i)
      for (int64_t n = rows; n < pitch; ++n) to[(d + i) * pitch + n] = Pair{0, 0};
  }
}

// Pairs of rows to [rows / 2, D], with a row of zeros after an odd number.
FM_INLINE void pair_rows(const HeadRows& head, int64_t rows, int64_t features, Pair* to) {
  for (int64_t n = 0; n < rows; n += 2, to += features)
    for (int64_t d = 0; d < features; d += kWidth<float>)
      store_pairs(to + d, sixteen(head.row(n) + d), n + 1 < rows ? sixteen(head.row(n + 1) + d) : _mm256_setzero_si256());
}

FM_INLINE Vector<float> weights_of(const float* scores, float scale, float level) {
  return exponential(fused(load_whole(scores), all(scale), all(-level)));
}

// How many of sixteen numbers from `n` on are among the first `count`.
FM_INLINE First there(int64_t n, int64_t count) { return First{lesser(kWidth<float>, count - n)}; }

class PairForward {
 public:
  explicit PairForward(const AttentionArgs& args)
      : args_(args),
        n_(sizes_of(args)),
        floats_(kQueries * (n_.pitch + n_.features) + kLineElements),
        pairs_(n_.features * n_.pitch + kQueries * n_.pitch / 2 + kLineElements) {}

  // Queries from..to of a head, whose keys and values stay from one run to the next.
  void run(int64_t unit, int64_t from, int64_t to) {
    if (unit != unit_) {
      transpose_pairs(part(unit, 1), n_.pixels, n_.features, n_.pitch, keys());
      pair_rows(part(unit, 2), n_.pixels, n_.features, values());
      unit_ = unit;
    }
    for (int64_t first = from; first < to; first += kQueries) attend(unit, first, lesser(kQueries, to - first));
  }

 private:
  float* scores() { return on_a_line(floats_.data()); }
  float* sums() { return scores() + kQueries * n_.pitch; }
  Pair* keys() { return on_a_line(pairs_.data()); }
  Pair* values() { return keys() + n_.features / 2 * n_.pitch; }
  Pair* weights() { return values() + n_.features / 2 * n_.pitch; }
  HeadRows part(int64_t unit, int64_t i) const { return part_of(args_, static_cast<const Bfloat16*>(args_.joint), unit, i); }

  void attend(int64_t unit, int64_t first, int64_t rows) {
    float factors[kQueries];
    HeadRows query = part(unit, 0);
    multiply<false>(Left<Pair>{pairs(query.row(first)), query.stride / 2, 1}, Right<Pair>{keys(), n_.pitch}, n_.features / 2, rows,
                    n_.columns, Result{scores(), n_.pitch});
    for (int64_t r = 0; r < rows; ++r)
      factors[r] = weigh(scores() + r * n_.pitch, weights() + r * (n_.pitch / 2), &args_.log_sums[unit * n_.pixels + first + r]);
    multiply<false>(Left<Pair>{weights(), n_.pitch / 2, 1}, Right<Pair>{values(), n_.features}, divide_up(n_.pixels, 2), rows, n_.features,
                    Result{sums(), n_.features});
    Head<Bfloat16> out = result_of(args_, static_cast<Bfloat16*>(args_.out), unit);
    for (int64_t r = 0; r < rows; ++r) store_row(sums() + r * n_.features, n_.features, factors[r], out.row(first + r));
  }

  // Scores as weights up to the factor that is returned, with zeros after the last pixel.
  float weigh(const float* row, Pair* to, float* log_sum) {
    float level = largest(row, n_.pixels) * n_.scale;
    Vector<float> sum = {};
    for (int64_t n = 0; n < n_.columns; n += kWidth<float>) {
      Vector<float> weight = kept<float>(weights_of(row + n, n_.scale, level), there(n, n_.pixels));
      sum += weight;
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + n / 2), rounded(weight));
    }
    float total = sum_of_lanes<float>(sum);
    *log_sum = level + logf(total);
    return 1.0f / total;
  }

  const AttentionArgs& args_;
  Sizes n_;
  Scratch<float, 16> floats_;
  Scratch<Pair, 16> pairs_;
  int64_t unit_ = -1;
};

class PairBackward {
 public:
  explicit PairBackward(const AttentionArgs& args)
      : args_(args),
        n_(sizes_of(args)),
        floats_(2 * kQueries * n_.pitch + kQueries * n_.features + 2 * n_.features * n_.pitch + kLineElements),
        pairs_(3 * matrix() + kQueries * n_.features + 3 * (kQueries / 2) * n_.pitch + kLineElements) {}

  // All gradients of a head.
  void run(int64_t unit) {
    transpose_pairs(part(unit, 1), n_.pixels, n_.features, n_.pitch, keys());
    transpose_pairs(part(unit, 2), n_.pixels, n_.features, n_.pitch, values());
    pair_rows(part(unit, 1), n_.pixels, n_.features, key_rows());
    for (int64_t i = 0; i < 2 * n_.features * n_.pitch; ++i) grad_keys()[i] = 0.0f;
    for (int64_t first = 0; first < n_.pixels; first += kQueries) differentiate(unit, first, lesser(kQueries, n_.pixels - first));
    for (int64_t i = 0; i < n_.pixels; ++i) {
      store_row(grad_keys() + i * n_.features, n_.features, n_.scale, grad_part(unit, 1).row(i));
      store_row(grad_values() + i * n_.features, n_.features, 1.0f, grad_part(unit, 2).row(i));
    }
  }

 private:
  int64_t matrix() const { return n_.features / 2 * n_.pitch; }
  float* scores() { return on_a_line(floats_.data()); }
  float* grad_weights() { return scores() + kQueries * n_.pitch; }
  float* sums() { return grad_weights() + kQueries * n_.pitch; }
  float* grad_keys() { return sums() + kQueries * n_.features; }
  float* grad_values() { return grad_keys() + n_.features * n_.pitch; }
  Pair* keys() { return on_a_line(pairs_.data()); }
  Pair* values() { return keys() + matrix(); }
  Pair* key_rows() { return values() + matrix(); }
  Pair* query_rows() { return key_rows() + matrix(); }
  Pair* gradient_rows() { return query_rows() + kQueries / 2 * n_.features; }
  Pair* weights() { return gradient_rows() + kQueries / 2 * n_.features; }
  Pair* grad_scores() { return weights() + kQueries / 2 * n_.pitch; }          // of queries
  Pair* grad_score_rows() { return grad_scores() + kQueries / 2 * n_.pitch; }  // of keys
  HeadRows part(int64_t unit, int64_t i) const { return part_of(args_, static_cast<const Bfloat16*>(args_.joint), unit, i); }
  Head<Bfloat16> grad_part(int64_t unit, int64_t i) const { return part_of(args_, static_cast<Bfloat16*>(args_.grad_joint), unit, i); }
  HeadRows out(int64_t unit) const { return result_of(args_, static_cast<const Bfloat16*>(args_.out), unit); }
  HeadRows grad_out(int64_t unit) const { return result_of(args_, static_cast<const Bfloat16*>(args_.grad_out), unit); }

  // The gradients of some queries, and what they add to those of all keys and values.
  void differentiate(int64_t unit, int64_t first, int64_t rows) {
    const HeadRows query = {part(unit, 0).row(first), part(unit, 0).stride}, gradient = {grad_out(unit).row(first), grad_out(unit).stride};
    const int64_t features = n_.features, query_pairs = divide_up(rows, 2);
    multiply<false>(Left<Pair>{pairs(query.data), query.stride / 2, 1}, Right<Pair>{keys(), n_.pitch}, features / 2, rows, n_.columns,
                    Result{scores(), n_.pitch});
    multiply<false>(Left<Pair>{pairs(gradient.data), gradient.stride / 2, 1}, Right<Pair>{values(), n_.pitch}, features / 2, rows,
                    n_.columns, Result{grad_weights(), n_.pitch});
    for (int64_t r = 0; r < rows; r += 2) pair_up(unit, first, r, r + 1 < rows);
    multiply<false>(Left<Pair>{grad_score_rows(), n_.pitch / 2, 1}, Right<Pair>{key_rows(), features}, divide_up(n_.pixels, 2), rows,
                    features, Result{sums(), features});
    for (int64_t r = 0; r < rows; ++r) store_row(sums() + r * features, features, n_.scale, grad_part(unit, 0).row(first + r));
    pair_rows(query, rows, features, query_rows());
    pair_rows(gradient, rows, features, gradient_rows());
    multiply<true>(Left<Pair>{grad_scores(), 1, n_.pitch}, Right<Pair>{query_rows(), features}, query_pairs, n_.pixels, features,
                   Result{grad_keys(), features});
    multiply<true>(Left<Pair>{weights(), 1, n_.pitch}, Right<Pair>{gradient_rows(), features}, query_pairs, n_.pixels, features,
                   Result{grad_values(), features});
  }

  // The weights p and the gradients ds of the scores of queries r and r + 1 of a block, as the pairs of all products; `both`: there are
  // two.
  void pair_up(int64_t unit, int64_t first, int64_t r, bool both) {
    const float *log_sums = &args_.log_sums[unit * n_.pixels + first + r], *score = scores() + r * n_.pitch;
    const float* grad_weight = grad_weights() + r * n_.pitch;
    const float levels[2] = {level_of(unit, first + r), both ? level_of(unit, first + r + 1) : 0.0f};
    const int64_t columns_of_pairs = r / 2 * n_.pitch;
    for (int64_t n = 0; n < n_.columns; n += kWidth<float>) {
      __m256i p[2] = {}, ds[2] = {};
      for (int64_t i = 0; i <= (both ? 1 : 0); ++i) {
        Vector<float> weight = kept<float>(weights_of(score + i * n_.pitch + n, n_.scale, log_sums[i]), there(n, n_.pixels));
        p[i] = rounded(weight);
        ds[i] = rounded(weight * (load_whole(grad_weight + i * n_.pitch + n) - levels[i]));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(grad_score_rows() + (r + i) * (n_.pitch / 2) + n / 2), ds[i]);
      }
      store_pairs(weights() + columns_of_pairs + n, p[0], p[1]);
      store_pairs(grad_scores() + columns_of_pairs + n, ds[0], ds[1]);
    }
  }

  // sum_d do o of a query.
  float level_of(int64_t unit, int64_t i) const { return dot(out(unit).row(i), grad_out(unit).row(i), n_.features); }

  const AttentionArgs& args_;
  Sizes n_;
  Scratch<float, 16> floats_;
  Scratch<Pair, 16> pairs_;
};

}  // namespace
}  // namespace FM_ISA
}  // namespace fm
