// The few vector operations the generators need, for AVX-512 and AVX2. The portable build has none and uses the scalar headers.
// Everything has internal linkage: the same names are compiled under different instruction sets.
#pragma once

#include <stdint.h>

#if defined(__AVX512F__) || defined(__AVX2__)
#define FM_SIMD 1
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 warns about its own _mm512_undefined
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#define FM_INLINE static inline __attribute__((always_inline))
#define FM_METHOD inline __attribute__((always_inline))

namespace fm {
namespace FM_ISA {

#if defined(__AVX512F__)

using Floats = __m512;
using Ints = __m512i;
constexpr int kLanes = 16;

FM_INLINE Ints all_ints(uint32_t value) { return _mm512_set1_epi32(static_cast<int>(value)); }
FM_INLINE Floats all_floats(float value) { return _mm512_set1_ps(value); }
FM_INLINE Ints load_ints(const uint32_t* from) { return _mm512_loadu_si512(from); }
FM_INLINE void store_floats(float* to, Floats value) { _mm512_storeu_ps(to, value); }
// Products of the even 32-bit lanes, 64 bits each.
FM_INLINE Ints multiply_even(Ints a, Ints b) { return _mm512_mul_epu32(a, b); }
FM_INLINE Ints high_halves(Ints products) { return _mm512_srli_epi64(products, 32); }
FM_INLINE Ints exclusive_or(Ints a, Ints b) { return _mm512_xor_si512(a, b); }
FM_INLINE Ints exclusive_or(Ints a, Ints b, Ints c) { return _mm512_ternarylogic_epi32(a, b, c, 0x96); }
// The low halves of `odd` beside those of `even`.
FM_INLINE Ints interleave_low_halves(Ints even, Ints odd) { return _mm512_mask_shuffle_epi32(even, 0xAAAA, odd, _MM_PERM_CCAA); }
FM_INLINE Ints interleave_high_halves(Ints even, Ints odd) { return _mm512_mask_shuffle_epi32(odd, 0x5555, even, _MM_PERM_DDBB); }
FM_INLINE Ints pick(Ints values, Ints indices) { return _mm512_permutexvar_epi32(indices, values); }
FM_INLINE Ints add_ints(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
FM_INLINE Ints subtract_ints(Ints a, Ints b) { return _mm512_sub_epi32(a, b); }
FM_INLINE Ints bits_and(Ints a, Ints b) { return _mm512_and_si512(a, b); }
FM_INLINE Ints times_four(Ints a) { return _mm512_slli_epi32(a, 2); }
FM_INLINE Floats to_floats(Ints a) { return _mm512_cvtepi32_ps(a); }
FM_INLINE Floats unsigned_to_floats(Ints a) { return _mm512_cvtepu32_ps(a); }
FM_INLINE Floats as_floats(Ints a) { return _mm512_castsi512_ps(a); }
FM_INLINE Ints as_ints(Floats a) { return _mm512_castps_si512(a); }
FM_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
FM_INLINE Floats fma_minus(Floats a, Floats b, Floats c) { return _mm512_fmsub_ps(a, b, c); }
FM_INLINE Floats times(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
FM_INLINE Floats root_of_positive(Floats a) { return _mm512_sqrt_ps(_mm512_max_ps(a, _mm512_setzero_ps())); }
// *a and *b change places where bit 30 of `selector` is set; `bit` holds that bit.
FM_INLINE void swap_where_bit_30(Ints selector, Ints bit, Floats* a, Floats* b) {
  __mmask16 mask = _mm512_test_epi32_mask(selector, bit);
  Floats first = _mm512_mask_blend_ps(mask, *a, *b);
  *b = _mm512_mask_blend_ps(mask, *b, *a);
  *a = first;
}
FM_INLINE Floats flip_sign(Floats a, Ints sign) {  // a ^ (sign & sign bit)
  return as_floats(_mm512_ternarylogic_epi32(as_ints(a), sign, all_ints(0x80000000u), 0x78));
}
// Lane l of each group of four is word column q: a transpose inside 128-bit groups.
FM_INLINE void transpose_groups(Floats z[4]) {
  __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(z[0], z[1])), b = _mm512_castps_pd(_mm512_unpacklo_ps(z[2], z[3]));
  __m512d c = _mm512_castps_pd(_mm512_unpackhi_ps(z[0], z[1])), d = _mm512_castps_pd(_mm512_unpackhi_ps(z[2], z[3]));
  z[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
  z[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
  z[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(c, d));
  z[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(c, d));
}

#elif defined(__AVX2__)

using Floats = __m256;
using Ints = __m256i;
constexpr int kLanes = 8;

FM_INLINE Ints all_ints(uint32_t value) { return _mm256_set1_epi32(static_cast<int>(value)); }
FM_INLINE Floats all_floats(float value) { return _mm256_set1_ps(value); }
FM_INLINE Ints load_ints(const uint32_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
FM_INLINE void store_floats(float* to, Floats value) { _mm256_storeu_ps(to, value); }
FM_INLINE Ints multiply_even(Ints a, Ints b) { return _mm256_mul_epu32(a, b); }
FM_INLINE Ints high_halves(Ints products) { return _mm256_srli_epi64(products, 32); }
FM_INLINE Ints exclusive_or(Ints a, Ints b) { return _mm256_xor_si256(a, b); }
FM_INLINE Ints exclusive_or(Ints a, Ints b, Ints c) { return exclusive_or(a, exclusive_or(b, c)); }
FM_INLINE Ints interleave_low_halves(Ints even, Ints odd) { return _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA); }
FM_INLINE Ints interleave_high_halves(Ints even, Ints odd) { return _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA); }
FM_INLINE Ints pick(Ints values, Ints indices) { return _mm256_permutevar8x32_epi32(values, indices); }
FM_INLINE Ints add_ints(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
FM_INLINE Ints subtract_ints(Ints a, Ints b) { return _mm256_sub_epi32(a, b); }
FM_INLINE Ints bits_and(Ints a, Ints b) { return _mm256_and_si256(a, b); }
FM_INLINE Ints times_four(Ints a) { return _mm256_slli_epi32(a, 2); }
FM_INLINE Floats to_floats(Ints a) { return _mm256_cvtepi32_ps(a); }
FM_INLINE Floats as_floats(Ints a) { return _mm256_castsi256_ps(a); }
FM_INLINE Ints as_ints(Floats a) { return _mm256_castps_si256(a); }
FM_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
FM_INLINE Floats fma_minus(Floats a, Floats b, Floats c) { return _mm256_fmsub_ps(a, b, c); }
FM_INLINE Floats times(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
// Both 16-bit halves are exact, so the fma rounds once, as the conversion would.
FM_INLINE Floats unsigned_to_floats(Ints a) {
  Floats high = to_floats(_mm256_srli_epi32(a, 16)), low = to_floats(bits_and(a, all_ints(0xffffu)));
  return fma(high, all_floats(65536.0f), low);
}
FM_INLINE Floats root_of_positive(Floats a) { return _mm256_sqrt_ps(_mm256_max_ps(a, _mm256_setzero_ps())); }
FM_INLINE void swap_where_bit_30(Ints selector, Ints, Floats* a, Floats* b) {
  Floats mask = as_floats(_mm256_slli_epi32(selector, 1));  // blendv reads the sign bit
  Floats first = _mm256_blendv_ps(*a, *b, mask);
  *b = _mm256_blendv_ps(*b, *a, mask);
  *a = first;
}
FM_INLINE Floats flip_sign(Floats a, Ints sign) { return _mm256_xor_ps(a, as_floats(bits_and(sign, all_ints(0x80000000u)))); }
FM_INLINE void transpose_groups(Floats z[4]) {
  __m256d a = _mm256_castps_pd(_mm256_unpacklo_ps(z[0], z[1])), b = _mm256_castps_pd(_mm256_unpacklo_ps(z[2], z[3]));
  __m256d c = _mm256_castps_pd(_mm256_unpackhi_ps(z[0], z[1])), d = _mm256_castps_pd(_mm256_unpackhi_ps(z[2], z[3]));
  z[0] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b));
  z[1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
  z[2] = _mm256_castpd_ps(_mm256_unpacklo_pd(c, d));
  z[3] = _mm256_castpd_ps(_mm256_unpackhi_pd(c, d));
}

#endif

}  // namespace FM_ISA
}  // namespace fm
