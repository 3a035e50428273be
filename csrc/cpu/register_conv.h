// What the ops of convolutions share on their way to the kernels.
#pragma once

#include "dispatch.h"
#include "ops.h"
#include "run.h"
#include "scratch.h"

namespace fm {

// The memory of a float32 image [B, C, H, W] in channels_last without gaps.
inline float* channels_last(const abi::Tensor& tensor) {
  check_device(tensor);
  if (tensor.dim() != 4) tensor.fail("expected [B, C, H, W]");
  if (dtype_of(tensor) != Dtype::float32) tensor.fail("expected float32");
  const int64_t *n = tensor.sizes(), *stride = tensor.strides(), dense[4] = {n[1] * n[2] * n[3], 1, n[1] * n[3], n[1]};
  for (int i = 0; i < 4; ++i)
    if (n[i] > 1 && stride[i] != dense[i]) tensor.fail("expected channels_last memory without gaps");
  return static_cast<float*>(tensor.data());
}

// A bias [channels], or nullptr where it is absent.
inline float* bias_of(const abi::Tensor& bias, int64_t channels) {
  if (bias.numel() == 0 && channels > 0) return nullptr;
  check_device(bias);
  if (bias.dim() != 1 || bias.sizes()[0] != channels || dtype_of(bias) != Dtype::float32) bias.fail("expected float32 [O]");
  return static_cast<float*>(bias.data());
}

// Tiles of Winograd's algorithm whose transformed channels, all in all so many, stay in the second-level cache; kernels take 12 or 6.
inline int64_t tiles_at_a_time(int64_t channels) {
  constexpr int64_t kBytes = 200 << 10, kTileProducts = 16;
  return greater(kBytes / (kTileProducts * greater(channels, 1) * static_cast<int64_t>(sizeof(float))) / 12, 1) * 12;
}

}  // namespace fm
