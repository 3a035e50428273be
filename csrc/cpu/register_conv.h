// What the ops of convolutions share on their way to the kernels.
#pragma once

#include "dispatch.h"
#include "ops.h"
#include "run.h"
#include "scratch.h"

namespace fm {

inline Dtype convolved_dtype(const abi::Tensor& x) {
  Dtype dtype = dtype_of(x);
  if (dtype != Dtype::float32 && dtype != Dtype::bfloat16 && dtype != Dtype::float16) x.fail("expected float32, bfloat16 or float16");
  return dtype;
}

// The memory of images [B, C, H, W] in channels_last without gaps.
inline void* channels_last(const abi::Tensor& tensor, Dtype dtype) {
  check_device(tensor);
  if (tensor.dim() != 4) tensor.fail("expected [B, C, H, W]");
  if (dtype_of(tensor) != dtype) tensor.fail("expected the dtype of x");
  const int64_t *n = tensor.sizes(), *stride = tensor.strides(), dense[4] = {n[1] * n[2] * n[3], 1, n[1] * n[3], n[1]};
  for (int i = 0; i < 4; ++i)
    if (n[i] > 1 && stride[i] != dense[i]) tensor.fail("expected channels_last memory without gaps");
  return tensor.data();
}

// A bias [channels], or nullptr where it is absent.
inline void* bias_of(const abi::Tensor& bias, int64_t channels, Dtype dtype) {
  if (bias.numel() == 0 && channels > 0) return nullptr;
  check_device(bias);
  if (bias.dim() != 1 || bias.sizes()[0] != channels || dtype_of(bias) != dtype) bias.fail("expected [O] of the dtype of x");
  return bias.data();
}

// Tiles whose transformed channels, all in all so many, are made at a time: they stay in the second-level cache, unless that would be too
// few for the work on what is read or summed for each of them.
inline int64_t tiles_at_a_time(int64_t channels) {
  constexpr int64_t kBytes = 432 << 10, kLeast = 24;
  int64_t fitting = kBytes / (kTileProducts * greater(channels, 1) * static_cast<int64_t>(sizeof(float)));
  return greater(fitting / 12 * 12, kLeast);
}

// Outputs whose numbers, so many for each, are in memory at a time: as many each time. Of pieces beyond 32 MiB glibc's allocator keeps
// none, and every call would wait for new pages.
inline int64_t outputs_at_a_time(int64_t outputs, int64_t numbers) {
  constexpr int64_t kBytes = 24 << 20, kMultiple = 64;  // of a tile of sums, and of a unit of gradients
  int64_t multiples = divide_up(outputs, kMultiple);
  int64_t most = greater(kBytes / (kMultiple * greater(numbers, 1) * static_cast<int64_t>(sizeof(float))), 1);
  return divide_up(multiples, greater(divide_up(multiples, most), 1)) * kMultiple;
}

}  // namespace fm
