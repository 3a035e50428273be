// The ops as torch calls them: arguments on a stack, in the order of the schemas in fm_fast/_schemas.py.
#pragma once

#include "../torch_abi.h"

namespace fm {
namespace cuda {

void noise(StableIValue* stack, uint64_t, uint64_t);
void path_sample(StableIValue* stack, uint64_t, uint64_t);
void path_loss(StableIValue* stack, uint64_t, uint64_t);
void path_loss_backward(StableIValue* stack, uint64_t, uint64_t);
void linear_step(StableIValue* stack, uint64_t, uint64_t);
void step_error(StableIValue* stack, uint64_t, uint64_t);
void step_control(StableIValue* stack, uint64_t, uint64_t);
void probe(StableIValue* stack, uint64_t, uint64_t);
void divergence_step(StableIValue* stack, uint64_t, uint64_t);

}  // namespace cuda
}  // namespace fm
