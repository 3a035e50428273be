// How the ops of the CPU run their kernels: on torch's threads, with sums in a fixed order.
#pragma once

#include "../unbox.h"
#include "kernels.h"
#include "tiling.h"

namespace fm {

constexpr int64_t kGrain = 16;         // units of a thread, of about a microsecond each
constexpr int64_t kInlineSums = 2048;  // doubles that a call may keep on its stack

inline Key key_of(const abi::Tensor& key, int64_t batch) { return key_of(key_words(key, batch)); }

// Sum in fixed order.
inline double sum_in_order(const double* values, int64_t count) {
  double lanes[4] = {0, 0, 0, 0};
  for (int64_t i = 0; i < count; ++i) lanes[i % 4] += values[i];
  return (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
}

// Runs kernel(args, begin, end) over `units` on torch's threads, at least `grain` of them on each.
template <class Args>
void run_units(void (*kernel)(const Args&, int64_t, int64_t), const Args& args, int64_t units, int64_t grain) {
  if (units <= grain) return units > 0 ? kernel(args, 0, units) : void();
  struct Call {
    void (*kernel)(const Args&, int64_t, int64_t);
    const Args& args;
  } call = {kernel, args};
  auto body = [](int64_t begin, int64_t end, void* context) {
    const Call& c = *static_cast<const Call*>(context);
    c.kernel(c.args, begin, end);
  };
  abi::check(torch_parallel_for(0, units, grain, body, &call), "parallel_for");
}

}  // namespace fm
