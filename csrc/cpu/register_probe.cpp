// probe and divergence_step, from torch's arguments to their kernels.
#include "dispatch.h"
#include "ops.h"
#include "scratch.h"
#include "unbox.h"

namespace fm {
namespace {

using abi::Arguments;

constexpr int64_t kParityGrain = 64;          // blocks of a thread
constexpr int64_t kEvaluationGrain = 1024;    // sums of a thread
constexpr int64_t kInlineParities = 1 << 12;  // words that a call may keep on its stack

using Parities = Scratch<uint32_t, kInlineParities>;

ProbeArgs probe_args(const ProbeCall& call, const Drawn& drawn) {
  ProbeArgs args = {call, {}, key_of(call.key_words), nullptr};
  args.tiling = plan(&args.shape, {&args.view}, drawn);
  return args;
}

// Blocks of all structured probes of a call.
int64_t parity_blocks(const ProbeCall& call) {
  return call.codes ? call.probes * call.shape.channels * divide_up(call.shape.points, 128) : 0;
}

// The parities of structured probes, which are the same for all samples.
const uint32_t* fill_parities(const ProbeCall& call, Parities* parities) {
  int64_t blocks = parity_blocks(call);
  if (blocks == 0) return nullptr;
  ParityArgs args = {call.codes, call.rows, call.shape.channels, call.shape.points, parities->data()};
  run_units(kernels().parity, args, blocks, kParityGrain);
  return args.parities;
}

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

void probe(StableIValue* stack, uint64_t, uint64_t) {
  Arguments in(stack, kProbeArguments);
  ProbeCall call = read_probe(&in);
  ProbeArgs args = probe_args(call, kDrawnSigns);
  Parities parities(4 * parity_blocks(call));
  args.parities = fill_parities(call, &parities);
  run_units(kernels().probe, args, args.probes * args.tiling.units, kGrain);
}

void divergence_step(StableIValue* stack, uint64_t, uint64_t) {
  Arguments in(stack, kDivergenceStepArguments);
  DivergenceCall call = read_divergence_step(&in);
  DivergenceArgs args = {probe_args(call.probes, call.normals ? kDrawnNumbers : kDrawnSigns), call.normals, nullptr};
  Parities parities(4 * parity_blocks(call.probes));
  args.probes.parities = fill_parities(call.probes, &parities);
  write_dots(&args, call.dots);
  if (call.last) run_units(finish_samples, call.evaluation, call.evaluation.batch, kEvaluationGrain);
}

}  // namespace fm
