// Whether the steps that samples have tried count, and how their next ones go (csrc/step_control.h).
#include "../step_control.h"
#include "kernels.h"
#include "tiling.h"

namespace fm {
namespace FM_ISA {

void step_control_units(const ControlCall& call, int64_t begin, int64_t end) {
  Tally sum = {};
  for (int64_t sample = begin * kControlSamples; sample < lesser(end * kControlSamples, call.batch); ++sample) {
    Tally one = control_sample(call, sample);
    sum = Tally{sum.on_the_way + one.on_the_way, sum.given_up + one.given_up, sum.accepted + one.accepted};
  }
  const int64_t added[] = {sum.on_the_way, sum.given_up, sum.accepted};
  for (int i = 0; i < 3; ++i) __atomic_fetch_add(call.totals + i, added[i], __ATOMIC_RELAXED);
}

}  // namespace FM_ISA
}  // namespace fm
