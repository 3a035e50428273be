// Which probes a call makes: what probe and divergence_step both read.
#pragma once

#include "calls.h"
#include "unbox.h"

namespace fm {

struct ProbeInputs {
  abi::Tensor key, codes, rows;
  int64_t index, first, share;
};

// `probes` is [K, B, ...]: probes first, first + 1, ...
ProbeCall probe_call(const abi::Tensor& probes, const ProbeInputs& in);

}  // namespace fm
