// Runs of random numbers: whole Philox blocks of consecutive counters, or of counters listed one by one.
// Vectors hold kLanes blocks; each block is one 32-bit lane after the last round and two half-filled vectors (even and odd lanes) before,
// so that the 32 x 32 -> 64 bit products need no shuffles.
#pragma once

#include "../normal.h"
#include "../philox.h"
#include "simd.h"
#include "tiling.h"

namespace fm {
namespace FM_ISA {

// Float32 runs that will be read or written next, element by element beside the numbers being drawn: fetched meanwhile.
struct Ahead {
  const float* runs[4];
  int count;
};

FM_INLINE void fetch(const Ahead& ahead, int64_t element, int64_t elements) {
  for (int i = 0; i < ahead.count; ++i)
    for (int64_t line = 0; line < elements; line += kLineElements) __builtin_prefetch(ahead.runs[i] + element + line);
}

#if defined(FM_SIMD)

constexpr int kGroups = 2;

struct HalfState {
  Ints c0, c1, c2, c3;  // upper halves of the 64-bit lanes are ignored
};

// Everything that is the same for all blocks of a stream, as whole vectors in memory: compilers otherwise rebuild constants in the loop.
struct Generator {
  Ints key0[kPhiloxRounds], key1[kPhiloxRounds];
  Ints multiplier0, multiplier1;
  Ints after_first;  // c0 after round one, but for the sample id
  Ints first_mask;   // purpose ^ key1
  Ints second_mask;  // c1 after round one ^ key0 of round two
  Ints order;        // block of each lane, such that transposed groups of four come out in order
  Ints three_quarters, exponent_bits, word_exponent, half_quadrant, quadrant;
  Floats uniform_scale, uniform_shift, half, one, exponent_scale, turn_scale, log[7], sin[4], cos[3];
};

static Generator make_generator(const Stream& stream) {
  Generator g;
  for (uint32_t i = 0; i < kPhiloxRounds; ++i) {
    g.key0[i] = all_ints(stream.key0 + i * kPhiloxKeyBump0);
    g.key1[i] = all_ints(stream.key1 + i * kPhiloxKeyBump1);
  }
  g.multiplier0 = all_ints(kPhiloxMultiplier0);
  g.multiplier1 = all_ints(kPhiloxMultiplier1);
  g.after_first = all_ints(multiply_high(kPhiloxMultiplier1, stream.step) ^ stream.key0);
  g.first_mask = all_ints(stream.purpose ^ stream.key1);
  g.second_mask = all_ints((kPhiloxMultiplier1 * stream.step) ^ (stream.key0 + kPhiloxKeyBump0));
  alignas(64) uint32_t order[kLanes];
  for (uint32_t lane = 0; lane < kLanes; ++lane) order[lane] = (kLanes / 4) * (lane % 4) + lane / 4;
  g.order = load_ints(order);
  g.three_quarters = all_ints(kThreeQuarters);
  g.exponent_bits = all_ints(kExponentBits);
  g.word_exponent = all_ints(32u << 23);
  g.half_quadrant = all_ints(0x20000000u);
  g.quadrant = all_ints(0x40000000u);
  g.uniform_scale = all_floats(0x1p-32f);
  g.uniform_shift = all_floats(0x1p-33f);
  g.half = all_floats(0.5f);
  g.one = all_floats(1.0f);
  g.exponent_scale = all_floats(kMinusTwoLogTwo * kTwoToMinus23);
  g.turn_scale = all_floats(0x1p-31f);
  for (int i = 0; i < 7; ++i) g.log[i] = all_floats(kLog.c[i]);
  for (int i = 0; i < 4; ++i) g.sin[i] = all_floats(kSin.c[i]);
  for (int i = 0; i < 3; ++i) g.cos[i] = all_floats(kCos.c[i]);
  return g;
}

// The same generator, but the compiler does not know that: it reads the vectors as memory operands.
FM_INLINE const Generator& reread(const Generator& generator) {
  const Generator* g = &generator;
  asm volatile("" : "+r"(g));
  return *g;
}

FM_INLINE HalfState half_round(const Generator& g, int round, const HalfState& c) {
  Ints product1 = multiply_even(c.c2, g.multiplier1), product0 = multiply_even(c.c0, g.multiplier0);
  return HalfState{exclusive_or(high_halves(product1), c.c1, g.key0[round]), product1,
                   exclusive_or(high_halves(product0), c.c3, g.key1[round]), product0};
}

// The sample's share of round two: (hi ^ key1, lo) of M0 * c0.
struct SampleShare {
  Ints masked_high, low;
};

FM_INLINE SampleShare sample_share(const Generator& g, Ints ids) {
  Ints product = multiply_even(exclusive_or(ids, g.after_first), g.multiplier0);
  return SampleShare{exclusive_or(high_halves(product), g.key1[1]), product};
}

FM_INLINE HalfState first_two_rounds(const Generator& g, const SampleShare& share, Ints blocks) {
  Ints product0 = multiply_even(blocks, g.multiplier0);
  Ints product1 = multiply_even(exclusive_or(high_halves(product0), g.first_mask), g.multiplier1);
  return HalfState{exclusive_or(high_halves(product1), g.second_mask), product1, exclusive_or(product0, share.masked_high), share.low};
}

// N independent groups of lanes side by side: one group alone would wait for its own products.
// A group's even and odd lanes have their own blocks and shares.
template <int N>
struct GroupInput {
  Ints blocks[2 * N];
  SampleShare shares[2 * N];
};

// The words of a group's blocks, as the two pairs that Box-Muller takes: first[0] and second[0] are words 0 and 1, first[1] and second[1]
// words 2 and 3.
struct GroupWords {
  Ints first[2], second[2];
};

// The last round puts the even and odd lanes together again.
FM_INLINE GroupWords last_round(const Generator& g, const HalfState& even, const HalfState& odd) {
  constexpr int kLast = kPhiloxRounds - 1;
  Ints even1 = multiply_even(even.c2, g.multiplier1), odd1 = multiply_even(odd.c2, g.multiplier1);
  Ints even0 = multiply_even(even.c0, g.multiplier0), odd0 = multiply_even(odd.c0, g.multiplier0);
  return GroupWords{{exclusive_or(interleave_high_halves(even1, odd1), interleave_low_halves(even.c1, odd.c1), g.key0[kLast]),
                     exclusive_or(interleave_high_halves(even0, odd0), interleave_low_halves(even.c3, odd.c3), g.key1[kLast])},
                    {interleave_low_halves(even1, odd1), interleave_low_halves(even0, odd0)}};
}

// The words of N groups. meanwhile(n), n < N, is called between rounds: other work for the time that the products take.
template <int N, class Meanwhile>
FM_INLINE void philox_lanes(const Generator& g, const GroupInput<N>& input, const Meanwhile& meanwhile, GroupWords words[N]) {
  HalfState half[2 * N];
  for (int n = 0; n < 2 * N; ++n) half[n] = first_two_rounds(g, input.shares[n], input.blocks[n]);
#pragma GCC unroll 8
  for (int round = 2; round < kPhiloxRounds - 1; ++round) {
    for (int n = 0; n < 2 * N; ++n) half[n] = half_round(g, round, half[n]);
    if (round % 3 == 0 && round / 3 <= N) meanwhile(round / 3 - 1);
  }
  for (int n = 0; n < N; ++n) words[n] = last_round(g, half[2 * n], half[2 * n + 1]);
}

FM_INLINE Floats uniform_lanes(const Generator& g, Ints word) { return fma(unsigned_to_floats(word), g.uniform_scale, g.uniform_shift); }

// normal.h, line by line, N vectors abreast.
template <int N>
FM_INLINE void minus_two_log_lanes(const Generator& g, const Ints words[N], Floats s[N]) {
  Ints exponent[N];
  Floats f[N], q[N];
  for (int n = 0; n < N; ++n) {
    Ints bits = as_ints(unsigned_to_floats(words[n]) + g.half);  // of 2^32 u: an addition is cheaper here than uniform_lanes' fma
    exponent[n] = bits_and(subtract_ints(bits, g.three_quarters), g.exponent_bits);
    f[n] = as_floats(subtract_ints(bits, exponent[n])) - g.one;
    q[n] = fma(f[n], g.log[6], g.log[5]);
  }
  for (int i = 4; i >= 0; --i)
    for (int n = 0; n < N; ++n) q[n] = fma(q[n], f[n], g.log[i]);
  for (int n = 0; n < N; ++n) {
    s[n] = fma_minus(times(f[n], f[n]), fma(q[n], f[n], g.one), f[n] + f[n]);
    s[n] = fma(to_floats(subtract_ints(exponent[n], g.word_exponent)), g.exponent_scale, s[n]);
  }
}

template <int N>
FM_INLINE void sin_cos_lanes(const Generator& g, const Ints words[N], Floats sine[N], Floats cosine[N]) {
  Floats y[N], y2[N], a[N], b[N];
  for (int n = 0; n < N; ++n) {
    y[n] = times(to_floats(times_four(words[n])), g.turn_scale);
    y2[n] = times(y[n], y[n]);
    a[n] = fma(y2[n], g.sin[3], g.sin[2]);
    b[n] = fma(y2[n], g.cos[2], g.cos[1]);
  }
  for (int n = 0; n < N; ++n) a[n] = fma(y2[n], a[n], g.sin[1]);
  for (int n = 0; n < N; ++n) b[n] = fma(y2[n], b[n], g.cos[0]);
  for (int n = 0; n < N; ++n) a[n] = fma(y2[n], a[n], g.sin[0]);
  for (int n = 0; n < N; ++n) b[n] = fma(y2[n], b[n], g.one);
  for (int n = 0; n < N; ++n) {
    Ints rounded = add_ints(words[n], g.half_quadrant);
    a[n] = times(y[n], a[n]);
    swap_where_bit_30(rounded, g.quadrant, &a[n], &b[n]);
    sine[n] = flip_sign(a[n], rounded);
    cosine[n] = flip_sign(b[n], add_ints(rounded, g.quadrant));
  }
}

template <int N>
FM_INLINE void normal_lanes(const Generator& g, const Ints radius_words[N], const Ints angle_words[N], Floats even[N], Floats odd[N]) {
  Floats radius[N], sine[N], cosine[N];
  minus_two_log_lanes<N>(g, radius_words, radius);
  sin_cos_lanes<N>(g, angle_words, sine, cosine);
  for (int n = 0; n < N; ++n) {
    radius[n] = root_of_positive(radius[n]);
    even[n] = times(radius[n], cosine[n]);
    odd[n] = times(radius[n], sine[n]);
  }
}

// What becomes of a block's four words: its numbers, of which it holds kPositions.
struct ToNormals {
  static constexpr int64_t kPositions = 4;
  FM_INLINE void finish(const Generator& g, const GroupWords& words, Floats even[2], Floats odd[2]) {
    normal_lanes<2>(g, words.first, words.second, even, odd);
  }
};

struct ToUniforms {
  static constexpr int64_t kPositions = 4;
  FM_INLINE void finish(const Generator& g, const GroupWords& words, Floats even[2], Floats odd[2]) {
    for (int n = 0; n < 2; ++n) {
      even[n] = uniform_lanes(g, words.first[n]);
      odd[n] = uniform_lanes(g, words.second[n]);
    }
  }
};

// The words themselves, one bit a sign. Vectors and memcpy keep all bits, also those that would be a signalling NaN.
struct ToSigns {
  static constexpr int64_t kPositions = 128;
  FM_INLINE void finish(const Generator&, const GroupWords& words, Floats even[2], Floats odd[2]) {
    for (int n = 0; n < 2; ++n) {
      even[n] = as_floats(words.first[n]);
      odd[n] = as_floats(words.second[n]);
    }
  }
};

// Of a group, in memory.
constexpr int64_t kGroupNumbers = 4 * kLanes;

template <class Finish>
FM_INLINE void finish_group(const Generator& g, const GroupWords& words, float* out) {
  Floats even[2], odd[2];
  Finish::finish(g, words, even, odd);
  Floats columns[4] = {even[0], odd[0], even[1], odd[1]};
  transpose_groups(columns);
  for (int i = 0; i < 4; ++i) store_floats(out + i * kLanes, columns[i]);
}

// Groups one set of N after another. The numbers of a set are made of its words while the words of the next are drawn: the one is a chain
// of dependent products, the other of dependent polynomials, and a processor does not look far enough ahead to find both.
template <class Finish, int N>
class Sets {
 public:
  explicit Sets(float* out) : out_(out) {}

  FM_METHOD void start(const Generator& g, const GroupInput<N>& input) {
    philox_lanes<N>(g, input, [](int) __attribute__((always_inline)) {}, words_);
  }
  FM_METHOD void next(const Generator& g, const GroupInput<N>& input) {
    philox_lanes<N>(
        g, input, [&](int n) __attribute__((always_inline)) { finish_group<Finish>(g, words_[n], out_ + n * kGroupNumbers); }, words_);
    out_ += N * kGroupNumbers;
  }
  FM_METHOD float* end(const Generator& g) {
    for (int n = 0; n < N; ++n) finish_group<Finish>(g, words_[n], out_ + n * kGroupNumbers);
    return out_ + N * kGroupNumbers;
  }

 private:
  GroupWords words_[N];
  float* out_;
};

template <int N>
FM_INLINE GroupInput<N> run_input(const Generator& g, const SampleShare& share, uint32_t block) {
  GroupInput<N> input;
  for (int n = 0; n < N; ++n) {
    input.blocks[2 * n] = add_ints(g.order, all_ints(block + n * kLanes));
    input.blocks[2 * n + 1] = high_halves(input.blocks[2 * n]);
    input.shares[2 * n] = input.shares[2 * n + 1] = share;
  }
  return input;
}

template <class Finish>
static void fill_run(const Generator& generator, uint32_t id, uint32_t block, int64_t blocks, const Ahead& ahead, float* out) {
  constexpr int64_t kBlocks = kGroups * kLanes;
  SampleShare share = sample_share(generator, all_ints(id));
  int64_t i = 0;
  if (blocks > kLanes) {
    Sets<Finish, kGroups> sets(out);
    fetch(ahead, 0, 4 * kBlocks);
    sets.start(generator, run_input<kGroups>(generator, share, block));
    for (i = kBlocks; i + kLanes < blocks; i += kBlocks) {
      const Generator& g = reread(generator);
      fetch(ahead, 4 * i, 4 * kBlocks);
      sets.next(g, run_input<kGroups>(g, share, block + static_cast<uint32_t>(i)));
    }
    out = sets.end(generator);
  }
  if (i >= blocks) return;
  Sets<Finish, 1> rest(out);
  rest.start(generator, run_input<1>(generator, share, block + static_cast<uint32_t>(i)));
  rest.end(generator);
}

// Of counters that are listed one by one.
FM_INLINE GroupInput<1> listed_input(const Generator& g, const uint32_t* ids, const uint32_t* blocks) {
  Ints id = pick(load_ints(ids), g.order), block = pick(load_ints(blocks), g.order);
  return GroupInput<1>{{block, high_halves(block)}, {sample_share(g, id), sample_share(g, high_halves(id))}};
}

// ids and blocks must be readable up to the next multiple of kLanes.
template <class Finish>
static void fill_listed(const Generator& generator, const uint32_t* ids, const uint32_t* blocks, int64_t count, float* out) {
  if (count <= 0) return;
  Sets<Finish, 1> sets(out);
  sets.start(generator, listed_input(generator, ids, blocks));
  for (int64_t i = kLanes; i < count; i += kLanes) {
    const Generator& g = reread(generator);
    sets.next(g, listed_input(g, ids + i, blocks + i));
  }
  sets.end(generator);
}

#else

struct ToNormals {
  static constexpr int64_t kPositions = 4;
  FM_INLINE void finish(const Words& words, float* out) {
    normal_pair(words.w[0], words.w[1], out, out + 1);
    normal_pair(words.w[2], words.w[3], out + 2, out + 3);
  }
};

struct ToUniforms {
  static constexpr int64_t kPositions = 4;
  FM_INLINE void finish(const Words& words, float* out) {
    for (int i = 0; i < 4; ++i) out[i] = uniform_from_word(words.w[i]);
  }
};

struct ToSigns {
  static constexpr int64_t kPositions = 128;
  FM_INLINE void finish(const Words& words, float* out) { __builtin_memcpy(out, words.w, sizeof(words.w)); }
};

using Generator = Stream;

static Generator make_generator(const Stream& stream) { return stream; }

template <class Finish>
static void fill_run(const Generator& stream, uint32_t id, uint32_t block, int64_t blocks, const Ahead&, float* out) {
  for (int64_t i = 0; i < blocks; ++i) Finish::finish(stream_words(stream, id, block + static_cast<uint32_t>(i)), out + 4 * i);
}

template <class Finish>
static void fill_listed(const Generator& stream, const uint32_t* ids, const uint32_t* blocks, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) Finish::finish(stream_words(stream, ids[i], blocks[i]), out + 4 * i);
}

#endif

}  // namespace FM_ISA
}  // namespace fm
