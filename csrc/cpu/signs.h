// Random signs as bits: 128 a Philox block, the least significant bit of the first word first, a set bit is -1.
#pragma once

#include "tile.h"

namespace fm {
namespace FM_ISA {

constexpr int64_t kBlockSigns = 128;
constexpr int64_t kWordSigns = 32;

// As a table, because not every instruction set shifts each lane by its own amount.
constexpr uint32_t kBits[kWordSigns] = {1u << 0,  1u << 1,  1u << 2,  1u << 3,  1u << 4,  1u << 5,  1u << 6,  1u << 7,
                                        1u << 8,  1u << 9,  1u << 10, 1u << 11, 1u << 12, 1u << 13, 1u << 14, 1u << 15,
                                        1u << 16, 1u << 17, 1u << 18, 1u << 19, 1u << 20, 1u << 21, 1u << 22, 1u << 23,
                                        1u << 24, 1u << 25, 1u << 26, 1u << 27, 1u << 28, 1u << 29, 1u << 30, 1u << 31};

FM_INLINE float with_sign(float x, uint32_t word, int64_t bit) {
  return bit_cast<float>(bit_cast<uint32_t>(x) ^ (word & kBits[bit] ? kSignBit : 0u));
}

FM_INLINE double with_sign(double x, uint32_t word, int64_t bit) {
  return bit_cast<double>(bit_cast<uint64_t>(x) ^ (word & kBits[bit] ? uint64_t(1) << 63 : 0u));
}

// Words as `for_each_tile` draws them: in memory of floats.
using SignWord [[gnu::may_alias]] = uint32_t;

FM_INLINE const SignWord* drawn_words(const float* drawn) { return reinterpret_cast<const SignWord*>(drawn); }

// The words of one row of a tile, from the tile's first position on. A tile starts on a word: at a multiple of 64 positions.
FM_INLINE const SignWord* row_words(const SignWord* words, const Tile& tile, int64_t channel) {
  return words + channel * 4 * row_blocks<ToSigns>(tile) + tile.position % kBlockSigns / kWordSigns;
}

FM_INLINE void expand_signs(const SignWord* words, int64_t count, float* __restrict out) {
  int64_t i = 0;
  for (; i + kWordSigns <= count; i += kWordSigns, ++words)
    for (int64_t j = 0; j < kWordSigns; ++j) out[i + j] = with_sign(1.0f, *words, j);
  for (int64_t j = 0; i + j < count; ++j) out[i + j] = with_sign(1.0f, *words, j);
}

// Writes a tile of +1 and -1.
FM_INLINE void store_signs(const SignWord* words, const Tile& tile, const View& out) {
  alignas(64) float buffer[kTileBuffer];
  Rows<float> rows = result_rows<float>(out, tile, buffer);
  for (int64_t c = 0; c < tile.channels; ++c) expand_signs(row_words(words, tile, c), tile.positions, rows.row(c));
  finish_rows<float>(out, tile, buffer);
}

}  // namespace FM_ISA
}  // namespace fm
