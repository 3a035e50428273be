// How a launch covers samples: a thread takes a few elements of a sample at a time (kEach), a team of threads a chunk of it.
//
// A block has kThreads / team teams. Where a sample is one chunk, teams take different samples, else there is one team. Tiles, which are a
// chunk or the chunks of several samples, are dealt to blocks in equal runs, so that a block meets few samples and prepares each once.
#pragma once

#include "../tensors.h"
#include "device.h"

namespace fm {
namespace cuda {

constexpr int kEach = 8;
constexpr int64_t kWordLimit = int64_t(1) << 31;

// n / divisor without a division for n < 2^31 (Granlund and Montgomery, "Division by invariant integers using multiplication", 1994).
struct Divisor {
  int64_t value;
  uint32_t multiplier, shift;
  bool wide;  // n may be 2^31 or more: divide
};

inline Divisor divisor(int64_t value, int64_t largest) {
  Divisor d = {value < 1 ? 1 : value, 0, 0, largest >= kWordLimit};
  if (d.wide) return d;
  while ((int64_t(1) << d.shift) < d.value) ++d.shift;
  d.multiplier =
      static_cast<uint32_t>((((uint64_t(1) << d.shift) - static_cast<uint64_t>(d.value)) << 32) / static_cast<uint64_t>(d.value)) + 1;
  return d;
}

FM_HD uint32_t divide(uint32_t n, const Divisor& d) { return (multiply_high(n, d.multiplier) + n) >> d.shift; }

FM_HD int64_t divide(int64_t n, const Divisor& d) {
  return d.wide ? n / d.value : static_cast<int64_t>(divide(static_cast<uint32_t>(n), d));
}

struct Geometry {
  int64_t batch, elements;   // of a sample, or the size of its padded counter blocks
  uint32_t team_bits, team;  // threads, a power of two
  uint32_t chunks;           // of a sample
  uint32_t tiles;
};

inline Geometry geometry(int64_t batch, int64_t elements, int each = kEach) {
  Geometry g = {batch, elements, 0, 1, 1, 0};
  while (g.team < kThreads && int64_t(g.team) * each < elements) g.team = 1u << ++g.team_bits;
  if (g.team > kWarp) g.team = 1u << (g.team_bits = 7);  // sums of a team then cross either one warp or the block
  int64_t chunk = int64_t(g.team) * each, teams = kThreads / g.team;
  int64_t chunks = elements > chunk ? (elements + chunk - 1) / chunk : 1, tiles = (batch + teams - 1) / teams * chunks;
  if (tiles >= kWordLimit) throw std::runtime_error("fm_fast: too many elements for one launch");
  g.chunks = static_cast<uint32_t>(chunks);
  g.tiles = static_cast<uint32_t>(tiles);
  return g;
}

// At least one, which then has the last word of a reduction over nothing.
inline int64_t blocks_of(const Geometry& g, int each) {
  int64_t most = device_blocks(each);
  return g.tiles < 1 ? 1 : (g.tiles < most ? g.tiles : most);
}

// What a thread does next: its place in the team, chunks of a sample, and how many elements that has (none where the team idles).
struct Run {
  int64_t sample;
  uint32_t lane, first_chunk, stop_chunk;
  int64_t elements;
};

#if defined(__CUDACC__) || defined(FM_EMULATE_CUDA)

__device__ inline uint32_t first_tile(const Geometry& g, uint32_t block) {
  return static_cast<uint32_t>(static_cast<uint64_t>(g.tiles) * block / gridDim.x);
}

// Calls body(record, run) in every thread for the chunks of this block, sample by sample. record = prepare(sample, owns) is made by one
// thread a sample; owns is true in exactly one block.
template <class Record, class Prepare, class Body>
__device__ __forceinline__ void walk(const Geometry& g, const Prepare& prepare, const Body& body) {
  __shared__ Record records[kThreads];
  uint32_t tile = first_tile(g, blockIdx.x), end = first_tile(g, blockIdx.x + 1), teams = kThreads >> g.team_bits;
  uint32_t group = tile / g.chunks, chunk = tile % g.chunks, first_owned = group + (chunk > 0), stop = (end + g.chunks - 1) / g.chunks;
  if (tile == end) return;
  for (uint32_t last_chunk = end - (stop - 1) * g.chunks; group < stop;) {
    uint32_t round = stop - group < g.team ? stop - group : g.team, count = round * teams;
    int64_t base = static_cast<int64_t>(group) * teams, rest = g.batch - base;
    if (count > rest) count = static_cast<uint32_t>(rest);
    __syncthreads();  // nobody reads the last records any more
    if (threadIdx.x < count) records[threadIdx.x] = prepare(base + threadIdx.x, group + threadIdx.x / teams >= first_owned);
    __syncthreads();
    for (uint32_t local = threadIdx.x >> g.team_bits; round > 0; --round, ++group, local += teams, chunk = 0) {
      bool inside = local < count;
      uint32_t stop_chunk = group + 1 == stop ? last_chunk : g.chunks;
      body(records[inside ? local : 0], Run{base + local, threadIdx.x & (g.team - 1), chunk, stop_chunk, inside ? g.elements : 0});
    }
  }
}

#endif

}  // namespace cuda
}  // namespace fm
