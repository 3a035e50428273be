// The torch-free layer of CUDA: what runs each op on the current device. Calls come from csrc/calls.h; their pointers are device memory.
#pragma once

#include "../calls.h"

namespace fm {
namespace cuda {

void noise(const NoiseCall& call, void* stream);
void path_sample(const SampleCall& call, void* stream);
// With call.loss, `scratch` holds path_loss_scratch(call) doubles.
void path_loss(const LossCall& call, double* scratch, void* stream);
int64_t path_loss_scratch(const LossCall& call);

// `terms` without coefficients, which are read on the device; kMostTerms of them at most.
constexpr int64_t kMostTerms = 32;
void linear_step(const StepCall& call, const StepTerm* terms, void* stream);

// `terms` as above; `scratch` holds step_error_scratch(call) doubles.
void step_error(const ErrorCall& call, const View* terms, double* scratch, void* stream);
int64_t step_error_scratch(const ErrorCall& call);

void step_control(const ControlCall& call, void* stream);

// The words by which structured probes turn the random signs: none where the probes are not structured.
int64_t parity_words(const ProbeCall& call);
void fill_parities(const ProbeCall& call, uint32_t* parities, void* stream);
void probe(const ProbeCall& call, uint32_t stream_code, const uint32_t* parities, void* stream);

// `scratch` holds divergence_scratch(call) doubles.
void divergence_step(const DivergenceCall& call, const uint32_t* parities, double* scratch, void* stream);
int64_t divergence_scratch(const DivergenceCall& call);

// The current device, and the version of the runtime in this library.
int current_device();
int runtime_version();

}  // namespace cuda
}  // namespace fm
