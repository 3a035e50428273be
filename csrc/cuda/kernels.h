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

// The current device, and versions of the driver and of the runtime in this library.
int current_device();
int driver_version();
int runtime_version();

}  // namespace cuda
}  // namespace fm
