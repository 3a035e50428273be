// Runs of stored numbers, to and from the compute type (float or double).
#pragma once

#include "../formats.h"
#include "kernels.h"
#include "simd.h"

namespace fm {
namespace FM_ISA {

template <class T>
struct DtypeOf;
template <>
struct DtypeOf<float> {
  static constexpr Dtype value = Dtype::float32;
};
template <>
struct DtypeOf<double> {
  static constexpr Dtype value = Dtype::float64;
};

template <class T, class S>
static void load_run(const S* __restrict from, int64_t stride, int64_t count, T* __restrict to) {
  if (stride == 1) {
    for (int64_t i = 0; i < count; ++i) to[i] = load_as<T>(from[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = load_as<T>(from[i * stride]);
  }
}

template <class T, class S>
static void store_run(const T* __restrict from, int64_t stride, int64_t count, S* __restrict to) {
  if (stride == 1) {
    for (int64_t i = 0; i < count; ++i) store_as(from[i], to + i);
  } else {
    for (int64_t i = 0; i < count; ++i) store_as(from[i], to + i * stride);
  }
}

#if defined(__F16C__)

template <>
[[maybe_unused]] void load_run(const Float16* __restrict from, int64_t stride, int64_t count, float* __restrict to) {
  int64_t i = 0;
  for (; stride == 1 && i + 8 <= count; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  for (; i < count; ++i) to[i] = _cvtsh_ss(from[i * stride].bits);
}

template <>
[[maybe_unused]] void store_run(const float* __restrict from, int64_t stride, int64_t count, Float16* __restrict to) {
  int64_t i = 0;
  for (; stride == 1 && i + 8 <= count; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
  for (; i < count; ++i) to[i * stride].bits = static_cast<uint16_t>(_cvtss_sh(from[i], _MM_FROUND_TO_NEAREST_INT));
}

#endif

}  // namespace FM_ISA
}  // namespace fm
