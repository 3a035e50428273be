// What the emulated kernels and their launchers ask of a CUDA runtime, here that of runtime.cpp.
#pragma once

#include <functional>
#include <mutex>

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorNoKernelImageForDevice = 209, cudaErrorUnsupportedPtxVersion = 222 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };

extern "C" {
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream);
cudaError_t cudaRuntimeGetVersion(int* version);
int software_gpu_submit(void* stream, void (*run)(void*), void (*forget)(void*), void* data);
}

namespace software_gpu {

// The emulated device has one machine, whichever thread has it work.
inline std::mutex& machine_mutex() {
  static std::mutex one;
  return one;
}

inline void run(void* work) {
  std::lock_guard<std::mutex> lock(machine_mutex());
  (*static_cast<std::function<void()>*>(work))();
}

inline void forget(void* work) { delete static_cast<std::function<void()>*>(work); }

inline void submit(void* stream, std::function<void()> work) {
  software_gpu_submit(stream, run, forget, new std::function<void()>(std::move(work)));
}

}  // namespace software_gpu
