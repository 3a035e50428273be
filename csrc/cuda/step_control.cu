// Whether the steps that samples have tried count, and how their next ones go: a thread a sample (csrc/step_control.h).
#include "../step_control.h"
#include "kernels.h"
#include "reduce.h"

namespace fm {
namespace cuda {
namespace {

constexpr int kControlBlocks = 6;  // a multiprocessor; left to itself, nvcc 13.0 spills a register for sm_120

// Whole numbers, which may be added in any order.
__device__ void add_to_total(int64_t* total, int64_t count) {
  double sum = sum_block(static_cast<double>(count));  // exact: doubles hold whole numbers up to 2^53
  if (threadIdx.x == 0 && sum != 0) atomicAdd(reinterpret_cast<unsigned long long*>(total), static_cast<unsigned long long>(sum));
}

__global__ void __launch_bounds__(kThreads, kControlBlocks) step_control_kernel(const ControlCall call) {
  Tally sum = {};
  for (int64_t sample = int64_t(blockIdx.x) * kThreads + threadIdx.x; sample < call.batch; sample += int64_t(gridDim.x) * kThreads) {
    Tally one = control_sample(call, sample);
    sum = Tally{sum.on_the_way + one.on_the_way, sum.given_up + one.given_up, sum.accepted + one.accepted};
  }
  add_to_total(call.totals, sum.on_the_way);
  add_to_total(call.totals + 1, sum.given_up);
  add_to_total(call.totals + 2, sum.accepted);
}

}  // namespace

void step_control(const ControlCall& call, void* stream) {
  if (call.batch == 0) return;
  int64_t needed = (call.batch + kThreads - 1) / kThreads, most = device_blocks(kControlBlocks);
  launch(step_control_kernel, needed < most ? needed : most, stream, call);
}

}  // namespace cuda
}  // namespace fm
