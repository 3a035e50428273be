// The loss of one element, w (k o - (c1 x1 + c0 x0))^2, and its derivative with respect to o.
#pragma once

#include "hd.h"

namespace fm {

enum Reduction : int { kMean = 0, kSum = 1, kNone = 2 };

template <class T>
struct LossTerm {
  T c1, c0, k;
  T loss_scale;  // w times the sample's weight
  T grad_scale;  // derivative of the reduced loss: 2 w k, the sample's weight, 1/N and the incoming gradient
};

template <class T>
FM_HD T interpolate(T a, T x1, T s, T x0) {
  return a * x1 + s * x0;
}

template <class T>
FM_HD T residual(const LossTerm<T>& term, T output, T x1, T x0) {
  return term.k * output - interpolate(term.c1, x1, term.c0, x0);
}

// What one element is divided by: the element count, nothing, or the sample's element count.
FM_HD double reduction_divisor(int reduction, int64_t batch, int64_t sample_elements) {
  double elements = static_cast<double>(sample_elements);
  return reduction == kMean ? static_cast<double>(batch) * elements : (reduction == kNone ? elements : 1.0);
}

}  // namespace fm
