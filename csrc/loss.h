// The loss of one element, w (k o - (c1 x1 + c0 x0))^2 (paper eq. 14; OT: eq. 23), and its derivative with respect to o.
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

// x_t (paper eq. 11; OT: eq. 22), and the target of the loss.
template <class T>
FM_HD T interpolate(T a, T x1, T s, T x0) {
  return a * x1 + s * x0;
}

template <class T>
FM_HD T residual(const LossTerm<T>& term, T output, T x1, T x0) {
  return term.k * output - interpolate(term.c1, x1, term.c0, x0);
}

// Whether x0 = (x_t - a x1) / s may stand for the noise that made x_t = a x1 + s x0 in the same precision. a x1 is rounded alike both
// times, so that x0 is off by at most u (a / s |x1| + 5 |x0|), u being half a unit in the last place of 1: where |c0| a <= 7 |c1| s, the
// target is off by at most u (7 |c1 x1| + 5 |c0 x0|), a few roundings of its own two terms whatever the scale of the data. The bound on s
// keeps s x0 a normal number.
FM_HD bool recoverable(double a, double s, double c1, double c0) { return fabs(c0 * a) <= 7.0 * fabs(c1 * s) && fabs(s) >= 0x1p-20; }

template <class T>
FM_HD T recovered(T x_t, T a, T x1, T inverse_s) {
  return (x_t - a * x1) * inverse_s;
}

// What one element is divided by: the element count, nothing, or the sample's element count.
FM_HD double reduction_divisor(int reduction, int64_t batch, int64_t sample_elements) {
  double elements = static_cast<double>(sample_elements);
  return reduction == kMean ? static_cast<double>(batch) * elements : (reduction == kNone ? elements : 1.0);
}

}  // namespace fm
