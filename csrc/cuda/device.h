// What a kernel file needs of CUDA, and the one way in which kernels are launched. With FM_EMULATE_CUDA the same sources compile for the
// CPU, where tests/native runs a block's threads one after the other.
#pragma once

#if defined(FM_EMULATE_CUDA)
#include "cuda_emulation.h"
#else
#include <cuda_runtime.h>
#define FM_LAUNCH(kernel, blocks, threads, stream, ...) kernel<<<blocks, threads, 0, stream>>>(__VA_ARGS__)
#endif

#include <stdexcept>
#include <string>

namespace fm {
namespace cuda {

constexpr int kThreads = 128;  // of a block, always
constexpr int kWarp = 32;      // threads
// Blocks that a multiprocessor holds at once, which is what a kernel's registers are cut to: 64 a thread, 72 where it also maps pixels
// and a gradient, or 96 where it computes in double.
constexpr int kBlocks = 8;
constexpr int kPixelBlocks = 7;
constexpr int kWideBlocks = 5;

// Whether there is nothing for this GPU, or only PTX of a toolkit that is newer than its driver.
inline bool lacks_code(cudaError_t error) { return error == cudaErrorNoKernelImageForDevice || error == cudaErrorUnsupportedPtxVersion; }

inline void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // which the runtime keeps, and the next launch would otherwise find
  const char* help = lacks_code(error) ? " (install fm_fast with this GPU in TORCH_CUDA_ARCH_LIST, or set FM_FAST_BACKEND=triton)" : "";
  throw std::runtime_error(std::string("fm_fast: CUDA error: ") + cudaGetErrorString(error) + help);
}

// Blocks that fill the current device, with `each` of them on a multiprocessor.
inline int64_t device_blocks(int each) {
  int device = 0, multiprocessors = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  return static_cast<int64_t>(multiprocessors) * each;
}

template <class Args>
void launch(void (*kernel)(Args), int64_t blocks, void* stream, const Args& args) {
  FM_LAUNCH(kernel, static_cast<unsigned>(blocks), kThreads, static_cast<cudaStream_t>(stream), args);
  check(cudaGetLastError());
}

}  // namespace cuda
}  // namespace fm
