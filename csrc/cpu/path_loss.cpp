// The loss w (k o - (c1 x1 + c0 x0))^2 (paper eq. 14; OT: eq. 23) and its gradient in one pass over o, x1 and x0, which is read, recovered
// from x_t or drawn again.
#include "../loss.h"
#include "abreast.h"

namespace fm {
namespace FM_ISA {
namespace {

// x0 of a row, element by element, from the x_t that was made of it.
template <class T>
struct RecoveredRow {
  const T *x_t, *x1;
  T a, inverse_s;

  T operator[](int64_t i) const { return recovered<T>(x_t[i], a, x1[i], inverse_s); }
};

// One row's operands. weight and grad may be nullptr; grad may be o itself. X0: a pointer, or a RecoveredRow.
template <class T, class X0>
struct LossRow {
  const T *o, *x1;
  X0 x0;
  const T* weight;
  T* grad;
  int64_t count;
};

// Writes the gradient of element i and returns its share of the loss.
template <bool kWeight, bool kGrad, class T, class X0>
FM_INLINE T loss_element(const LossTerm<T>& term, const LossRow<T, X0>& row, int64_t i) {
  T difference = residual<T>(term, row.o[i], row.x1[i], static_cast<T>(row.x0[i]));
  T scaled = kWeight ? difference * row.weight[i] : difference;
  if (kGrad) row.grad[i] = scaled * term.grad_scale;
  return difference * scaled;
}

// Sixteen sums side by side: the compiler makes vectors of them, and their order is the same for every instruction set.
template <bool kWeight, bool kGrad, class T, class X0>
FM_INLINE T loss_row(const LossTerm<T>& term, const LossRow<T, X0>& operands) {
  const LossRow<T, X0> row = operands;
  T lanes[kLineElements] = {}, sum = 0;
  int64_t i = 0;
  for (; i + kLineElements <= row.count; i += kLineElements) {
#pragma GCC ivdep
    for (int64_t j = 0; j < kLineElements; ++j) lanes[j] += loss_element<kWeight, kGrad>(term, row, i + j);
  }
  for (; i < row.count; ++i) sum += loss_element<kWeight, kGrad>(term, row, i);
  if (row.count < kLineElements) return sum;
  for (T lane : lanes) sum += lane;
  return sum;
}

template <class T, class X0>
FM_INLINE double loss_of_row(const LossTerm<T>& term, const LossRow<T, X0>& row) {
  T sum = row.weight ? (row.grad ? loss_row<true, true>(term, row) : loss_row<true, false>(term, row))
                     : (row.grad ? loss_row<false, true>(term, row) : loss_row<false, false>(term, row));
  return static_cast<double>(sum) * static_cast<double>(term.loss_scale);
}

FM_INLINE double coefficient(const LossArgs& args, int64_t sample, int column) {
  return coefficient_at(args.coefficients, args.coefficient_dtype, sample, column);
}

FM_INLINE bool recovers(const LossArgs& args, int64_t sample) {
  return args.x_t.data && recoverable(coefficient(args, sample, kA), coefficient(args, sample, kS), coefficient(args, sample, kC1),
                                      coefficient(args, sample, kC0));
}

template <class T>
FM_INLINE LossTerm<T> loss_term(const LossArgs& args, int64_t sample) {
  double c[kColumns], incoming = 1.0;
  for (int i = 0; i < kColumns; ++i) c[i] = coefficient(args, sample, i);
  double scale = c[kW] * (args.sample_weight ? number_at(args.sample_weight, args.sample_weight_dtype, sample) : 1.0);
  if (args.grad_output.data) incoming = number_at(args.grad_output.data, args.grad_output.dtype, sample * args.grad_output.batch_stride);
  double grad_scale = args.grad_factor * incoming * scale * c[kK];
  return LossTerm<T>{static_cast<T>(c[kC1]), static_cast<T>(c[kC0]), static_cast<T>(c[kK]), static_cast<T>(scale),
                     static_cast<T>(grad_scale)};
}

template <class T>
FM_INLINE RecoveredRow<T> recovered_row(const LossArgs& args, int64_t sample, const T* x_t, const T* x1) {
  return RecoveredRow<T>{x_t, x1, static_cast<T>(coefficient(args, sample, kA)), static_cast<T>(1.0 / coefficient(args, sample, kS))};
}

// A tile's operands but for x0; rows without data are absent.
template <class T>
struct LossRows {
  Rows<const T> o, x1, weight;
  Rows<T> grad;
};

template <class T>
struct Buffers {
  alignas(64) T x1[kTileBuffer], x0[kTileBuffer], o[kTileBuffer], weight[kTileBuffer], grad[kTileBuffer];
};

// The loss of a tile whose x0 are the rows x0(channel).
template <class T, class X0>
FM_INLINE double loss_of_rows(const Tile& tile, const LossTerm<T>& term, const LossRows<T>& rows, const X0& x0) {
  double sum = 0;
  for (int64_t c = 0; c < tile.channels; ++c) {
    const T* weight = rows.weight.data ? rows.weight.row(c) : nullptr;
    T* grad = rows.grad.data ? rows.grad.row(c) : nullptr;
    sum += loss_of_row(term, LossRow<T, decltype(x0(c))>{rows.o.row(c), rows.x1.row(c), x0(c), weight, grad, tile.positions});
  }
  return sum;
}

// noise is nullptr where x0 is given or recovered.
template <class T>
FM_INLINE void loss_tile(const LossArgs& args, const Tile& tile, const float* noise) {
  Buffers<T> buffers;
  LossTerm<T> term = loss_term<T>(args, tile.sample);
  LossRows<T> rows = {};
  rows.x1 = read_data<T>(args.shape, args.x1, args.key, args.transform, tile, buffers.x1);
  rows.o = read_rows<T>(args.o, tile, buffers.o);
  if (args.weight.data) rows.weight = read_rows<T>(args.weight, tile, buffers.weight);
  if (args.grad.data) rows.grad = result_rows<T>(args.grad, tile, buffers.grad);
  double sum;
  if (noise) {
    sum = loss_of_rows(tile, term, rows, [&](int64_t c) { return noise + c * tile.pitch; });
  } else if (args.x0.data) {
    Rows<const T> x0 = read_rows<T>(args.x0, tile, buffers.x0);
    sum = loss_of_rows(tile, term, rows, [&](int64_t c) { return x0.row(c); });
  } else {
    Rows<const T> x_t = read_rows<T>(args.x_t, tile, buffers.x0);
    sum = loss_of_rows(tile, term, rows, [&](int64_t c) { return recovered_row(args, tile.sample, x_t.row(c), rows.x1.row(c)); });
  }
  if (args.grad.data) finish_rows<T>(args.grad, tile, buffers.grad);
  if (args.partial) args.partial[tile.sample * tiles_per_sample(args.tiling) + tile.index] = sum;
}

// A small sample of one row, read and written in place. Its x0: noise, given, or recovered.
template <class T>
FM_INLINE void loss_of_sample(const LossArgs& args, int64_t sample, const float* noise) {
  LossTerm<T> term = loss_term<T>(args, sample);
  const T *o = row_of<const T>(args.o, sample), *x1 = row_of<const T>(args.x1, sample);
  const T* weight = args.weight.data ? row_of<const T>(args.weight, sample) : nullptr;
  T* grad = args.grad.data ? row_of<T>(args.grad, sample) : nullptr;
  double sum;
  if (noise) {
    sum = loss_of_row(term, LossRow<T, const float*>{o, x1, noise, weight, grad, args.shape.positions});
  } else if (args.x0.data) {
    sum = loss_of_row(term, LossRow<T, const T*>{o, x1, row_of<const T>(args.x0, sample), weight, grad, args.shape.positions});
  } else {
    sum = loss_of_row(term, LossRow<T, RecoveredRow<T>>{o, x1, recovered_row(args, sample, row_of<const T>(args.x_t, sample), x1), weight,
                                                        grad, args.shape.positions});
  }
  if (args.partial) args.partial[sample] = sum;
}

// Samples without weights, next to each other. x0: kStride numbers a sample.
template <int kPositions, int kStride, class T, class X0>
FM_INLINE void loss_of_samples(const LossArgs& args, int64_t first, int64_t count, const X0* x0) {
  const T* rows = static_cast<const T*>(args.coefficients) + kColumns * first;
  const T *o = row_of<const T>(args.o, first), *x1 = row_of<const T>(args.x1, first);
  T *grad = args.grad.data ? row_of<T>(args.grad, first) : nullptr, difference[kPositions * kAbreast];
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i)
    for (int64_t p = 0; p < kPositions; ++p) {
      LossTerm<T> term = {rows[kColumns * i + kC1], rows[kColumns * i + kC0], rows[kColumns * i + kK], 0, 0};
      difference[i * kPositions + p] =
          residual<T>(term, o[i * kPositions + p], x1[i * kPositions + p], static_cast<T>(x0[i * kStride + p]));
    }
  for (int64_t i = 0; i < count; ++i) {
    T sum = 0;
    for (int64_t p = 0; p < kPositions; ++p) sum += difference[i * kPositions + p] * difference[i * kPositions + p];
    args.partial[first + i] = static_cast<double>(sum) * static_cast<double>(rows[kColumns * i + kW]);
  }
  if (!grad) return;
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    T scale =
        static_cast<T>(args.grad_factor * static_cast<double>(rows[kColumns * i + kW]) * static_cast<double>(rows[kColumns * i + kK]));
    for (int64_t p = 0; p < kPositions; ++p) grad[i * kPositions + p] = difference[i * kPositions + p] * scale;
  }
}

template <class T>
void loss_units_abreast(const LossArgs& args, int64_t begin, int64_t end) {
  alignas(64) float noise[kBlockPositions * kAbreast];
  Generator generator = make_generator(stream_of(args.key, kStreamX0));
  for_each_run(args.shape, args.tiling, begin, end, [&](auto positions, int64_t first, int64_t count) {
    if (args.x0.data) return loss_of_samples<positions, positions, T>(args, first, count, row_of<const T>(args.x0, first));
    draw_blocks<ToNormals>(generator, args.key, first, count, noise);
    loss_of_samples<positions, kBlockPositions, T>(args, first, count, noise);
  });
}

// Whether the samples have nothing but their data and coefficients, in tensors that `samples_abreast` allows.
template <class T>
FM_INLINE bool loss_abreast(const LossArgs& args) {
  return args.coefficient_dtype == DtypeOf<T>::value && args.partial && !args.weight.data && !args.sample_weight &&
         !args.grad_output.data && !args.x_t.data &&
         samples_abreast<T>(args.shape, args.tiling, args.transform, {&args.o, &args.x1, &args.x0, &args.grad});
}

template <class T>
void loss_units(const LossArgs& args, int64_t begin, int64_t end) {
  if (loss_abreast<T>(args)) return loss_units_abreast<T>(args, begin, end);
  const auto draws = [&](int64_t sample) { return !args.x0.data && !recovers(args, sample); };
  if (rows_in_place<T>(args.shape, args.tiling, args.transform, {&args.o, &args.x1, &args.x0, &args.x_t, &args.weight, &args.grad}))
    return for_each_row<ToNormals>(args.shape, args.tiling, args.key, kStreamX0, draws, begin, end,
                                   [&](int64_t sample, const float* noise) { loss_of_sample<T>(args, sample, noise); });
  for_each_tile<ToNormals>(
      args.shape, args.tiling, args.key, kStreamX0, draws, begin, end,
      [&](const Tile& tile) { return runs_ahead(tile, {&args.x1, &args.o, &args.grad}); },
      [&](const Tile& tile, const float* noise) { loss_tile<T>(args, tile, noise); });
}

}  // namespace

void path_loss_units(const LossArgs& args, int64_t begin, int64_t end) {
  args.wide ? loss_units<double>(args, begin, end) : loss_units<float>(args, begin, end);
}

}  // namespace FM_ISA
}  // namespace fm
