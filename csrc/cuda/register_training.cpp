// The ops of training, from torch's arguments to kernels: noise, path_sample, path_loss and its backward.
#include "kernels.h"
#include "ops.h"
#include "session.h"

namespace fm {
namespace cuda {

using abi::Arguments;

void noise(StableIValue* stack, uint64_t, uint64_t) {
  Arguments in(stack, kNoiseArguments);
  Session session(in);
  noise(read_noise(&in), session.stream());
}

void path_sample(StableIValue* stack, uint64_t, uint64_t) {
  Arguments in(stack, kPathSampleArguments);
  Session session(in);
  path_sample(read_path_sample(&in), session.stream());
}

void path_loss(StableIValue* stack, uint64_t, uint64_t) {
  Arguments in(stack, kPathLossArguments);
  Session session(in);
  LossCall call = read_path_loss(&in);
  path_loss(call, session.scratch<double>(path_loss_scratch(call)), session.stream());
}

void path_loss_backward(StableIValue* stack, uint64_t, uint64_t) {
  Arguments in(stack, kPathLossBackwardArguments);
  Session session(in);
  path_loss(read_path_loss_backward(&in), nullptr, session.stream());
}

}  // namespace cuda
}  // namespace fm
