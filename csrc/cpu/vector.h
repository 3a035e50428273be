// Vectors of the compute type and of the stored types, one source for all instruction sets: GCC's vector extension, and intrinsics for the
// few operations that it does not reach. A vector is as wide as a register; the portable build's are those of SSE2 or NEON.
#pragma once

#include "convert.h"

namespace fm {
namespace FM_ISA {

#if defined(__AVX512F__)
constexpr int64_t kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int64_t kVectorBytes = 32;
#else
constexpr int64_t kVectorBytes = 16;
#endif

template <class T>
struct Vectors;
template <>
struct Vectors<float> {
  typedef float Type __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Integer __attribute__((vector_size(kVectorBytes)));
};
template <>
struct Vectors<double> {
  typedef double Type __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Integer __attribute__((vector_size(kVectorBytes)));
};

template <class T>
using Vector = typename Vectors<T>::Type;
template <class T>
using Integers = typename Vectors<T>::Integer;
template <class T>
constexpr int64_t kWidth = kVectorBytes / static_cast<int64_t>(sizeof(T));

// How much of a vector is there: all of it, or the first lanes.
struct Whole {};
struct First {
  int64_t lanes;
};

template <class T>
FM_INLINE Vector<T> all(T value) {
  return value - Vector<T>{};  // the compiler knows that x - 0 is x, which x + 0 is not of -0
}

// --- arithmetic ----------------------------------------------------------------------------------------------------------------------

FM_INLINE Vector<double> fused(Vector<double> a, Vector<double> b, Vector<double> c) { return a * b + c; }

#if defined(FM_SIMD)
FM_INLINE Vector<float> fused(Vector<float> a, Vector<float> b, Vector<float> c) { return fma(a, b, c); }
#else
FM_INLINE Vector<float> fused(Vector<float> a, Vector<float> b, Vector<float> c) { return a * b + c; }
#endif

// Of a NaN in `a`, NaN.
FM_INLINE Vector<float> between(Vector<float> a, float low, float high) {
#if defined(__AVX512F__)
  return _mm512_min_ps(all(high), _mm512_max_ps(all(low), a));
#elif defined(__AVX2__)
  return _mm256_min_ps(all(high), _mm256_max_ps(all(low), a));
#else
  a = a < low ? all(low) : a;
  return a > high ? all(high) : a;
#endif
}

// The lanes of `a` that are there, zero elsewhere.
template <class T>
FM_INLINE Vector<T> kept(Vector<T> a, Whole) {
  return a;
}
#if defined(__AVX512F__)
FM_INLINE __mmask16 mask_of(First first) { return static_cast<__mmask16>((1u << first.lanes) - 1u); }
template <class T>
FM_INLINE Vector<float> kept(Vector<float> a, First first) {
  return _mm512_maskz_mov_ps(mask_of(first), a);
}
template <class T>
FM_INLINE Vector<double> kept(Vector<double> a, First first) {
  return _mm512_maskz_mov_pd(static_cast<__mmask8>(mask_of(first)), a);
}
#else
template <class T>
FM_INLINE Vector<T> kept(Vector<T> a, First first) {
  for (int64_t i = first.lanes; i < kWidth<T>; ++i) a[i] = T(0);
  return a;
}
#endif

template <class T>
FM_INLINE T sum_of_lanes(Vector<T> a) {
  T sum = a[0];
  for (int64_t i = 1; i < kWidth<T>; ++i) sum += a[i];
  return sum;
}

// --- loads and stores ----------------------------------------------------------------------------------------------------------------

typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));

FM_INLINE Vector<float> load_whole(const float* from) {
  Vector<float> v;
  __builtin_memcpy(&v, from, sizeof(v));
  return v;
}
FM_INLINE Vector<double> load_whole(const double* from) {
  Vector<double> v;
  __builtin_memcpy(&v, from, sizeof(v));
  return v;
}
FM_INLINE void store_whole(float* to, Vector<float> v) { __builtin_memcpy(to, &v, sizeof(v)); }
FM_INLINE void store_whole(double* to, Vector<double> v) { __builtin_memcpy(to, &v, sizeof(v)); }

// The upper halves of the floats, rounded to the nearest even one, in the lower halves.
FM_INLINE Bits bfloat16_bits(Vector<float> v) {
  Bits bits = reinterpret_cast<Bits>(v), rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return v != v ? Bits{} + 0x7fc0u : rounded;
}

#if defined(__AVX512F__)
FM_INLINE Vector<float> from_bfloat16(__m256i stored) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(stored), 16)); }
FM_INLINE __m256i to_bfloat16_bits(Vector<float> v) { return _mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(bfloat16_bits(v))); }
FM_INLINE Vector<float> load_whole(const Bfloat16* from) {
  return from_bfloat16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
FM_INLINE void store_whole(Bfloat16* to, Vector<float> v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), to_bfloat16_bits(v)); }
FM_INLINE Vector<float> load_whole(const Float16* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
FM_INLINE void store_whole(Float16* to, Vector<float> v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__AVX2__)
FM_INLINE Vector<float> load_whole(const Bfloat16* from) {
  __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
}
FM_INLINE void store_whole(Bfloat16* to, Vector<float> v) {
  __m256i bits = reinterpret_cast<__m256i>(bfloat16_bits(v)), packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(bits, bits), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(packed));
}
FM_INLINE Vector<float> load_whole(const Float16* from) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))); }
FM_INLINE void store_whole(Float16* to, Vector<float> v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
#else
FM_INLINE Vector<float> load_whole(const Bfloat16* from) {
  Halves h;
  __builtin_memcpy(&h, from, sizeof(h));
  return reinterpret_cast<Vector<float>>(__builtin_convertvector(h, Bits) << 16);
}
FM_INLINE void store_whole(Bfloat16* to, Vector<float> v) {
  Halves h = __builtin_convertvector(bfloat16_bits(v), Halves);
  __builtin_memcpy(to, &h, sizeof(h));
}
FM_INLINE Vector<float> load_whole(const Float16* from) {
  Vector<float> v;
  for (int64_t i = 0; i < kWidth<float>; ++i) v[i] = widen(from[i]);
  return v;
}
FM_INLINE void store_whole(Float16* to, Vector<float> v) {
  for (int64_t i = 0; i < kWidth<float>; ++i) to[i] = to_float16(v[i]);
}
#endif

// The type that a stored type is computed in.
template <class S>
struct ComputeOf {
  using Type = float;
};
template <>
struct ComputeOf<double> {
  using Type = double;
};
template <class S>
using Compute = typename ComputeOf<S>::Type;

template <class S>
FM_INLINE Vector<Compute<S>> load(const S* from, Whole) {
  return load_whole(from);
}
#if defined(__AVX512F__)
FM_INLINE Vector<float> load(const float* from, First first) { return _mm512_maskz_loadu_ps(mask_of(first), from); }
FM_INLINE Vector<double> load(const double* from, First first) {
  return _mm512_maskz_loadu_pd(static_cast<__mmask8>(mask_of(first)), from);
}
FM_INLINE Vector<float> load(const Bfloat16* from, First first) { return from_bfloat16(_mm256_maskz_loadu_epi16(mask_of(first), from)); }
FM_INLINE Vector<float> load(const Float16* from, First first) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask_of(first), from)); }
#else
template <class S>
FM_INLINE Vector<Compute<S>> load(const S* from, First first) {
  S lanes[kWidth<Compute<S>>] = {};
  for (int64_t i = 0; i < first.lanes; ++i) lanes[i] = from[i];
  return load_whole(lanes);
}
#endif

template <class S>
FM_INLINE void store(S* to, Vector<Compute<S>> v, Whole) {
  store_whole(to, v);
}
#if defined(__AVX512F__)
FM_INLINE void store(float* to, Vector<float> v, First first) { _mm512_mask_storeu_ps(to, mask_of(first), v); }
FM_INLINE void store(double* to, Vector<double> v, First first) { _mm512_mask_storeu_pd(to, static_cast<__mmask8>(mask_of(first)), v); }
FM_INLINE void store(Bfloat16* to, Vector<float> v, First first) { _mm256_mask_storeu_epi16(to, mask_of(first), to_bfloat16_bits(v)); }
FM_INLINE void store(Float16* to, Vector<float> v, First first) {
  _mm256_mask_storeu_epi16(to, mask_of(first), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
#else
template <class S>
FM_INLINE void store(S* to, Vector<Compute<S>> v, First first) {
  S lanes[kWidth<Compute<S>>];
  store_whole(lanes, v);
  for (int64_t i = 0; i < first.lanes; ++i) to[i] = lanes[i];
}
#endif

}  // namespace FM_ISA
}  // namespace fm
