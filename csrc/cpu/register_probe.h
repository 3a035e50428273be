// What probe and divergence_step share on their way to the kernels: the arguments of both, and the parities of structured probes.
#pragma once

#include "dispatch.h"
#include "run.h"
#include "scratch.h"

namespace fm {

constexpr int64_t kParityGrain = 64;          // blocks of a thread
constexpr int64_t kInlineParities = 1 << 12;  // words that a call may keep on its stack

using Parities = Scratch<uint32_t, kInlineParities>;

inline ProbeArgs probe_args(const ProbeCall& call, const Drawn& drawn) {
  ProbeArgs args = {call, {}, key_of(call.key_words), nullptr};
  args.tiling = plan(&args.shape, {&args.view}, drawn);
  return args;
}

// Blocks of all structured probes of a call.
inline int64_t parity_blocks(const ProbeCall& call) {
  return call.codes ? call.probes * call.shape.channels * divide_up(call.shape.positions, 128) : 0;
}

// The parities of structured probes, which are the same for all samples.
inline const uint32_t* fill_parities(const ProbeCall& call, Parities* parities) {
  int64_t blocks = parity_blocks(call);
  if (blocks == 0) return nullptr;
  ParityArgs args = {call.codes, call.rows, call.shape.channels, call.shape.positions, parities->data()};
  run_units(kernels().parity, args, blocks, kParityGrain);
  return args.parities;
}

}  // namespace fm
