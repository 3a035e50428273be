// step_error, from torch's arguments to its kernels.
#include "../read_step_error.h"
#include "kernels.h"
#include "ops.h"
#include "session.h"

namespace fm {
namespace cuda {

void step_error(StableIValue* stack, uint64_t, uint64_t) {
  abi::Arguments in(stack, kStepErrorArguments);
  Session session(in);
  ErrorReader reader(&in);
  const ErrorCall& call = reader.call();
  View terms[kMostTerms];
  if (call.count > kMostTerms) throw std::runtime_error("fm_fast: argument k: expected at most " + std::to_string(kMostTerms) + " tensors");
  for (int64_t j = 0; j < call.count; ++j) terms[j] = reader.term(j);
  step_error(call, terms, session.scratch<double>(step_error_scratch(call)), session.stream());
}

}  // namespace cuda
}  // namespace fm
