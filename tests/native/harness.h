// What the native test programs share: the instruction sets of this CPU, tensors with guarded memory, and plain scalar references.
#pragma once

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "cpu/tiling.h"
#include "formats.h"
#include "loss.h"

namespace test {

using fm::Dtype;
using fm::Key;
using fm::Shape;
using fm::View;

// Numbers of a stored type, each another.
template <class S>
std::vector<S> numbers(int64_t count, double phase) {
  std::vector<S> found(static_cast<size_t>(count));
  for (size_t i = 0; i < found.size(); ++i) fm::store_as(static_cast<float>(std::sin(1.7 * static_cast<double>(i) + phase)), &found[i]);
  return found;
}

template <class S>
double at(const std::vector<S>& values, int64_t i) {
  return fm::load_as<double>(values[static_cast<size_t>(i)]);
}

// Memory that must be written to.
template <class S>
std::vector<S> unset(int64_t count) {
  std::vector<S> found(static_cast<size_t>(count));
  for (S& value : found) fm::store_as(NAN, &value);
  return found;
}

struct Isa {
  const char* name;
  fm::NoiseKernel noise;
  fm::ScheduleKernel schedule;
  fm::SampleKernel sample;
  fm::LossKernel loss;
  fm::StepKernel step;
  fm::ErrorKernel error;
  fm::ControlKernel control;
  fm::ParityKernel parity;
  fm::ProbeKernel probe;
  fm::DivergenceKernel divergence;
  fm::GradientNormKernel norm;
  fm::AdamwKernel adamw;
  fm::ConvKernel conv, conv_sums;
  fm::Conv3x3Kernel conv3x3_weights, conv3x3;
  fm::AttentionKernel attention, attention_backward;
  fm::AssignmentKernel assignment;
};

#define FM_KERNELS(isa)               \
  {#isa,                              \
   fm::isa::noise_units,              \
   fm::isa::schedule_units,           \
   fm::isa::path_sample_units,        \
   fm::isa::path_loss_units,          \
   fm::isa::linear_step_units,        \
   fm::isa::step_error_units,         \
   fm::isa::step_control_units,       \
   fm::isa::parity_units,             \
   fm::isa::probe_units,              \
   fm::isa::divergence_step_units,    \
   fm::isa::adamw_ema_norm_units,     \
   fm::isa::adamw_ema_units,          \
   fm::isa::conv_weight_grad_units,   \
   fm::isa::conv_weight_grad_sums,    \
   fm::isa::conv3x3_weights,          \
   fm::isa::conv3x3_units,            \
   fm::isa::attention_units,          \
   fm::isa::attention_backward_units, \
   fm::isa::assignment}

inline std::vector<Isa> instruction_sets() {
  std::vector<Isa> found = {FM_KERNELS(portable)};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) found.push_back(FM_KERNELS(avx2));
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    found.push_back(FM_KERNELS(avx512));
#if defined(FM_AVX512_BF16)
  if (__builtin_cpu_supports("avx512bf16")) found.push_back(FM_KERNELS(avx512_bf16));
#endif
#endif
  return found;
}

#undef FM_KERNELS

inline int failures = 0;

inline void expect(bool ok, const std::string& what) {
  if (ok || ++failures > 20) return;
  fprintf(stderr, "FAILED: %s\n", what.c_str());
}

inline bool close(double a, double b, double tolerance) {
  if (std::isnan(a) || std::isnan(b)) return std::isnan(a) && std::isnan(b);
  return a == b || std::fabs(a - b) <= tolerance * (1.0 + std::fabs(b));
}

enum class Layout { contiguous, channels_last, sliced, transposed_batch };

// A float32 or float64 tensor on the heap of exactly the elements it may touch, starting `skew` elements into its allocation.
template <class T>
class Tensor {
 public:
  Tensor(const Shape& shape, Layout layout, int64_t skew = 0) : shape_(shape), skew_(skew) {
    int64_t c = shape.channels, p = shape.positions;
    if (layout == Layout::contiguous) set(c * p, p, 1);
    if (layout == Layout::channels_last) set(c * p, 1, c);
    if (layout == Layout::sliced) set(2 * c * p + 3, p, 1);
    if (layout == Layout::transposed_batch) set(1, p * shape.batch, shape.batch);
    int64_t last = (shape.batch - 1) * view_.batch_stride + (c - 1) * view_.channel_stride + (p - 1) * view_.position_stride;
    bool empty = shape.batch * c * p == 0;
    memory_.reset(new T[static_cast<size_t>(skew + (empty ? 0 : last + 1))]());
    view_.data = memory_.get() + skew;
    view_.dtype = sizeof(T) == 8 ? Dtype::float64 : Dtype::float32;
  }

  View view() const { return view_; }
  T& at(int64_t b, int64_t c, int64_t p) {
    return static_cast<T*>(view_.data)[b * view_.batch_stride + c * view_.channel_stride + p * view_.position_stride];
  }

  template <class F>
  void for_each(const F& f) {
    for (int64_t b = 0; b < shape_.batch; ++b)
      for (int64_t c = 0; c < shape_.channels; ++c)
        for (int64_t p = 0; p < shape_.positions; ++p) f(b, c, p, at(b, c, p));
  }

  // Different numbers everywhere, from a Weyl sequence.
  void fill(uint32_t seed) {
    for_each(
        [&](int64_t, int64_t, int64_t, T& x) { x = static_cast<T>(static_cast<double>(seed += 0x9E3779B9u) / 4294967296.0 * 4.0 - 2.0); });
  }

 private:
  void set(int64_t batch, int64_t channel, int64_t position) {
    view_.batch_stride = batch;
    view_.channel_stride = channel;
    view_.position_stride = position;
  }

  Shape shape_;
  int64_t skew_;
  View view_ = {};
  std::unique_ptr<T[]> memory_;
};

inline uint32_t id_of(const Key& key, int64_t sample) { return static_cast<uint32_t>(key.ids ? key.ids[sample] : key.first_id + sample); }

// The normal of element (c, p) of a sample by the scalar headers.
inline float scalar_normal(const Shape& shape, const Key& key, uint32_t purpose, int64_t sample, int64_t c, int64_t p) {
  uint32_t block = static_cast<uint32_t>(c * ((shape.positions + 3) / 4) + p / 4);
  fm::Words w = fm::stream_words(fm::Stream{key.seed_low, key.seed_high, key.step, purpose}, id_of(key, sample), block);
  float z[4];
  fm::normal_pair(w.w[0], w.w[1], z, z + 1);
  fm::normal_pair(w.w[2], w.w[3], z + 2, z + 3);
  return z[p % 4];
}

}  // namespace test
