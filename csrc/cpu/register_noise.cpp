// noise, from torch's arguments to its kernel.
#include "dispatch.h"
#include "ops.h"
#include "run.h"

namespace fm {
namespace {

const Drawn& drawn_for(DrawKind kind) {
  if (kind == DrawKind::sign) return kDrawnSigns;
  return kind == DrawKind::word ? kDrawnWords : kDrawnNumbers;
}

}  // namespace

void noise(StableIValue* stack, uint64_t, uint64_t) {
  abi::Arguments in(stack, kNoiseArguments);
  NoiseArgs args = {read_noise(&in), {}, {}};
  args.key = key_of(args.key_words);
  args.tiling = plan(&args.shape, {&args.out}, drawn_for(args.kind));
  run_units(kernels().noise, args, args.tiling.units, kGrain);
}

}  // namespace fm
