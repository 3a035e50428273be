// The ops of training, from torch's arguments to kernels: noise, path_sample, path_loss and its backward.
#include "../loss.h"
#include "dispatch.h"
#include "ops.h"
#include "scratch.h"
#include "unbox.h"

namespace fm {
namespace {

using abi::Arguments;

constexpr int64_t kScheduleGrain = 2048;  // samples of a thread

const Drawn& drawn_for(DrawKind kind) {
  if (kind == DrawKind::sign) return kDrawnSigns;
  return kind == DrawKind::word ? kDrawnWords : kDrawnNumbers;
}

}  // namespace

// --- noise ---------------------------------------------------------------------------------------------------------------------------

void noise(StableIValue* stack, uint64_t, uint64_t) {
  Arguments in(stack, kNoiseArguments);
  NoiseArgs args = {read_noise(&in), {}, {}};
  args.key = key_of(args.key_words);
  args.tiling = plan(&args.shape, {&args.out}, drawn_for(args.kind));
  run_units(kernels().noise, args, args.tiling.units, kGrain);
}

// --- path_sample ---------------------------------------------------------------------------------------------------------------------

void path_sample(StableIValue* stack, uint64_t, uint64_t) {
  Arguments in(stack, kPathSampleArguments);
  SampleArgs args = {read_path_sample(&in), {}, {}};
  args.key = key_of(args.key_words);
  args.tiling = plan(&args.shape, {&args.x_t, &args.x1, &args.x0}, kDrawnNumbers);
  if (args.schedule.path.kind != kPathGiven)
    run_units(kernels().schedule, ScheduleArgs{args.schedule, args.key}, args.shape.batch, kScheduleGrain);
  run_units(kernels().path_sample, args, args.tiling.units, kGrain);
}

// --- path_loss -----------------------------------------------------------------------------------------------------------------------

namespace {

LossArgs loss_args(const LossCall& call) {
  LossArgs args = {call, {}, key_of(call.key_words), nullptr};
  args.tiling = plan(&args.shape, {&args.o, &args.x1, &args.x0, &args.x_t, &args.grad, &args.weight}, kDrawnNumbers);
  return args;
}

void put_number(const LossArgs& args, int64_t index, double value) {
  if (args.loss_dtype == Dtype::float64)
    static_cast<double*>(args.loss)[index] = value;
  else
    static_cast<float*>(args.loss)[index] = static_cast<float>(value);
}

// Sums of chunks to the loss: [B] means, or one number.
void reduce(const LossArgs& args) {
  int64_t batch = args.shape.batch, tiles = tiles_per_sample(args.tiling);
  if (args.reduction != kNone) return put_number(args, 0, sum_in_order(args.partial, batch * tiles) / args.divisor);
  for (int64_t b = 0; b < batch; ++b) put_number(args, b, sum_in_order(args.partial + b * tiles, tiles) / args.divisor);
}

}  // namespace

void path_loss(StableIValue* stack, uint64_t, uint64_t) {
  Arguments in(stack, kPathLossArguments);
  LossArgs args = loss_args(read_path_loss(&in));
  Scratch<double, kInlineSums> partials(args.shape.batch * tiles_per_sample(args.tiling));
  args.partial = partials.data();
  run_units(kernels().path_loss, args, args.tiling.units, kGrain);
  reduce(args);
}

void path_loss_backward(StableIValue* stack, uint64_t, uint64_t) {
  Arguments in(stack, kPathLossBackwardArguments);
  LossArgs args = loss_args(read_path_loss_backward(&in));
  run_units(kernels().path_loss, args, args.tiling.units, kGrain);
}

}  // namespace fm
