// divergence_step, from torch's arguments to its kernels.
#include "ops.h"
#include "register_probe.h"

namespace fm {
namespace {

constexpr int64_t kEvaluationGrain = 1024;  // sums of a thread

void finish_samples(const Evaluation& evaluation, int64_t begin, int64_t end) {
  for (int64_t sample = begin; sample < end; ++sample) finish_evaluation(evaluation, sample);
}

// dots of the probes of this call, from the sums of tiles.
void write_dots(DivergenceArgs* args, double* dots) {
  const ProbeArgs& probes = args->probes;
  int64_t samples = probes.probes * probes.shape.batch, tiles = tiles_per_sample(probes.tiling);
  Scratch<double, kInlineSums> partial(tiles > 1 ? samples * tiles : 0);
  args->partial = tiles > 1 ? partial.data() : dots;
  run_units(kernels().divergence_step, *args, probes.probes * probes.tiling.units, kGrain);
  if (tiles == 1) return;
  for (int64_t i = 0; i < samples; ++i) dots[i] = sum_in_order(args->partial + i * tiles, tiles);
}

}  // namespace

void divergence_step(StableIValue* stack, uint64_t, uint64_t) {
  abi::Arguments in(stack, kDivergenceStepArguments);
  DivergenceCall call = read_divergence_step(&in);
  DivergenceArgs args = {probe_args(call.probes, call.normals ? kDrawnNumbers : kDrawnSigns), call.normals, nullptr};
  Parities parities(4 * parity_blocks(call.probes));
  args.probes.parities = fill_parities(call.probes, &parities);
  write_dots(&args, call.dots);
  if (call.last) run_units(finish_samples, call.evaluation, call.evaluation.batch, kEvaluationGrain);
}

}  // namespace fm
