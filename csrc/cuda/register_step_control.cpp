// step_control, from torch's arguments to its kernel.
#include "kernels.h"
#include "ops.h"
#include "session.h"

namespace fm {
namespace cuda {

void step_control(StableIValue* stack, uint64_t, uint64_t) {
  abi::Arguments in(stack, kStepControlArguments);
  Session session(in);
  step_control(read_step_control(&in), session.stream());
}

}  // namespace cuda
}  // namespace fm
