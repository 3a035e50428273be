// path_sample, from torch's arguments to its kernels.
#include "dispatch.h"
#include "ops.h"
#include "run.h"

namespace fm {

constexpr int64_t kScheduleGrain = 2048;  // samples of a thread

void path_sample(StableIValue* stack, uint64_t, uint64_t) {
  abi::Arguments in(stack, kPathSampleArguments);
  SampleArgs args = {read_path_sample(&in), {}, {}};
  args.key = key_of(args.key_words);
  args.tiling = plan(&args.shape, {&args.x_t, &args.x1, &args.x0}, kDrawnNumbers);
  if (args.schedule.path.kind != kPathGiven)
    run_units(kernels().schedule, ScheduleArgs{args.schedule, args.key}, args.shape.batch, kScheduleGrain);
  run_units(kernels().path_sample, args, args.tiling.units, kGrain);
}

}  // namespace fm
