// path_loss and its backward, from torch's arguments to their kernels.
#include "kernels.h"
#include "ops.h"
#include "session.h"

namespace fm {
namespace cuda {

void path_loss(StableIValue* stack, uint64_t, uint64_t) {
  abi::Arguments in(stack, kPathLossArguments);
  Session session(in);
  LossCall call = read_path_loss(&in);
  path_loss(call, session.scratch<double>(path_loss_scratch(call)), session.stream());
}

void path_loss_backward(StableIValue* stack, uint64_t, uint64_t) {
  abi::Arguments in(stack, kPathLossBackwardArguments);
  Session session(in);
  path_loss(read_path_loss_backward(&in), nullptr, session.stream());
}

}  // namespace cuda
}  // namespace fm
