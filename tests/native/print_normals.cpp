// Writes float32 normals [samples, positions] of stream 0 of every instruction set to standard output, for comparison with NumPy.
#include "harness.h"

int main(int argc, char** argv) {
  if (argc != 6) return 2;
  const int64_t samples = atoll(argv[4]), positions = atoll(argv[5]);
  const uint64_t seed = strtoull(argv[1], nullptr, 10);
  for (const test::Isa& isa : test::instruction_sets()) {
    test::Tensor<float> out(fm::Shape{samples, 1, positions, positions}, test::Layout::contiguous);
    fm::NoiseArgs args = {};
    args.shape = fm::Shape{samples, 1, positions, positions};
    args.out = out.view();
    args.key = fm::Key{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), static_cast<uint32_t>(atoll(argv[2])),
                       atoll(argv[3]), nullptr};
    args.tiling = fm::plan(&args.shape, {&args.out}, fm::kDrawnNumbers);
    isa.noise(args, 0, args.tiling.units);
    fwrite(args.out.data, sizeof(float), static_cast<size_t>(samples * positions), stdout);
  }
  return 0;
}
