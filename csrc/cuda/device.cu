// Questions about the device and the versions of CUDA.
#include "device.h"

#include "kernels.h"

namespace fm {
namespace cuda {

int current_device() {
  int device = 0;
  check(cudaGetDevice(&device));
  return device;
}

int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

int runtime_version() {
  int version = 0;
  return cudaRuntimeGetVersion(&version) == cudaSuccess ? version : 0;
}

}  // namespace cuda
}  // namespace fm
