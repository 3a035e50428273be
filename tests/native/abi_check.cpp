// Compiles only while our declarations of torch's C interface equal torch's own: a changed signature is a conflicting declaration.
#define USE_CUDA  // declares what libtorch_cuda.so has
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include "torch_abi.h"

int main() { return 0; }
