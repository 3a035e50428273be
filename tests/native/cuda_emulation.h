// CUDA for the CPU, so that tests run the real kernel sources without a GPU: the threads of a block are fibers, barriers and shuffles hand
// over to the next one, blocks follow each other, the last first. Threads and warps take turns in an order that changes, which shows
// barriers that are missing. Finds wrong results and, under sanitizers, wrong addresses; finds no races between blocks.
#pragma once

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define threadIdx (fm_emulation::machine().thread_index())
#define blockIdx (fm_emulation::machine().block_index)
#define gridDim (fm_emulation::machine().grid)
#if defined(FM_SOFTWARE_GPU)  // launches wait in their streams, and the runtime is that of tests/software_gpu
#include "runtime.h"
#define FM_LAUNCH(kernel, blocks, threads, stream, ...) \
  software_gpu::submit(stream, [=] { fm_emulation::machine().launch(blocks, threads, [=] { kernel(__VA_ARGS__); }); })
#else
#define FM_LAUNCH(kernel, blocks, threads, stream, ...) \
  ((void)(stream), fm_emulation::machine().launch(blocks, threads, [&] { kernel(__VA_ARGS__); }))
#endif

namespace fm_emulation {

struct Index {
  unsigned x;
};

enum class State { ready, at_barrier, at_shuffle, done };

constexpr unsigned kMostThreads = 128, kWarp = 32;
constexpr size_t kStack = 256 << 10;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  State state;
  uint64_t exchanged;
};

class Machine {
 public:
  Index block_index, grid;

  Index thread_index() const { return Index{current_}; }

  void launch(unsigned blocks, unsigned threads, const std::function<void()>& body) {
    if (threads > kMostThreads || threads & (threads - 1) || blocks == 0) fail("a launch of no blocks or of another number of threads");
    body_ = &body;
    threads_ = threads;
    grid.x = blocks;
    for (unsigned block = blocks; block > 0; --block) run_block(block - 1);
  }

  void wait(State state) {
    fibers_[current_].state = state;
    swapcontext(&fibers_[current_].context, &scheduler_);
  }

  // What the thread `lanes` away (by exclusive or) in the warp gives; every thread of the warp must be here.
  uint64_t exchange(uint64_t value, unsigned lanes) {
    fibers_[current_].exchanged = value;
    wait(State::at_shuffle);
    uint64_t result = fibers_[current_ ^ lanes].exchanged;
    wait(State::at_shuffle);
    return result;
  }

 private:
  [[noreturn]] static void fail(const char* problem) {
    fprintf(stderr, "CUDA emulation: %s\n", problem);
    abort();
  }

  static void enter();

  void run_block(unsigned block) {
    block_index.x = block;
    for (unsigned i = 0; i < threads_; ++i) start(i);
    while (run_ready()) release();
  }

  void start(unsigned i) {
    Fiber& fiber = fibers_[i];
    if (!fiber.stack) fiber.stack.reset(new char[kStack]);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    fiber.state = State::ready;
    makecontext(&fiber.context, enter, 0);
  }

  // False once all threads are done. Some warps rest until the others can go no further: none may rely on where another is.
  bool run_ready() {
    order_ = order_ * 1664525u + 1013904223u;
    const unsigned first = order_ >> 16, step = order_ >> 8 | 1;
    bool any = false;
    for (unsigned i = 0; i < threads_; ++i) {
      current_ = (first + i * step) % threads_;  // each once, since their number is a power of two
      if (fibers_[current_].state != State::ready || resting_ >> current_ / kWarp & 1) continue;
      any = true;
      swapcontext(&scheduler_, &fibers_[current_].context);
    }
    if (!any) resting_ = 0;
    return !all(0, threads_, State::done);
  }

  bool all(unsigned begin, unsigned end, State state) const {
    for (unsigned i = begin; i < end; ++i)
      if (fibers_[i].state != state) return false;
    return true;
  }

  void set_ready(unsigned begin, unsigned end) {
    for (unsigned i = begin; i < end; ++i) fibers_[i].state = State::ready;
  }

  void release() {
    bool released = false;
    if (all(0, threads_, State::at_barrier)) {
      resting_ = order_ >> 24;
      return set_ready(0, threads_);
    }
    for (unsigned warp = 0; warp < threads_; warp += kWarp)
      if (all(warp, warp + kWarp, State::at_shuffle)) {
        set_ready(warp, warp + kWarp);
        released = true;
      }
    for (unsigned i = 0; i < threads_; ++i) released = released || fibers_[i].state == State::ready;
    if (!released) fail("threads wait for each other in different places");
  }

  Fiber fibers_[kMostThreads];
  ucontext_t scheduler_;
  const std::function<void()>* body_ = nullptr;
  unsigned current_ = 0, threads_ = 0, order_ = 0, resting_ = 0;
};

inline Machine& machine() {
  static Machine one;
  return one;
}

inline void Machine::enter() {
  Machine& m = machine();
  (*m.body_)();
  m.wait(State::done);
}

}  // namespace fm_emulation

inline void __syncthreads() { fm_emulation::machine().wait(fm_emulation::State::at_barrier); }
inline void __threadfence() {}

inline double __shfl_xor_sync(unsigned, double value, int lanes) {
  uint64_t bits;
  memcpy(&bits, &value, sizeof bits);
  bits = fm_emulation::machine().exchange(bits, static_cast<unsigned>(lanes));
  memcpy(&value, &bits, sizeof bits);
  return value;
}

template <class T>
T atomicAdd(T* to, T value) {
  T before = *to;
  *to += value;
  return before;
}

inline int __popcll(int64_t value) { return __builtin_popcountll(static_cast<unsigned long long>(value)); }

template <class T>
T __ldcg(const T* from) {
  return *from;
}

#if !defined(FM_SOFTWARE_GPU)
// The runtime: a device of three multiprocessors, so that blocks take several tiles each.
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorNoKernelImageForDevice = 209, cudaErrorUnsupportedPtxVersion = 222 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };

inline const char* cudaGetErrorString(cudaError_t) { return "none"; }

inline cudaError_t pending_error = cudaSuccess;  // which the next launch finds

inline cudaError_t cudaGetLastError() {
  cudaError_t error = pending_error;
  pending_error = cudaSuccess;
  return error;
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = -1;  // the index of torch's CPU
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 3;
  return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  memset(to, value, bytes);
  return cudaSuccess;
}

inline cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 0;
  return cudaSuccess;
}
#endif
