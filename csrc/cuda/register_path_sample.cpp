// path_sample, from torch's arguments to its kernels.
#include "kernels.h"
#include "ops.h"
#include "session.h"

namespace fm {
namespace cuda {

void path_sample(StableIValue* stack, uint64_t, uint64_t) {
  abi::Arguments in(stack, kPathSampleArguments);
  Session session(in);
  path_sample(read_path_sample(&in), session.stream());
}

}  // namespace cuda
}  // namespace fm
