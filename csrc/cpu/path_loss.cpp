// The loss w (k o - (c1 x1 + c0 x0))^2 and its gradient in one pass over o, x1 and (read or drawn again) x0 (paper eqs 9 and 23).
#include "../loss.h"
#include "tile.h"

namespace fm {
namespace FM_ISA {
namespace {

// One row's operands. weight and grad may be nullptr; grad may be o itself.
template <class T, class X0>
struct LossRow {
  const T *o, *x1;
  const X0* x0;
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

template <class T>
FM_INLINE LossTerm<T> loss_term(const LossArgs& args, int64_t sample) {
  double c[6], incoming = 1.0;
  for (int i = 0; i < 6; ++i) c[i] = number_at(args.coefficients, args.coefficient_dtype, sample * 6 + i);
  double scale = c[5] * (args.sample_weight ? number_at(args.sample_weight, args.sample_weight_dtype, sample) : 1.0);
  if (args.grad_output.data) incoming = number_at(args.grad_output.data, args.grad_output.dtype, sample * args.grad_output.batch_stride);
  double grad_scale = args.grad_factor * incoming * scale * c[4];
  return LossTerm<T>{static_cast<T>(c[2]), static_cast<T>(c[3]), static_cast<T>(c[4]), static_cast<T>(scale), static_cast<T>(grad_scale)};
}

template <class T>
struct Buffers {
  alignas(64) T x1[kTileBuffer], x0[kTileBuffer], o[kTileBuffer], weight[kTileBuffer], grad[kTileBuffer];
};

template <class T>
FM_INLINE void loss_tile(const LossArgs& args, const Tile& tile, const float* noise) {
  Buffers<T> buffers;
  LossTerm<T> term = loss_term<T>(args, tile.sample);
  Rows<const T> none = {nullptr, 0};
  Rows<const T> x1 = read_data<T>(args.shape, args.x1, args.key, args.transform, tile, buffers.x1);
  Rows<const T> o = read_rows<T>(args.o, tile, buffers.o);
  Rows<const T> x0 = args.x0.data ? read_rows<T>(args.x0, tile, buffers.x0) : none;
  Rows<const T> weight = args.weight.data ? read_rows<T>(args.weight, tile, buffers.weight) : none;
  Rows<T> grad = args.grad.data ? result_rows<T>(args.grad, tile, buffers.grad) : Rows<T>{nullptr, 0};
  double sum = 0;
  for (int64_t c = 0; c < tile.channels; ++c) {
    const T* row_weight = weight.data ? weight.row(c) : nullptr;
    T* row_grad = grad.data ? grad.row(c) : nullptr;
    if (args.x0.data)
      sum += loss_of_row(term, LossRow<T, T>{o.row(c), x1.row(c), x0.row(c), row_weight, row_grad, tile.points});
    else
      sum += loss_of_row(term, LossRow<T, float>{o.row(c), x1.row(c), noise + c * tile.pitch, row_weight, row_grad, tile.points});
  }
  if (args.grad.data) finish_rows<T>(args.grad, tile, buffers.grad);
  if (args.partial) args.partial[tile.sample * tiles_per_sample(args.tiling) + tile.index] = sum;
}

template <class T>
void loss_units(const LossArgs& args, int64_t begin, int64_t end) {
  for_each_tile<ToNormals>(
      args.shape, args.tiling, args.key, kStreamX0, args.x0.data == nullptr, begin, end,
      [&](const Tile& tile) { return runs_ahead(tile, {&args.x1, &args.o, &args.grad}); },
      [&](const Tile& tile, const float* noise) { loss_tile<T>(args, tile, noise); });
}

}  // namespace

void path_loss_units(const LossArgs& args, int64_t begin, int64_t end) {
  args.wide ? loss_units<double>(args, begin, end) : loss_units<float>(args, begin, end);
}

}  // namespace FM_ISA
}  // namespace fm
