// What lets one scalar function compile for the CPU (once per instruction set) and for CUDA.
// Every shared function has internal linkage: copies built with different -m flags must never be merged by the linker.
#pragma once

#include <stddef.h>

#include <math.h>
#include <stdint.h>

#if defined(__CUDACC__)
#define FM_HD static __host__ __device__ __forceinline__
#define FM_UNROLL _Pragma("unroll")
#else
#define FM_HD static inline
#define FM_UNROLL
#endif

namespace fm {

template <class To, class From>
FM_HD To bit_cast(From value) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To result;
  __builtin_memcpy(&result, &value, sizeof(To));
  return result;
}

template <class T>
FM_HD T magnitude(T a) {
  return a < 0 ? -a : a;
}

// NaN if one of them is.
template <class T>
FM_HD T larger(T a, T b) {
  return a > b || a != a ? a : b;
}

// One rounding where the hardware has it. A library fma on a CPU without the instruction would cost hundreds of cycles.
FM_HD float multiply_add(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return fmaf(a, b, c);
#elif defined(__FMA__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

FM_HD double multiply_add(double a, double b, double c) {
#if defined(__CUDA_ARCH__)
  return fma(a, b, c);
#elif defined(__FMA__)
  return __builtin_fma(a, b, c);
#else
  return a * b + c;
#endif
}

// Of zero or a normal number. The exactly rounded root costs a GPU eight instructions, this one costs one and is off by one ulp at most.
FM_HD float square_root(float x) {
#if defined(__CUDA_ARCH__)
  float root;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(x));
  return root;
#else
  return sqrtf(x);
#endif
}

}  // namespace fm
