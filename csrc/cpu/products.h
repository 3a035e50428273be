// Products of small float32 matrices whose sums stay in registers. Internal linkage: the same names are compiled under different
// instruction sets.
#pragma once

#include "vector.h"

namespace fm {
namespace FM_ISA {
namespace {

// A factor that is read number by number: element (m, k) at data[m * row + k * step].
struct Left {
  const float* data;
  int64_t row, step;
};

// A factor that is read by vectors: element (k, n) at data[k * row + n].
struct Right {
  const float* data;
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

template <bool kAdd, int kRows, int kVectors>
FM_INLINE void multiply_tile(const Left& a, const Right& b, int64_t depth, const Result& to) {
  constexpr int64_t kLane = kWidth<float>;
  Vector<float> sum[kRows][kVectors];
#pragma GCC unroll 12
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[m][v] = kAdd ? load_whole(to.data + m * to.row + v * kLane) : Vector<float>{};
  const float *left = a.data, *right = b.data;
  for (int64_t k = 0; k < depth; ++k, left += a.step, right += b.row) {
    Vector<float> vectors[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) vectors[v] = load_whole(right + v * kLane);
#pragma GCC unroll 12
    for (int m = 0; m < kRows; ++m) {
      Vector<float> number = all(left[m * a.row]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[m][v] = fused(number, vectors[v], sum[m][v]);
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store_whole(to.data + m * to.row + v * kLane, sum[m][v]);
}

template <bool kAdd, int kVectors>
static void multiply_columns(Left a, const Right& b, int64_t depth, int64_t rows, Result to) {
  constexpr int kRows = kTileRows<kVectors>;
  for (; rows >= kRows; rows -= kRows, a.data += kRows * a.row, to.data += kRows * to.row)
    multiply_tile<kAdd, kRows, kVectors>(a, b, depth, to);
  for (; rows >= 4; rows -= 4, a.data += 4 * a.row, to.data += 4 * to.row) multiply_tile<kAdd, 4, kVectors>(a, b, depth, to);
  for (; rows > 0; --rows, a.data += a.row, to.data += to.row) multiply_tile<kAdd, 1, kVectors>(a, b, depth, to);
}

// to [rows, columns] = a [rows, depth] b [depth, columns], or with kAdd that much more; columns are a multiple of the vectors' width.
template <bool kAdd>
FM_INLINE void multiply(const Left& a, const Right& b, int64_t depth, int64_t rows, int64_t columns, const Result& to) {
  int64_t n = 0;
  for (; n + kMostVectors * kWidth<float> <= columns; n += kMostVectors * kWidth<float>)
    multiply_columns<kAdd, kMostVectors>(a, Right{b.data + n, b.row}, depth, rows, Result{to.data + n, to.row});
  if (kMostVectors > 2 && n + 2 * kWidth<float> <= columns) {
    multiply_columns<kAdd, 2>(a, Right{b.data + n, b.row}, depth, rows, Result{to.data + n, to.row});
    n += 2 * kWidth<float>;
  }
  for (; n < columns; n += kWidth<float>) multiply_columns<kAdd, 1>(a, Right{b.data + n, b.row}, depth, rows, Result{to.data + n, to.row});
}

}  // namespace
}  // namespace FM_ISA
}  // namespace fm
