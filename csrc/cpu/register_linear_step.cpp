// linear_step, from torch's arguments to its kernel.
#include "../read_linear_step.h"
#include "dispatch.h"
#include "elementwise.h"
#include "ops.h"
#include "run.h"
#include "scratch.h"

namespace fm {
namespace {

constexpr int64_t kInlineTerms = 8;

using Terms = Scratch<StepTerm, kInlineTerms>;

void read_terms(const StepReader& reader, Terms* terms) {
  for (int64_t i = 0; i < reader.call().count; ++i) {
    (*terms)[i] = reader.term(i);
    (*terms)[i].coefficient = reader.call().coefficients[1 + i];
  }
}

Tiling plan_step(StepArgs* args, Terms* terms) {
  Scratch<View*, 4 + kInlineTerms> views(4 + args->count);
  int64_t count = 0;
  views[count++] = &args->out;
  views[count++] = &args->x;
  if (args->copy.first.data) views[count++] = &args->copy.first;
  if (args->kept.data) views[count++] = &args->kept;
  for (int64_t i = 0; i < args->count; ++i) views[count++] = &(*terms)[i].k.first;
  return plan_elementwise(&args->shape, Views{views.data(), count});
}

}  // namespace

void linear_step(StableIValue* stack, uint64_t, uint64_t) {
  abi::Arguments in(stack, kLinearStepArguments);
  StepReader reader(&in);
  StepArgs args = {reader.call(), {}, nullptr, reader.call().coefficients[0]};
  Terms terms(args.count);
  args.terms = terms.data();
  read_terms(reader, &terms);
  if (args.shape.batch * args.shape.channels * args.shape.positions == 0) return;
  args.tiling = plan_step(&args, &terms);
  run_units(kernels().linear_step, args, args.tiling.units, kGrain);
}

}  // namespace fm
