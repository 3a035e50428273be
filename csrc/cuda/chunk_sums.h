// The second stage of sums over samples: the chunks of each entry, added by one warp in a fixed order.
#pragma once

#include "geometry.h"
#include "reduce.h"

namespace fm {
namespace cuda {
namespace {

struct ChunkSums {
  const double* partial;  // [entries, chunks]
  double* sums;           // [entries]
  int64_t entries, chunks;
};

__global__ void __launch_bounds__(kThreads) chunk_sums_kernel(const ChunkSums launch) {
  constexpr int kWarps = kThreads / kWarp;
  for (int64_t i = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp; i < launch.entries; i += int64_t(gridDim.x) * kWarps) {
    double sum = sum_partials_of_warp(launch.partial + i * launch.chunks, launch.chunks);
    if (threadIdx.x % kWarp == 0) launch.sums[i] = sum;
  }
}

// Each chunk's sum is handed in by the first thread of its team.
__device__ __forceinline__ void put_chunk(const Geometry& g, const Run& run, uint32_t chunk, double sum, double* partial) {
  sum = sum_team(sum, g.team);
  if (run.lane == 0 && run.sample < g.batch) partial[run.sample * g.chunks + chunk] = sum;
}

// Doubles that the partial sums of a launch need: none where a sample is one chunk, whose sum is the result.
inline int64_t chunk_scratch(const Geometry& g) { return g.chunks > 1 ? g.batch * g.chunks : 0; }

inline double* partial_of(const Geometry& g, double* scratch, double* sums) { return g.chunks > 1 ? scratch : sums; }

inline void add_chunks(const Geometry& g, const double* scratch, double* sums, void* stream) {
  if (g.chunks == 1 || g.batch == 0) return;
  int64_t needed = (g.batch + kThreads / kWarp - 1) / (kThreads / kWarp), most = device_blocks(kBlocks);
  launch(chunk_sums_kernel, needed < most ? needed : most, stream, ChunkSums{scratch, sums, g.batch, g.chunks});
}

}  // namespace
}  // namespace cuda
}  // namespace fm
