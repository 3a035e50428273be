// Sums in a fixed order: over the lanes of a team, over a block, and over all blocks by the one that comes last. No float atomics.
#pragma once

#include "device.h"

namespace fm {
namespace cuda {

// Over `lanes` neighbouring threads of a warp, a power of two: every thread gets the sum.
__device__ inline double sum_lanes(double value, uint32_t lanes) {
  for (uint32_t step = 1; step < lanes; step *= 2) value += __shfl_xor_sync(0xffffffffu, value, static_cast<int>(step));
  return value;
}

// Over the block; valid in thread 0.
__device__ inline double sum_block(double value) {
  __shared__ double sums[kThreads / kWarp];
  value = sum_lanes(value, kWarp);
  __syncthreads();  // nobody reads an earlier sum any more
  if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = value;
  __syncthreads();
  if (threadIdx.x == 0)
    for (int i = 1; i < kThreads / kWarp; ++i) value += sums[i];
  return value;
}

// Over a team, which is the block or a part of a warp; valid in its first thread.
__device__ inline double sum_team(double value, uint32_t team) { return team > kWarp ? sum_block(value) : sum_lanes(value, team); }

// Whether this block is the last of the launch to get here; it then sees what the others wrote before. `arrived` starts at zero.
__device__ inline bool is_last_block(uint32_t* arrived) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(arrived, 1u) == gridDim.x - 1;
  __syncthreads();
  if (last) __threadfence();
  return last;
}

// Sum of `count` numbers that other blocks wrote, in an order that depends on nothing else, by all threads of the block; valid in thread 0.
__device__ inline double sum_partials(const double* partial, int64_t count) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += __ldcg(partial + i);
  return sum_block(sum);
}

// The same by one warp; every lane gets it.
__device__ inline double sum_partials_of_warp(const double* partial, int64_t count) {
  double sum = 0;
  for (int64_t i = threadIdx.x % kWarp; i < count; i += kWarp) sum += __ldcg(partial + i);
  return sum_lanes(sum, kWarp);
}

}  // namespace cuda
}  // namespace fm
