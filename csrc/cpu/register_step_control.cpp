// step_control, from torch's arguments to its kernel.
#include "dispatch.h"
#include "ops.h"
#include "run.h"

namespace fm {

void step_control(StableIValue* stack, uint64_t, uint64_t) {
  abi::Arguments in(stack, kStepControlArguments);
  ControlCall call = read_step_control(&in);
  run_units(kernels().step_control, call, (call.batch + kControlSamples - 1) / kControlSamples, kGrain);
}

}  // namespace fm
