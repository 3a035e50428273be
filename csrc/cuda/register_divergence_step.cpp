// divergence_step, from torch's arguments to its kernels.
#include "kernels.h"
#include "ops.h"
#include "session.h"

namespace fm {
namespace cuda {

void divergence_step(StableIValue* stack, uint64_t, uint64_t) {
  abi::Arguments in(stack, kDivergenceStepArguments);
  Session session(in);
  DivergenceCall call = read_divergence_step(&in);
  int64_t words = parity_words(call.probes), sums = divergence_scratch(call);
  double* scratch = session.scratch<double>(sums + (words + 1) / 2);
  uint32_t* parities = words ? reinterpret_cast<uint32_t*>(scratch + sums) : nullptr;
  fill_parities(call.probes, parities, session.stream());
  divergence_step(call, parities, scratch, session.stream());
}

}  // namespace cuda
}  // namespace fm
