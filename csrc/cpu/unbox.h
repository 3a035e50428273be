// From torch tensors to the views of kernels.h, with every check that memory safety needs.
// (Friendly errors are Python's work: these are the last line of defence of a raw op call.)
#pragma once

#include <initializer_list>

#include "../torch_abi.h"
#include "kernels.h"
#include "tiling.h"

namespace fm {

// Dtype of a tensor; fails for those we do not know.
Dtype dtype_of(const abi::Tensor& tensor);
bool is_wide(const abi::Tensor& tensor);

// [B, C, P] of a data tensor.
Shape shape_of(const abi::Tensor& tensor);

// View of a tensor with the sizes of `like`; an optional tensor without elements is absent.
View view_of(const abi::Tensor& tensor, const abi::Tensor& like);
View float_view(const abi::Tensor& tensor, const abi::Tensor& like);
View float_view_or_absent(const abi::Tensor& tensor, const abi::Tensor& like);

// Dense float32 or float64 tensors of `numel` elements: t, coef, weights.
void* dense_floats(const abi::Tensor& tensor, int64_t numel);

// (seed, step, first id) or (seed, step, one id a sample).
Key key_of(const abi::Tensor& key, int64_t batch);

// Fails if gradients are being recorded and one of the inputs wants its own: raw ops have no derivative.
void refuse_grad(std::initializer_list<const abi::Tensor*> inputs);

// Runs kernel(args, begin, end) over `units` on torch's threads, at least `grain` of them on each.
template <class Args>
void run_units(void (*kernel)(const Args&, int64_t, int64_t), const Args& args, int64_t units, int64_t grain) {
  struct Call {
    void (*kernel)(const Args&, int64_t, int64_t);
    const Args& args;
  } call = {kernel, args};
  auto body = [](int64_t begin, int64_t end, void* context) {
    const Call& c = *static_cast<const Call*>(context);
    c.kernel(c.args, begin, end);
  };
  if (units > 0) abi::check(torch_parallel_for(0, units, grain, body, &call), "parallel_for");
}

}  // namespace fm
