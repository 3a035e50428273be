// The ops of solvers, from torch's arguments to kernels: linear_step, probe and divergence_step.
#include "../step_reader.h"
#include "kernels.h"
#include "ops.h"
#include "session.h"

namespace fm {
namespace cuda {

using abi::Arguments;

void linear_step(StableIValue* stack, uint64_t, uint64_t) {
  Arguments in(stack, kLinearStepArguments);
  Session session(in);
  StepReader reader(&in);
  StepTerm terms[kMostTerms];
  if (reader.call().count > kMostTerms)
    throw std::runtime_error("fm_fast: argument k: expected at most " + std::to_string(kMostTerms) + " tensors");
  for (int64_t j = 0; j < reader.call().count; ++j) terms[j] = reader.term(j);
  linear_step(reader.call(), terms, session.stream());
}

void probe(StableIValue* stack, uint64_t, uint64_t) {
  Arguments in(stack, kProbeArguments);
  Session session(in);
  ProbeCall call = read_probe(&in);
  int64_t words = parity_words(call);
  uint32_t* parities = words ? session.scratch<uint32_t>(words) : nullptr;
  fill_parities(call, parities, session.stream());
  probe(call, kStreamProbe, parities, session.stream());
}

void divergence_step(StableIValue* stack, uint64_t, uint64_t) {
  Arguments in(stack, kDivergenceStepArguments);
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
