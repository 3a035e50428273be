// The arguments of step_error, whose list of terms the caller finds room for.
#pragma once

#include "calls.h"
#include "unbox.h"

namespace fm {

class ErrorReader {
 public:
  explicit ErrorReader(abi::Arguments* in);

  const ErrorCall& call() const { return call_; }
  View term(int64_t j) const { return float_view(k_[j], y_); }

 private:
  abi::Tensor means_, y_, end_;
  abi::TensorList k_;
  ErrorCall call_ = {};
};

}  // namespace fm
