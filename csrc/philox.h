// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) and the counter layout of the noise contract.
#pragma once

#include "hd.h"

namespace fm {

constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u;
constexpr uint32_t kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kGolden = 0x9E3779B9u;  // 2^32 over the golden ratio
constexpr uint32_t kPhiloxKeyBump0 = kGolden;
constexpr uint32_t kPhiloxKeyBump1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

constexpr uint32_t kStreamX0 = 0;
constexpr uint32_t kStreamTime = 1;
constexpr uint32_t kStreamProbe = 2;
constexpr uint32_t kStreamDequantise = 3;
constexpr uint32_t kStreamFlip = 5;
constexpr uint32_t kStreamDropout = 6;

constexpr int kStreamBits = 8;
constexpr int64_t kStreamLimit = 1 << kStreamBits, kIndexLimit = 1 << (32 - kStreamBits);

struct Words {
  uint32_t w[4];
};

// The last word of a counter: what is drawn, and which draw of its kind.
FM_HD uint32_t purpose_of(uint32_t stream, uint32_t index) { return stream | index << kStreamBits; }

// The part of a counter and key that all draws of one stream and index share; these two are the `purpose`.
struct Stream {
  uint32_t key0, key1, step, purpose;
};

FM_HD uint64_t multiply_wide(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  uint64_t product;  // one instruction, where the compiler would take two or three
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
#else
  return static_cast<uint64_t>(a) * b;
#endif
}

FM_HD uint32_t multiply_high(uint32_t a, uint32_t b) { return static_cast<uint32_t>(multiply_wide(a, b) >> 32); }

FM_HD Words philox_round(Words c, uint32_t key0, uint32_t key1) {
  uint64_t product0 = multiply_wide(c.w[0], kPhiloxMultiplier0), product1 = multiply_wide(c.w[2], kPhiloxMultiplier1);
  return Words{{static_cast<uint32_t>(product1 >> 32) ^ c.w[1] ^ key0, static_cast<uint32_t>(product1),
                static_cast<uint32_t>(product0 >> 32) ^ c.w[3] ^ key1, static_cast<uint32_t>(product0)}};
}

FM_HD Words philox(Words counter, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < kPhiloxRounds; ++round) {
    counter = philox_round(counter, key0, key1);
    key0 += kPhiloxKeyBump0;
    key1 += kPhiloxKeyBump1;
  }
  return counter;
}

FM_HD Words stream_words(const Stream& stream, uint32_t sample_id, uint32_t block) {
  return philox(Words{{block, sample_id, stream.step, stream.purpose}}, stream.key0, stream.key1);
}

}  // namespace fm
