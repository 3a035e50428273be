// The torch-free layer: what the CPU kernels read and write, and how work is cut into units.
// Plain data only: this header is compiled under several instruction sets.
#pragma once

#include "../path.h"

namespace fm {

enum class Dtype : int { float32, float64, float16, bfloat16, uint8, int64 };

// A [B, C, P] tensor by element strides. data == nullptr: absent.
struct View {
  void* data;
  Dtype dtype;
  int64_t batch_stride, channel_stride, point_stride;
};

// C = dimension 1 where there are more than two dimensions, else 1. width = size of the last dimension (what a flip mirrors).
struct Shape {
  int64_t batch, channels, points, width;
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

// A unit is the smallest piece of work given to a thread: some whole samples, or one tile of one sample.
// The cut depends on shapes and layouts only, never on the number of threads, and so do all sums.
struct Tiling {
  int64_t tile_channels, tile_points, channel_tiles, point_tiles, samples_per_unit, units;
};

enum class DrawKind : int { normal = 0, uniform = 1, sign = 2, word = 3 };

struct NoiseArgs {
  Shape shape;
  Tiling tiling;
  View out;
  Key key;
  DrawKind kind;
  uint32_t tag;
};

struct SampleArgs {
  Shape shape;
  Tiling tiling;
  View x_t, x1, x0;
  Key key;
  DataTransform transform;
  const void* coefficients;  // [B, 6], float32 or float64
  Dtype coefficient_dtype;
  bool wide;  // computes in double
};

struct LossArgs {
  Shape shape;
  Tiling tiling;
  View o, x1, x0, grad, weight;  // grad, weight: may be absent
  Key key;
  DataTransform transform;
  const void* coefficients;
  Dtype coefficient_dtype;
  const void* sample_weight;  // [B] float32 or float64, or nullptr
  Dtype sample_weight_dtype;
  View grad_output;    // strides (batch, -, -), or absent for 1
  double grad_factor;  // 2 over the reduction's divisor
  double* partial;     // [B, channel_tiles * point_tiles] sums of the loss, or nullptr
  bool wide;
};

// Run units begin <= i < end.
using NoiseKernel = void (*)(const NoiseArgs&, int64_t begin, int64_t end);
using SampleKernel = void (*)(const SampleArgs&, int64_t begin, int64_t end);
using LossKernel = void (*)(const LossArgs&, int64_t begin, int64_t end);

#define FM_DECLARE_KERNELS(isa)                                               \
  namespace isa {                                                             \
  void noise_units(const NoiseArgs& args, int64_t begin, int64_t end);        \
  void path_sample_units(const SampleArgs& args, int64_t begin, int64_t end); \
  void path_loss_units(const LossArgs& args, int64_t begin, int64_t end);     \
  }
FM_DECLARE_KERNELS(portable)
#if defined(__x86_64__)
FM_DECLARE_KERNELS(avx2)
FM_DECLARE_KERNELS(avx512)
#endif
#undef FM_DECLARE_KERNELS

}  // namespace fm
