// Between stored dtypes and the compute type (float or double): bf16 and fp16 round to nearest even, as torch does.
#pragma once

#include "hd.h"

namespace fm {

struct Bfloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

FM_HD float widen(Bfloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

FM_HD Bfloat16 to_bfloat16(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint16_t rounded_by_hardware;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded_by_hardware) : "f"(x));
  return Bfloat16{rounded_by_hardware};
#else
  uint32_t bits = bit_cast<uint32_t>(x), rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return Bfloat16{static_cast<uint16_t>(x != x ? 0x7fc0u : rounded)};
#endif
}

// A float16's exponent and fraction, moved to a float's place, are 2^-112 too small; infinities and NaN then need their exponent back.
FM_HD float widen(Float16 x) {
#if defined(__CUDA_ARCH__)
  float widened;
  asm("cvt.f32.f16 %0, %1;" : "=f"(widened) : "h"(x.bits));
  return widened;
#else
  uint32_t magnitude = x.bits & 0x7fffu, sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  float scaled = bit_cast<float>(magnitude << 13) * 0x1p112f;
  if (magnitude < 0x400u) scaled = static_cast<float>(magnitude) * 0x1p-24f;  // else lost where subnormal floats count as zero
  uint32_t bits = magnitude >= 0x7c00u ? (magnitude << 13) | 0x7f800000u : bit_cast<uint32_t>(scaled);
  return bit_cast<float>(bits | sign);
#endif
}

// Adding a power of two whose last bit is the float16's last bit makes the float adder do the rounding (subnormals share one such power).
FM_HD Float16 to_float16(float x) {
#if defined(__CUDA_ARCH__)
  uint16_t rounded_by_hardware;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(rounded_by_hardware) : "f"(x));
  return Float16{rounded_by_hardware};
#else
  uint32_t bits = bit_cast<uint32_t>(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return Float16{static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return Float16{static_cast<uint16_t>(sign | 0x7c00u)};
  uint32_t exponent = magnitude >> 23, last = exponent < 113u ? 113u : exponent;
  float anchor = bit_cast<float>((last + 13u) << 23);
  uint32_t fraction = bit_cast<uint32_t>(bit_cast<float>(magnitude) + anchor) - bit_cast<uint32_t>(anchor);
  return Float16{static_cast<uint16_t>(sign + fraction + ((last - 113u) << 10))};
#endif
}

template <class T>
FM_HD T load_as(float x) {
  return static_cast<T>(x);
}
template <class T>
FM_HD T load_as(double x) {
  return static_cast<T>(x);
}
template <class T>
FM_HD T load_as(uint8_t x) {
  return static_cast<T>(x);
}
template <class T>
FM_HD T load_as(Bfloat16 x) {
  return static_cast<T>(widen(x));
}
template <class T>
FM_HD T load_as(Float16 x) {
  return static_cast<T>(widen(x));
}

FM_HD void store_as(float x, float* to) { *to = x; }
FM_HD void store_as(float x, double* to) { *to = x; }
FM_HD void store_as(double x, float* to) { *to = static_cast<float>(x); }
FM_HD void store_as(double x, double* to) { *to = x; }
template <class T>
FM_HD void store_as(T x, Bfloat16* to) {
  *to = to_bfloat16(static_cast<float>(x));
}
template <class T>
FM_HD void store_as(T x, Float16* to) {
  *to = to_float16(static_cast<float>(x));
}

}  // namespace fm
