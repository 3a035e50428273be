// The arguments of linear_step, whose list of terms the caller finds room for.
#pragma once

#include "calls.h"
#include "unbox.h"

namespace fm {

class StepReader {
 public:
  explicit StepReader(abi::Arguments* in);

  const StepCall& call() const { return call_; }
  // The j-th term without its coefficient.
  StepTerm term(int64_t j) const { return StepTerm{halved_view(k_[j], x_), 0}; }

 private:
  abi::Tensor out_, copy_, x_;
  abi::TensorList k_;
  std::optional<abi::Tensor> kept_;
  StepCall call_ = {};
};

}  // namespace fm
