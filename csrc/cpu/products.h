// Products of small matrices, of float32 or of pairs of bfloat16, whose sums stay in registers and are float32. Internal linkage: the
// same names are compiled under different instruction sets.
#pragma once

#include "vector.h"

namespace fm {
namespace FM_ISA {
namespace {

// Two numbers that follow each other in the sum of a product, which one instruction takes together.
struct Pair {
  uint16_t first, second;  // bfloat16
};

// A factor that is read number by number, or pair by pair: element (m, k) at data[m * row + k * step].
template <class T>
struct Left {
  const T* data;
  int64_t row, step;
};

// A factor that is read by vectors: element (k, n) at data[k * row + n].
template <class T>
struct Right {
  const T* data;
  int64_t row;
};

struct Result {
  float* data;
  int64_t row;
};

// Of a tile of sums: 24 registers of 32, or 12 of 16.
#if defined(__AVX512F__)
constexpr int kSumRegisters = 24, kMostVectors = 4;
#else
constexpr int kSumRegisters = 12, kMostVectors = 2;
#endif
template <int kVectors>
constexpr int kTileRows = kSumRegisters / (kVectors < 2 ? 2 : kVectors);

FM_INLINE Vector<float> spread(const float* from) { return all(*from); }
FM_INLINE Vector<float> load_vector(const float* from) { return load_whole(from); }
FM_INLINE Vector<float> add_product(Vector<float> a, Vector<float> b, Vector<float> sum) { return fused(a, b, sum); }

#if defined(__AVX512BF16__)
FM_INLINE __m512i spread(const Pair* from) {
  int32_t bits;
  __builtin_memcpy(&bits, from, sizeof(bits));
  return _mm512_set1_epi32(bits);
}
FM_INLINE __m512i load_vector(const Pair* from) { return _mm512_loadu_si512(from); }
// Exact products, whose sum is rounded twice; numbers below 2^-126 count as 0.
FM_INLINE Vector<float> add_product(__m512i a, __m512i b, Vector<float> sum) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}
#endif

template <bool kAdd, int kRows, int kVectors, class T>
FM_INLINE void multiply_tile(const Left<T>& a, const Right<T>& b, int64_t depth, const Result& to) {
  constexpr int64_t kLane = kWidth<float>;
  Vector<float> sum[kRows][kVectors];
#pragma GCC unroll 12
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[m][v] = Vector<float>{};
  const T *left = a.data, *right = b.data;
  for (int64_t k = 0; k < depth; ++k, left += a.step, right += b.row) {
    decltype(load_vector(right)) vectors[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) vectors[v] = load_vector(right + v * kLane);
#pragma GCC unroll 12
    for (int m = 0; m < kRows; ++m) {
      auto number = spread(left + m * a.row);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[m][v] = add_product(number, vectors[v], sum[m][v]);
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      float* at = to.data + m * to.row + v * kLane;
      store_whole(at, kAdd ? load_whole(at) + sum[m][v] : sum[m][v]);
    }
}

template <bool kAdd, int kVectors, class T>
static void multiply_columns(Left<T> a, const Right<T>& b, int64_t depth, int64_t rows, Result to) {
  constexpr int kRows = kTileRows<kVectors>;
  for (; rows >= kRows; rows -= kRows, a.data += kRows * a.row, to.data += kRows * to.row)
    multiply_tile<kAdd, kRows, kVectors>(a, b, depth, to);
  for (; rows >= 4; rows -= 4, a.data += 4 * a.row, to.data += 4 * to.row) multiply_tile<kAdd, 4, kVectors>(a, b, depth, to);
  for (; rows > 0; --rows, a.data += a.row, to.data += to.row) multiply_tile<kAdd, 1, kVectors>(a, b, depth, to);
}

// to [rows, columns] = a [rows, depth] b [depth, columns], or with kAdd that much more: by one addition, so that roundings of a long sum
// in parts grow with the number of parts and their depth, not with the product of both. columns are a multiple of the vectors' width.
// Pairs: depth counts them.
template <bool kAdd, class T>
FM_INLINE void multiply(const Left<T>& a, const Right<T>& b, int64_t depth, int64_t rows, int64_t columns, const Result& to) {
  int64_t n = 0;
  for (; n + kMostVectors * kWidth<float> <= columns; n += kMostVectors * kWidth<float>)
    multiply_columns<kAdd, kMostVectors>(a, Right<T>{b.data + n, b.row}, depth, rows, Result{to.data + n, to.row});
  if (kMostVectors > 2 && n + 2 * kWidth<float> <= columns) {
    multiply_columns<kAdd, 2>(a, Right<T>{b.data + n, b.row}, depth, rows, Result{to.data + n, to.row});
    n += 2 * kWidth<float>;
  }
  for (; n < columns; n += kWidth<float>)
    multiply_columns<kAdd, 1>(a, Right<T>{b.data + n, b.row}, depth, rows, Result{to.data + n, to.row});
}

}  // namespace
}  // namespace FM_ISA
}  // namespace fm
