// Weighted sums a x + sum_j c_j m(k_j) of a tile, a few tensors at a time; m mixes the halves of a doubled batch.
#pragma once

#include "tile.h"

namespace fm {
namespace FM_ISA {

constexpr int kTermsAbreast = 4;

// One row's operands: k, or the conditional and unconditional halves of k. y may be x and any of the k.
template <class T>
struct StepRow {
  T a, c[kTermsAbreast], guidance;
  const T *x, *k[kTermsAbreast], *unconditional[kTermsAbreast];
  T *y, *kept;  // kept: where the last k goes as it comes, null if nowhere
  int64_t count;
};

template <int kTerms, bool kGuided, bool kKeeps, class T>
FM_INLINE void step_row(const StepRow<T>& operands) {
  const StepRow<T> row = operands;
#pragma GCC ivdep
  for (int64_t i = 0; i < row.count; ++i) {
    T y = row.a * row.x[i];
    for (int j = 0; j < kTerms; ++j) {
      T k = row.k[j][i];
      if (kKeeps && j == kTerms - 1) row.kept[i] = k;
      if (kGuided) k = multiply_add(row.guidance, k - row.unconditional[j][i], row.unconditional[j][i]);
      y = multiply_add(row.c[j], k, y);
    }
    row.y[i] = y;
  }
}

template <bool kGuided, bool kKeeps, class T>
FM_INLINE void step_row_of(int64_t terms, const StepRow<T>& row) {
  if (terms == 0) step_row<0, kGuided, kKeeps>(row);
  if (terms == 1) step_row<1, kGuided, kKeeps>(row);
  if (terms == 2) step_row<2, kGuided, kKeeps>(row);
  if (terms == 3) step_row<3, kGuided, kKeeps>(row);
  if (terms == 4) step_row<4, kGuided, kKeeps>(row);
}

template <class T>
struct StepBuffers {
  alignas(64) T x[kTileBuffer], y[kTileBuffer], k[kTermsAbreast][kTileBuffer], unconditional[kTermsAbreast][kTileBuffer];
};

FM_INLINE View second_half(const HalvedView& view) {
  View half = view.first;
  half.data = view.second;
  return half;
}

// Terms first, first + 1, ... that one pass can add: as many as fit abreast, all guided or none.
FM_INLINE int64_t terms_of_pass(const StepArgs& args, int64_t first) {
  if (args.count == 0) return 0;
  bool guided = args.terms[first].k.second != nullptr;
  int64_t end = first + 1, last = lesser(args.count, first + kTermsAbreast);
  while (end < last && (args.terms[end].k.second != nullptr) == guided) ++end;
  return end - first;
}

// y = a x + terms first, first + 1, ...
template <class T>
FM_INLINE void add_terms(const StepArgs& args, int64_t first, int64_t terms, const Tile& tile, T a, const Rows<const T>& x,
                         const Rows<T>& y, const Rows<T>& kept, StepBuffers<T>* buffers) {
  StepRow<T> row;
  Rows<const T> k[kTermsAbreast], unconditional[kTermsAbreast];
  bool guided = terms > 0 && args.terms[first].k.second != nullptr;
  for (int64_t j = 0; j < terms; ++j) {
    const StepTerm& term = args.terms[first + j];
    row.c[j] = static_cast<T>(term.coefficient);
    k[j] = read_rows<T>(term.k.first, tile, buffers->k[j]);
    if (guided) unconditional[j] = read_rows<T>(second_half(term.k), tile, buffers->unconditional[j]);
  }
  row.a = a;
  row.guidance = static_cast<T>(args.guidance);
  row.count = tile.positions;
  for (int64_t c = 0; c < tile.channels; ++c) {
    row.x = x.row(c);
    row.y = y.row(c);
    row.kept = kept.data ? kept.row(c) : nullptr;
    for (int64_t j = 0; j < terms; ++j) row.k[j] = k[j].row(c);
    for (int64_t j = 0; guided && j < terms; ++j) row.unconditional[j] = unconditional[j].row(c);
    if (guided)
      step_row_of<true, false>(terms, row);
    else
      row.kept ? step_row_of<false, true>(terms, row) : step_row_of<false, false>(terms, row);
  }
}

// All of args but `out`, `copy` and `kept`: to the rows y, which may be those of an operand, and the last k to the rows kept, if any.
template <class T>
FM_INLINE void weighted_sum(const StepArgs& args, const Tile& tile, const Rows<T>& y, const Rows<T>& kept, StepBuffers<T>* buffers) {
  Rows<const T> x = read_rows<T>(args.x, tile, buffers->x);
  T a = static_cast<T>(args.coefficient);
  // What takes more than one pass is summed in a buffer: y may be one of the terms that are still to come.
  int64_t first = 0, terms = terms_of_pass(args, 0);
  for (; first + terms < args.count; terms = terms_of_pass(args, first)) {
    add_terms<T>(args, first, terms, tile, a, x, Rows<T>{buffers->y, tile.pitch}, Rows<T>{}, buffers);
    x = Rows<const T>{buffers->y, tile.pitch};
    a = T(1);
    first += terms;
  }
  add_terms<T>(args, first, terms, tile, a, x, y, kept, buffers);
}

}  // namespace FM_ISA
}  // namespace fm
