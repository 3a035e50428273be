// The per-channel numbers of group_norm_silu, of any floating dtype.
#pragma once

#include "convert.h"

namespace fm {
namespace FM_ISA {

// Entry (b, c) of a [B, C] tensor, or of a [C] tensor with batch stride 0; `absent` where there is none.
FM_INLINE double parameter(const View& view, int64_t b, int64_t c, double absent) {
  if (!view.data) return absent;
  int64_t i = b * view.batch_stride + c * view.channel_stride;
  switch (view.dtype) {
    case Dtype::float64:
      return static_cast<const double*>(view.data)[i];
    case Dtype::bfloat16:
      return widen(static_cast<const Bfloat16*>(view.data)[i]);
    case Dtype::float16:
      return widen(static_cast<const Float16*>(view.data)[i]);
    default:
      return static_cast<const float*>(view.data)[i];
  }
}

FM_INLINE void put_parameter(const View& view, int64_t b, int64_t c, double value) {
  if (!view.data) return;
  int64_t i = b * view.batch_stride + c * view.channel_stride;
  switch (view.dtype) {
    case Dtype::float64:
      return store_as(value, static_cast<double*>(view.data) + i);
    case Dtype::bfloat16:
      return store_as(value, static_cast<Bfloat16*>(view.data) + i);
    case Dtype::float16:
      return store_as(value, static_cast<Float16*>(view.data) + i);
    default:
      return store_as(value, static_cast<float*>(view.data) + i);
  }
}

// z = xhat gain + offset, after the norm's own weight and bias and the modulation.
struct Affine {
  double gain, offset;
};

FM_INLINE Affine affine(const NormArgs& args, int64_t b, int64_t c) {
  double factor = 1.0 + parameter(args.scale, b, c, 0.0);
  return Affine{parameter(args.weight, 0, c, 1.0) * factor, parameter(args.bias, 0, c, 0.0) * factor + parameter(args.shift, b, c, 0.0)};
}

}  // namespace FM_ISA
}  // namespace fm
