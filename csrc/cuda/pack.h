// Neighbouring elements of a tensor moved in 16-byte accesses, and single ones of any dtype.
#pragma once

#include "../formats.h"
#include "../tensors.h"
#include "device.h"

namespace fm {
namespace cuda {

constexpr int access_bytes(int bytes) { return bytes < 16 ? bytes : 16; }

// The bits of kCount elements, in the words of 16-byte accesses.
template <class S, int kCount>
struct alignas(access_bytes(sizeof(S) * kCount)) Pack {
  static constexpr int kWords = static_cast<int>(sizeof(S)) * kCount / 4;
  uint32_t words[kWords];
};

template <class S, int kCount>
FM_HD Pack<S, kCount> load_pack(const void* data, int64_t offset) {
  return *reinterpret_cast<const Pack<S, kCount>*>(static_cast<const S*>(data) + offset);
}

FM_HD void widen_word(uint32_t word, float* to, float) { *to = bit_cast<float>(word); }

FM_HD void widen_word(uint32_t word, float* to, Bfloat16) {
  to[0] = bit_cast<float>(word << 16);
  to[1] = bit_cast<float>(word & 0xffff0000u);
}

FM_HD void widen_word(uint32_t word, float* to, Float16) {
  to[0] = widen(Float16{static_cast<uint16_t>(word)});
  to[1] = widen(Float16{static_cast<uint16_t>(word >> 16)});
}

FM_HD void widen_word(uint32_t word, float* to, uint8_t) {
  for (int i = 0; i < 4; ++i) to[i] = static_cast<float>(word >> (8 * i) & 0xffu);
}

template <class S, int kCount>
FM_HD void widen_pack(const Pack<S, kCount>& pack, float (&to)[kCount]) {
  for (int i = 0; i < pack.kWords; ++i) widen_word(pack.words[i], to + i * (4 / static_cast<int>(sizeof(S))), S{});
}

template <class S, int kCount>
FM_HD void move_pack(const Pack<S, kCount>& pack, S* to) {
  *reinterpret_cast<Pack<S, kCount>*>(to) = pack;
}

FM_HD uint32_t reversed_word(uint32_t word, float) { return word; }
FM_HD uint32_t reversed_word(uint32_t word, Bfloat16) { return word << 16 | word >> 16; }
FM_HD uint32_t reversed_word(uint32_t word, Float16) { return word << 16 | word >> 16; }
FM_HD uint32_t reversed_word(uint32_t word, uint8_t) { return word << 24 | (word & 0xff00u) << 8 | (word >> 8 & 0xff00u) | word >> 24; }

template <class S, int kCount>
FM_HD Pack<S, kCount> reversed(const Pack<S, kCount>& pack) {
  Pack<S, kCount> result;
  for (int i = 0; i < pack.kWords; ++i) result.words[i] = reversed_word(pack.words[pack.kWords - 1 - i], S{});
  return result;
}

// Two numbers rounded to 16 bits each, the first in the low half.
FM_HD uint32_t narrow_pair(float low, float high, Bfloat16) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#else
  return to_bfloat16(low).bits | static_cast<uint32_t>(to_bfloat16(high).bits) << 16;
#endif
}

FM_HD uint32_t narrow_pair(float low, float high, Float16) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#else
  return to_float16(low).bits | static_cast<uint32_t>(to_float16(high).bits) << 16;
#endif
}

template <int kCount>
FM_HD void store_pack(float* data, int64_t offset, const float (&values)[kCount]) {
  Pack<float, kCount> pack;
  for (int i = 0; i < kCount; ++i) pack.words[i] = bit_cast<uint32_t>(values[i]);
  *reinterpret_cast<Pack<float, kCount>*>(data + offset) = pack;
}

template <class S, int kCount>
FM_HD void store_pack(S* data, int64_t offset, const float (&values)[kCount]) {
  Pack<S, kCount> pack;
  for (int i = 0; i < kCount / 2; ++i) pack.words[i] = narrow_pair(values[2 * i], values[2 * i + 1], S{});
  *reinterpret_cast<Pack<S, kCount>*>(data + offset) = pack;
}

// An element of a tensor whose dtype is known when the kernel runs.
template <class T>
FM_HD T load_any(const View& view, int64_t offset) {
  switch (view.dtype) {
    case Dtype::float32:
      return load_as<T>(static_cast<const float*>(view.data)[offset]);
    case Dtype::float64:
      return load_as<T>(static_cast<const double*>(view.data)[offset]);
    case Dtype::bfloat16:
      return load_as<T>(static_cast<const Bfloat16*>(view.data)[offset]);
    case Dtype::float16:
      return load_as<T>(static_cast<const Float16*>(view.data)[offset]);
    default:
      return load_as<T>(static_cast<const uint8_t*>(view.data)[offset]);
  }
}

template <class T>
FM_HD void store_any(const View& view, int64_t offset, T value) {
  switch (view.dtype) {
    case Dtype::float32:
      return store_as(value, static_cast<float*>(view.data) + offset);
    case Dtype::float64:
      return store_as(value, static_cast<double*>(view.data) + offset);
    case Dtype::bfloat16:
      return store_as(value, static_cast<Bfloat16*>(view.data) + offset);
    default:
      return store_as(value, static_cast<Float16*>(view.data) + offset);
  }
}

// Whether samples follow each other as one row of packs of `width` elements that begins on their boundary.
inline bool is_packed(const View& view, const Shape& shape, int64_t width) {
  int64_t elements = shape.channels * shape.positions;
  uintptr_t boundary = static_cast<uintptr_t>(access_bytes(static_cast<int>(element_size(view.dtype) * width)));
  bool row = view.position_stride == 1 && (shape.channels == 1 || view.channel_stride == shape.positions);
  return !view.data ||
         (row && (shape.batch == 1 || view.batch_stride == elements) && reinterpret_cast<uintptr_t>(view.data) % boundary == 0);
}

}  // namespace cuda
}  // namespace fm
