// Probes of the divergence estimate: random signs (Rademacher), turned by the parities of a structured probe (Hadamard, coloured).
#include "kernels.h"
#include "signs.h"

namespace fm {
namespace cuda {
namespace {

template <class S>
__global__ void __launch_bounds__(kThreads, kBlocks) packed_kernel(const SignLaunch launch) {
  constexpr int kWidth = Packs<S>::kWidth;
  const Key key = key_of(launch.call.key_words);
  auto prepare = [&](int64_t entry, bool) { return sign_record(launch, key, entry); };
  walk<SignRecord>(launch.geometry, prepare, [&](const SignRecord& record, const Run& run) {
    for (uint32_t chunk = run.first_chunk; chunk < run.stop_chunk; ++chunk) {
      int64_t unit = (static_cast<int64_t>(chunk) << launch.geometry.team_bits) + run.lane;
      if (unit * kSigns >= run.elements) continue;
      SignPlace place = sign_place(launch, unit);
      Words words = draw_signs(launch, key, record, place.at);
      S* data = static_cast<S*>(launch.call.view.data) + first_offset<kWidth>(launch, record, place);
      FM_UNROLL
      for (int i = 0; i < kSigns / kWidth; ++i) {
        float values[kWidth];
        if (pack_start<kWidth>(place, i) >= place.at.count) continue;
        for (int j = 0; j < kWidth; ++j) values[j] = with_sign(1.0f, pack_word<kWidth>(words, i), first_bit<kWidth>(place, i) + j);
        store_pack(data, next_offset<kWidth>(i), values);
      }
    }
  });
}

__global__ void __launch_bounds__(kThreads, kBlocks) strided_kernel(const SignLaunch launch) {
  const Key key = key_of(launch.call.key_words);
  auto prepare = [&](int64_t entry, bool) { return sign_record(launch, key, entry); };
  walk<SignRecord>(launch.geometry, prepare, [&](const SignRecord& record, const Run& run) {
    for (uint32_t chunk = run.first_chunk; chunk < run.stop_chunk; ++chunk) {
      int64_t unit = (static_cast<int64_t>(chunk) << launch.geometry.team_bits) + run.lane;
      if (unit * kSigns >= run.elements) continue;
      SignPlace place = sign_place(launch, unit);
      Words words = draw_signs(launch, key, record, place.at);
      FM_UNROLL
      for (int i = 0; i < kSigns; ++i) {
        int start = i * kSignLanes + place.lane;
        float value = with_sign(1.0f, words.w[i * kSignLanes / kWordSigns], start % kWordSigns);
        if (start < place.at.count) store_any<float>(launch.call.view, sign_offset(launch, record, place.at, start), value);
      }
    }
  });
}

struct ParityLaunch {
  const int64_t *codes, *rows;
  int64_t probes, channels, positions, row_blocks;
  uint32_t* parities;
};

// Bit i of a word: the parity of code & row at its element i. A thread a word.
__global__ void __launch_bounds__(kThreads) parity_kernel(const ParityLaunch launch) {
  int64_t words = launch.channels * launch.row_blocks * 4, count = launch.probes * words;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < count; i += int64_t(gridDim.x) * kThreads) {
    int64_t probe = i / words, word = i % words, channel = word / 4 / launch.row_blocks;
    int64_t position = word / 4 % launch.row_blocks * kSignBlock + word % 4 * kWordSigns;
    uint32_t bits = 0;
    for (int j = 0; j < kWordSigns && position + j < launch.positions; ++j) {
      int64_t common = launch.codes[channel * launch.positions + position + j] & launch.rows[probe];
      bits |= static_cast<uint32_t>(__popcll(common) & 1) << j;
    }
    launch.parities[i] = bits;
  }
}

template <class S>
bool runs_packed(const SignLaunch& args, void* stream) {
  if (!has_packed_rows(args.call, Packs<S>::kWidth)) return false;
  launch(packed_kernel<S>, blocks_of(args.geometry, kBlocks), stream, args);
  return true;
}

bool runs_packed(const SignLaunch& args, void* stream, Dtype dtype) {
  if (dtype == Dtype::float32) return runs_packed<float>(args, stream);
  if (dtype == Dtype::bfloat16) return runs_packed<Bfloat16>(args, stream);
  return dtype == Dtype::float16 && runs_packed<Float16>(args, stream);
}

}  // namespace

int64_t parity_words(const ProbeCall& call) {
  return call.codes ? call.probes * call.shape.channels * ((call.shape.positions + kSignBlock - 1) / kSignBlock) * 4 : 0;
}

void fill_parities(const ProbeCall& call, uint32_t* parities, void* stream) {
  int64_t words = parity_words(call), blocks = (words + kThreads - 1) / kThreads, most = device_blocks(kBlocks);
  ParityLaunch args = {
      call.codes, call.rows, call.probes, call.shape.channels, call.shape.positions, (call.shape.positions + kSignBlock - 1) / kSignBlock,
      parities};
  if (words > 0) launch(parity_kernel, blocks < most ? blocks : most, stream, args);
}

void probe(const ProbeCall& call, uint32_t stream_code, const uint32_t* parities, void* stream) {
  if (call.probes * call.shape.batch * call.shape.channels * call.shape.positions == 0) return;
  SignLaunch args = sign_launch(call, stream_code, parities);
  if (!runs_packed(args, stream, call.view.dtype)) launch(strided_kernel, blocks_of(args.geometry, kBlocks), stream, args);
}

}  // namespace cuda
}  // namespace fm
