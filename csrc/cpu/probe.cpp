// Probes of the divergence estimate: random signs (Rademacher), turned by the parities of a structured probe (Hadamard, coloured).
#include "probe.h"

namespace fm {
namespace FM_ISA {
namespace {

// All bits set where `code` has an odd number of bits, else none.
FM_INLINE uint32_t odd_mask(uint64_t code) {
  uint32_t x = static_cast<uint32_t>(code ^ (code >> 32));
  x ^= x >> 16;
  x ^= x >> 8;
  x ^= x >> 4;
  x ^= x >> 2;
  x ^= x >> 1;
  return 0u - (x & 1u);
}

// Bit i is the parity of codes[i] & row.
FM_INLINE uint32_t parity_word(const uint64_t* codes, uint64_t row) {
  uint32_t word = 0;
  for (int64_t j = 0; j < kWordSigns; ++j) word |= odd_mask(codes[j] & row) & kBits[j];
  return word;
}

}  // namespace

void probe_units(const ProbeArgs& args, int64_t begin, int64_t end) {
  for_each_sign_tile(args, begin, end,
                     [&](int64_t, const View& out, const Tile& tile, const SignWord* words) { store_signs(words, tile, out); });
}

// A unit is one block of one probe.
void parity_units(const ParityArgs& args, int64_t begin, int64_t end) {
  int64_t row_blocks = divide_up(args.positions, kBlockSigns), blocks = args.channels * row_blocks;
  for (int64_t unit = begin; unit < end; ++unit) {
    int64_t block = unit % blocks, position = block % row_blocks * kBlockSigns;
    int64_t count = lesser(kBlockSigns, args.positions - position);
    uint64_t codes[kBlockSigns] = {}, row = static_cast<uint64_t>(args.rows[unit / blocks]);
    __builtin_memcpy(codes, args.codes + block / row_blocks * args.positions + position, static_cast<size_t>(count) * sizeof(int64_t));
    for (int64_t i = 0; i < kBlockSigns / kWordSigns; ++i) args.parities[4 * unit + i] = parity_word(codes + i * kWordSigns, row);
  }
}

}  // namespace FM_ISA
}  // namespace fm
