// The arguments of step_error.
#include "read_step_error.h"

namespace fm {

ErrorReader::ErrorReader(abi::Arguments* in)
    : means_(in->tensor("means")), y_(in->tensor("y")), end_(in->tensor("end")), k_(in->tensors("k")) {
  abi::Tensor coefficients = in->tensor("coefficients");
  refuse_grad({&y_, &end_});
  refuse_grad(k_);
  call_.shape = shape_of(y_);
  call_.count = k_.size();
  if (call_.count < 1) throw std::runtime_error("fm_fast: argument k: expected at least one tensor");
  call_.coefficients = dense_doubles(coefficients, call_.count);
  call_.rtol = in->number();
  call_.atol = in->number();
  call_.means = dense_doubles(means_, call_.shape.batch);
  call_.y = float_view(y_, y_);
  call_.end = float_view(end_, y_);
  call_.wide = call_.y.dtype == Dtype::float64 || call_.end.dtype == Dtype::float64;
}

}  // namespace fm
