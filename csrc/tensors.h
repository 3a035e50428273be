// Tensors, noise keys and data maps as every backend's kernels see them: plain data, without torch.
#pragma once

#include "philox.h"

namespace fm {

enum class Dtype : int { float32, float64, float16, bfloat16, uint8, int64 };

static inline int64_t element_size(Dtype dtype) {
  constexpr int64_t kSizes[] = {4, 8, 2, 2, 1, 8};
  return kSizes[static_cast<int>(dtype)];
}

// A [B, C, P] tensor by element strides. data == nullptr: absent.
struct View {
  void* data;
  Dtype dtype;
  int64_t batch_stride, channel_stride, position_stride;
};

// C = dimension 1 where there are more than two dimensions, else 1. width = size of the last dimension (what a flip mirrors).
struct Shape {
  int64_t batch, channels, positions, width;
};

// Sample b has id ids[b], or first_id + b where ids is nullptr.
struct Key {
  uint32_t seed_low, seed_high, step;
  int64_t first_id;
  const int64_t* ids;
};

// How x1 becomes data: mirrored with this probability; uint8 mapped with these levels.
struct DataTransform {
  double flip, levels;
  bool dequantise;
};

// A tensor [B, ...], or the two halves of a tensor [2B, ...] (second == nullptr: one tensor).
struct HalvedView {
  View first;
  void* second;
};

enum class DrawKind : int { normal = 0, uniform = 1, sign = 2, word = 3 };

// The int64 key tensor: (seed, step, first id), or (seed, step, one id a sample) where `listed`. In memory of the op's device.
struct KeyWords {
  const int64_t* words;
  bool listed;
};

FM_HD Key key_of(const KeyWords& key) {
  uint64_t seed = static_cast<uint64_t>(key.words[0]);
  return Key{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), static_cast<uint32_t>(key.words[1]),
             key.listed ? 0 : key.words[2], key.listed ? key.words + 2 : nullptr};
}

FM_HD uint32_t sample_id(const Key& key, int64_t sample) {
  return static_cast<uint32_t>(key.ids ? key.ids[sample] : key.first_id + sample);
}

FM_HD Stream stream_of(const Key& key, uint32_t purpose) { return Stream{key.seed_low, key.seed_high, key.step, purpose}; }

// A float32 or float64 number.
FM_HD double number_at(const void* data, Dtype dtype, int64_t index) {
  return dtype == Dtype::float64 ? static_cast<const double*>(data)[index] : static_cast<double>(static_cast<const float*>(data)[index]);
}

}  // namespace fm
