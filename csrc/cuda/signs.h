// Random signs as bits, 128 a Philox block, shared by neighbouring threads that draw the block each for themselves.
#pragma once

#include "samples.h"

namespace fm {
namespace cuda {

constexpr int kSignBlock = 128;
constexpr int kSigns = 32;                       // of a thread
constexpr int kSignLanes = kSignBlock / kSigns;  // threads that share a block
constexpr int kWordSigns = 32;

struct SignLaunch {
  ProbeCall call;
  Geometry geometry;  // of all samples of all probes
  Blocks blocks;
  uint32_t stream;
  const uint32_t* parities;  // [probes, blocks of a sample, 4], or nullptr
  double* partial;           // one sum a chunk of each sample, or nullptr
};

struct SignRecord {
  int64_t base;  // offset of the sample in the tensor
  int64_t probe;
  uint32_t id, purpose;
};

// Where the block of one thread lies, and which of the threads that share it this is.
struct SignPlace {
  BlockPlace at;
  int lane;
};

FM_HD float with_sign(float x, uint32_t word, int bit) { return bit_cast<float>(bit_cast<uint32_t>(x) ^ (word << (31 - bit) & kSignBit)); }

FM_HD double with_sign(double x, uint32_t word, int bit) {
  return bit_cast<double>(bit_cast<uint64_t>(x) ^ static_cast<uint64_t>(word << (31 - bit) & kSignBit) << 32);
}

FM_HD SignRecord sign_record(const SignLaunch& launch, const Key& key, int64_t entry) {
  const ProbeCall& call = launch.call;
  int64_t probe = entry / call.shape.batch, sample = entry - probe * call.shape.batch;
  uint32_t index = static_cast<uint32_t>(call.index + (call.first + probe) / call.share);
  int64_t offset = probe * call.probe_stride + sample * call.view.batch_stride;
  return SignRecord{offset, probe, sample_id(key, sample), purpose_of(launch.stream, index)};
}

FM_HD SignPlace sign_place(const SignLaunch& launch, int64_t unit) {
  return SignPlace{place_of_block(launch.blocks, unit / kSignLanes), static_cast<int>(unit % kSignLanes)};
}

FM_HD Words draw_signs(const SignLaunch& launch, const Key& key, const SignRecord& record, const BlockPlace& at) {
  Words words = stream_words(stream_of(key, record.purpose), record.id, at.counter);
  if (launch.parities) {
    int64_t block =
        record.probe * launch.blocks.channels * launch.blocks.row_blocks + at.channel * launch.blocks.row_blocks + at.position / kSignBlock;
    for (int i = 0; i < 4; ++i) words.w[i] ^= launch.parities[4 * block + i];
  }
  return words;
}

// Of the i-th pack of `kWidth` signs of a thread: where it begins in the block, the word that it takes, its first bit there, and its offset
// from the thread's first one in a packed row.
template <int kWidth>
FM_HD int pack_start(const SignPlace& place, int i) {
  return (i * kSignLanes + place.lane) * kWidth;
}

template <int kWidth>
FM_HD int next_offset(int i) {
  return i * kSignLanes * kWidth;
}

template <int kWidth>
FM_HD uint32_t pack_word(const Words& words, int i) {
  return words.w[next_offset<kWidth>(i) / kWordSigns];
}

FM_HD int64_t sign_offset(const SignLaunch& launch, const SignRecord& record, const BlockPlace& at, int start) {
  const View& view = launch.call.view;
  return record.base + at.channel * view.channel_stride + (at.position + start) * view.position_stride;
}

template <int kWidth>
FM_HD int64_t first_offset(const SignLaunch& launch, const SignRecord& record, const SignPlace& place) {
  return sign_offset(launch, record, place.at, 0) + place.lane * kWidth;
}

template <int kWidth>
FM_HD int first_bit(const SignPlace& place, int i) {
  return next_offset<kWidth>(i) % kWordSigns + place.lane * kWidth;
}

// Whether rows are whole packs that begin on 16-byte boundaries.
inline bool has_packed_rows(const ProbeCall& call, int width) {
  const View& view = call.view;
  bool aligned = reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && call.shape.positions % width == 0 && view.position_stride == 1;
  return aligned && view.channel_stride % width == 0 && view.batch_stride % width == 0 && call.probe_stride % width == 0;
}

inline SignLaunch sign_launch(const ProbeCall& call, uint32_t stream, const uint32_t* parities) {
  SignLaunch args = {call, {}, blocks_of_sample(call.shape, call.view, kSignBlock), stream, parities, nullptr};
  args.geometry = geometry(call.probes * call.shape.batch, padded_elements(args.blocks), kSigns);
  return args;
}

}  // namespace cuda
}  // namespace fm
