// probe, from torch's arguments to its kernels.
#include "register_probe.h"

#include "ops.h"

namespace fm {

void probe(StableIValue* stack, uint64_t, uint64_t) {
  abi::Arguments in(stack, kProbeArguments);
  ProbeCall call = read_probe(&in);
  ProbeArgs args = probe_args(call, kDrawnSigns);
  Parities parities(4 * parity_blocks(call));
  args.parities = fill_parities(call, &parities);
  run_units(kernels().probe, args, args.probes * args.tiling.units, kGrain);
}

}  // namespace fm
