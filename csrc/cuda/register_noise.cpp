// noise, from torch's arguments to its kernels.
#include "kernels.h"
#include "ops.h"
#include "session.h"

namespace fm {
namespace cuda {

void noise(StableIValue* stack, uint64_t, uint64_t) {
  abi::Arguments in(stack, kNoiseArguments);
  Session session(in);
  noise(read_noise(&in), session.stream());
}

}  // namespace cuda
}  // namespace fm
