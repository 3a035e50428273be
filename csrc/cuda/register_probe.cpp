// probe, from torch's arguments to its kernels.
#include "kernels.h"
#include "ops.h"
#include "session.h"

namespace fm {
namespace cuda {

void probe(StableIValue* stack, uint64_t, uint64_t) {
  abi::Arguments in(stack, kProbeArguments);
  Session session(in);
  ProbeCall call = read_probe(&in);
  int64_t words = parity_words(call);
  uint32_t* parities = words ? session.scratch<uint32_t>(words) : nullptr;
  fill_parities(call, parities, session.stream());
  probe(call, kStreamProbe, parities, session.stream());
}

}  // namespace cuda
}  // namespace fm
