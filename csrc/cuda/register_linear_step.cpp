// linear_step, from torch's arguments to its kernels.
#include "../read_linear_step.h"
#include "kernels.h"
#include "ops.h"
#include "session.h"

namespace fm {
namespace cuda {

void linear_step(StableIValue* stack, uint64_t, uint64_t) {
  abi::Arguments in(stack, kLinearStepArguments);
  Session session(in);
  StepReader reader(&in);
  StepTerm terms[kMostTerms];
  if (reader.call().count > kMostTerms)
    throw std::runtime_error("fm_fast: argument k: expected at most " + std::to_string(kMostTerms) + " tensors");
  for (int64_t j = 0; j < reader.call().count; ++j) terms[j] = reader.term(j);
  linear_step(reader.call(), terms, session.stream());
}

}  // namespace cuda
}  // namespace fm
