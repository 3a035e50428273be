// path_loss and its backward, from torch's arguments to their kernel.
#include "../loss.h"
#include "dispatch.h"
#include "ops.h"
#include "run.h"
#include "scratch.h"

namespace fm {
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
  abi::Arguments in(stack, kPathLossArguments);
  LossArgs args = loss_args(read_path_loss(&in));
  Scratch<double, kInlineSums> partials(args.shape.batch * tiles_per_sample(args.tiling));
  args.partial = partials.data();
  run_units(kernels().path_loss, args, args.tiling.units, kGrain);
  reduce(args);
}

void path_loss_backward(StableIValue* stack, uint64_t, uint64_t) {
  abi::Arguments in(stack, kPathLossBackwardArguments);
  LossArgs args = loss_args(read_path_loss_backward(&in));
  if (is_finished(args)) return;
  run_units(kernels().path_loss, args, args.tiling.units, kGrain);
}

}  // namespace fm
