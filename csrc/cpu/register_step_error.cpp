// step_error, from torch's arguments to its kernel.
#include "../read_step_error.h"
#include "dispatch.h"
#include "elementwise.h"
#include "ops.h"
#include "run.h"
#include "scratch.h"

namespace fm {
namespace {

constexpr int64_t kInlineTerms = 16;

using Terms = Scratch<StepTerm, kInlineTerms>;

// The first slope is what the others are added to.
StepArgs error_of(const ErrorReader& reader, Terms* terms) {
  const ErrorCall& call = reader.call();
  StepArgs error = {};
  error.shape = call.shape;
  error.x = reader.term(0);
  error.coefficient = call.coefficients[0];
  error.count = call.count - 1;
  for (int64_t j = 0; j < error.count; ++j) (*terms)[j] = StepTerm{HalvedView{reader.term(1 + j), nullptr}, call.coefficients[1 + j]};
  error.terms = terms->data();
  error.wide = call.wide;
  return error;
}

void plan_error(ErrorArgs* args, Terms* terms) {
  Scratch<View*, 2 + kInlineTerms> items(3 + args->error.count);
  int64_t count = 0;
  items[count++] = &args->y;
  items[count++] = &args->end;
  items[count++] = &args->error.x;
  for (int64_t j = 0; j < args->error.count; ++j) items[count++] = &(*terms)[j].k.first;
  args->error.tiling = plan_samples(&args->error.shape, Views{items.data(), count});
}

}  // namespace

void step_error(StableIValue* stack, uint64_t, uint64_t) {
  abi::Arguments in(stack, kStepErrorArguments);
  ErrorReader reader(&in);
  const ErrorCall& call = reader.call();
  Terms terms(call.count);
  ErrorArgs args = {error_of(reader, &terms), call.y, call.end, call.rtol, call.atol, nullptr};
  plan_error(&args, &terms);
  int64_t tiles = tiles_per_sample(args.error.tiling), batch = call.shape.batch, elements = call.shape.channels * call.shape.positions;
  Scratch<double, kInlineSums> partial(tiles > 1 ? batch * tiles : 0);
  args.partial = tiles > 1 ? partial.data() : call.means;
  run_units(kernels().step_error, args, args.error.tiling.units, kGrain);
  for (int64_t b = 0; tiles > 1 && b < batch; ++b) call.means[b] = sum_in_order(args.partial + b * tiles, tiles);
  for (int64_t b = 0; elements == 0 && b < batch; ++b) call.means[b] = 0;  // no unit ran
  for (int64_t b = 0; b < batch; ++b) call.means[b] /= static_cast<double>(elements);
}

}  // namespace fm
