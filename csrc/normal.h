// From random words to uniforms in (0, 1] and to pairs of standard normals (Box-Muller), in float32 on every backend.
#pragma once

#include "hd.h"

namespace fm {

// Lowest order first. Device code reads tables that a function has copied for itself, at compile time.
template <int kCount>
struct Polynomial {
  float c[kCount];
};

// q(f) with -2 ln(1 + f) = -2f + f^2 (1 + f q(f)) on f in [-1/4, 1/2).
constexpr Polynomial<7> kLog = {{-0.6666694283485413f, 0.49992722272872925f, -0.3996464014053345f, 0.33577635884284973f,
                                 -0.29808881878852844f, 0.24228273332118988f, -0.11119449883699417f}};
constexpr float kMinusTwoLogTwo = -1.3862943649291992f;
// sin(pi y / 4) / y and (cos(pi y / 4) - 1) / y^2 as polynomials in y^2 on |y| <= 1.
constexpr Polynomial<4> kSin = {{0.7853981852531433f, -0.08074543625116348f, 0.00249000103212893f, -3.5950459277955815e-05f}};
constexpr Polynomial<3> kCos = {{-0.3084245026111603f, 0.01585039682686329f, -0.00031916017178446054f}};

constexpr uint32_t kThreeQuarters = 0x3f400000u;  // bits of 0.75f
constexpr uint32_t kExponentBits = 0xff800000u;
constexpr uint32_t kSignBit = 0x80000000u;
constexpr float kTwoToMinus23 = 0x1p-23f;

FM_HD float uniform_from_word(uint32_t word) { return static_cast<float>(word) * 0x1p-32f + 0x1p-33f; }

// -2 ln u, never negative. u = 2^e m with m in [3/4, 3/2), so that u near 1 keeps its precision.
FM_HD float minus_two_log(float u) {
  uint32_t bits = bit_cast<uint32_t>(u);
  uint32_t exponent = (bits - kThreeQuarters) & kExponentBits;  // e * 2^23
  float f = bit_cast<float>(bits - exponent) - 1.0f;
  constexpr Polynomial<7> log = kLog;
  float q = log.c[6];
  for (int i = 5; i >= 0; --i) q = multiply_add(q, f, log.c[i]);
  float s = multiply_add(f * f, multiply_add(q, f, 1.0f), -2.0f * f);
  s = multiply_add(static_cast<float>(static_cast<int32_t>(exponent)), kMinusTwoLogTwo * kTwoToMinus23, s);
  return s > 0.0f ? s : 0.0f;
}

// (b, a) where the second highest bit of the word is set, else (a, b).
FM_HD void swap_by_bit(uint32_t word, float* a, float* b) {
  float first = *a, second = *b;
#if defined(__CUDA_ARCH__)
  // The test of a bit is one instruction, of which the compiler would make three.
  asm("{\n\t.reg .pred is_set;\n\t.reg .b32 bit, kept;\n\tand.b32 bit, %4, 0x40000000;\n\tsetp.ne.b32 is_set, bit, 0;\n\t"
      "selp.b32 kept, %3, %2, is_set;\n\tselp.b32 %1, %2, %3, is_set;\n\tmov.b32 %0, kept;\n\t}"
      : "=f"(*a), "=f"(*b)
      : "f"(first), "f"(second), "r"(word));
#else
  bool set = static_cast<int32_t>(word << 1) < 0;
  *a = set ? second : first;
  *b = set ? first : second;
#endif
}

// sin and cos of `word` / 2^32 turns. The two top bits (after rounding) are the quadrant, the rest is an angle in [-1/8, 1/8) turn.
FM_HD void sin_cos_of_turn(uint32_t word, float* sine, float* cosine) {
  uint32_t rounded = word + 0x20000000u;
  float y = static_cast<float>(static_cast<int32_t>(word << 2)) * 0x1p-31f;
  float y2 = y * y;
  constexpr Polynomial<4> sin = kSin;
  constexpr Polynomial<3> cos = kCos;
  float a = y * multiply_add(y2, multiply_add(y2, multiply_add(y2, sin.c[3], sin.c[2]), sin.c[1]), sin.c[0]);
  float b = multiply_add(y2, multiply_add(y2, multiply_add(y2, cos.c[2], cos.c[1]), cos.c[0]), 1.0f);
  swap_by_bit(rounded, &a, &b);
  uint32_t sine_bits = bit_cast<uint32_t>(a) ^ (rounded & kSignBit);
  uint32_t cosine_bits = bit_cast<uint32_t>(b) ^ ((rounded + 0x40000000u) & kSignBit);
  *sine = bit_cast<float>(sine_bits);
  *cosine = bit_cast<float>(cosine_bits);
}

FM_HD void normal_pair(uint32_t radius_word, uint32_t angle_word, float* even, float* odd) {
  float radius = square_root(minus_two_log(uniform_from_word(radius_word)));
  float sine, cosine;
  sin_cos_of_turn(angle_word, &sine, &cosine);
  *even = radius * cosine;
  *odd = radius * sine;
}

}  // namespace fm
