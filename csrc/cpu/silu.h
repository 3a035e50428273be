// silu(z) = z / (1 + exp(-z)) and its derivative, on vectors.
#pragma once

#include "vector.h"

namespace fm {
namespace FM_ISA {

// e^r = 1 + r + r^2 g(r) on |r| <= ln(2) / 2, relative error 4e-9, lowest order first.
constexpr float kExp[5] = {0.4999999403953552f, 0.1666652113199234f, 0.04166838899254799f, 0.008368724025785923f, 0.0013814583653584123f};
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2High = 0x1.62e4p-1f;  // 15 bits: its products with exponents are exact
constexpr float kLn2Low = 1.4286068202862268e-06f;
constexpr float kWholeNumbers = 0x1.8p23f;  // added to a small number, rounds it to a whole one, which the last bits then hold
constexpr float kSmallestExponent = -87.3f, kLargestExponent = 88.72f;

// exp(t), to a rounding or two; t outside of [-87.3, 88.72] counts as the nearest bound. NaN stays NaN, also one with bits of its own,
// to which an exponent cannot be added.
FM_INLINE Vector<float> exponential(Vector<float> t) {
  t = between(t, kSmallestExponent, kLargestExponent);
  Vector<float> shifted = fused(t, all(kLog2E), all(kWholeNumbers)), n = shifted - kWholeNumbers;
  Vector<float> r = fused(n, all(-kLn2Low), fused(n, all(-kLn2High), t));
  Vector<float> g = fused(all(kExp[4]), r, all(kExp[3]));
  for (int i = 2; i >= 0; --i) g = fused(g, r, all(kExp[i]));
  Vector<float> power = fused(r * r, g, r) + 1.0f;
  Integers<float> result = reinterpret_cast<Integers<float>>(power) + (reinterpret_cast<Integers<float>>(shifted) << 23);
  return t == t ? reinterpret_cast<Vector<float>>(result) : t;
}

FM_INLINE Vector<double> exponential(Vector<double> t) {
  for (int64_t i = 0; i < kWidth<double>; ++i) t[i] = exp(t[i]);
  return t;
}

// Where z < -88.72 the result is -3e-39 |z| instead of nearer to zero.
struct Silu {
  template <class V>
  FM_INLINE V value(V z) {
    return z / (exponential(-z) + 1.0f);
  }
  // s + z s (1 - s) with the sigmoid s.
  template <class V>
  FM_INLINE V derivative(V z) {
    V s = 1.0f / (exponential(-z) + 1.0f);
    return fused(z * s, 1.0f - s, s);
  }
};

struct NoActivation {
  template <class V>
  FM_INLINE V value(V z) {
    return z;
  }
  template <class V>
  FM_INLINE V derivative(V) {
    return V{} + 1.0f;
  }
};

}  // namespace FM_ISA
}  // namespace fm
