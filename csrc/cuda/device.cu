// Questions about the device and the version of CUDA.
#include "device.h"

#include "kernels.h"

namespace fm {
namespace cuda {

int current_device() {
  int device = 0;
  check(cudaGetDevice(&device));
  return device;
}

int runtime_version() {
  int version = 0;
  return cudaRuntimeGetVersion(&version) == cudaSuccess ? version : 0;
}

}  // namespace cuda
}  // namespace fm
