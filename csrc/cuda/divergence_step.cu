// z . (J^T z) of each probe and sample (Hutchinson's estimate of the divergence, paper eq. 34), with the probes z drawn again, not read.
#include "chunk_sums.h"
#include "kernels.h"
#include "signs.h"

namespace fm {
namespace cuda {
namespace {

__device__ __forceinline__ void put_sum(const SignLaunch& launch, const Run& run, uint32_t chunk, double sum) {
  put_chunk(launch.geometry, run, chunk, sum, launch.partial);
}

template <class S>
__global__ void __launch_bounds__(kThreads, kBlocks) packed_signs_kernel(const SignLaunch launch) {
  constexpr int kWidth = Packs<S>::kWidth, kCount = kSigns / kWidth;
  const Key key = key_of(launch.call.key_words);
  auto prepare = [&](int64_t entry, bool) { return sign_record(launch, key, entry); };
  walk<SignRecord>(launch.geometry, prepare, [&](const SignRecord& record, const Run& run) {
    for (uint32_t chunk = run.first_chunk; chunk < run.stop_chunk; ++chunk) {
      int64_t unit = (static_cast<int64_t>(chunk) << launch.geometry.team_bits) + run.lane;
      float sum = 0;
      if (unit * kSigns < run.elements) {
        SignPlace place = sign_place(launch, unit);
        Pack<S, kWidth> packs[kCount];
        const S* data = static_cast<const S*>(launch.call.view.data) + first_offset<kWidth>(launch, record, place);
        // Before the drawing, which hides the loads.
        FM_UNROLL
        for (int i = 0; i < kCount; ++i)
          if (pack_start<kWidth>(place, i) < place.at.count) packs[i] = load_pack<S, kWidth>(data, next_offset<kWidth>(i));
        Words words = draw_signs(launch, key, record, place.at);
        FM_UNROLL
        for (int i = 0; i < kCount; ++i) {
          float g[kWidth];
          if (pack_start<kWidth>(place, i) >= place.at.count) continue;
          widen_pack(packs[i], g);
          for (int j = 0; j < kWidth; ++j) sum += with_sign(g[j], pack_word<kWidth>(words, i), first_bit<kWidth>(place, i) + j);
        }
      }
      put_sum(launch, run, chunk, static_cast<double>(sum));
    }
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks) strided_signs_kernel(const SignLaunch launch) {
  const Key key = key_of(launch.call.key_words);
  auto prepare = [&](int64_t entry, bool) { return sign_record(launch, key, entry); };
  walk<SignRecord>(launch.geometry, prepare, [&](const SignRecord& record, const Run& run) {
    for (uint32_t chunk = run.first_chunk; chunk < run.stop_chunk; ++chunk) {
      int64_t unit = (static_cast<int64_t>(chunk) << launch.geometry.team_bits) + run.lane;
      T sum = 0;
      if (unit * kSigns < run.elements) {
        SignPlace place = sign_place(launch, unit);
        Words words = draw_signs(launch, key, record, place.at);
        FM_UNROLL
        for (int i = 0; i < kSigns; ++i) {
          int start = i * kSignLanes + place.lane;
          if (start >= place.at.count) continue;
          T g = load_any<T>(launch.call.view, sign_offset(launch, record, place.at, start));
          sum += with_sign(g, words.w[i * kSignLanes / kWordSigns], start % kWordSigns);
        }
      }
      put_sum(launch, run, chunk, static_cast<double>(sum));
    }
  });
}

// The model was given probes of its own dtype.
FM_HD float rounded_to(Dtype dtype, float z) {
  if (dtype == Dtype::bfloat16) return widen(to_bfloat16(z));
  return dtype == Dtype::float16 ? widen(to_float16(z)) : z;
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks) normals_kernel(const SignLaunch launch) {
  const View& view = launch.call.view;
  const Key key = key_of(launch.call.key_words);
  auto prepare = [&](int64_t entry, bool) { return sign_record(launch, key, entry); };
  walk<SignRecord>(launch.geometry, prepare, [&](const SignRecord& record, const Run& run) {
    for (uint32_t chunk = run.first_chunk; chunk < run.stop_chunk; ++chunk) {
      T sum = 0;
      for (int i = 0; i < kEach / kBlock; ++i) {
        int64_t index = block_index(launch.geometry, run, chunk, i);
        if (index * kBlock >= run.elements) continue;
        BlockPlace at = place_of_block(launch.blocks, index);
        float z[kBlock];
        draw_normals(stream_of(key, record.purpose), record.id, at.counter, z);
        for (int j = 0; j < kBlock; ++j) {
          if (j >= at.count) continue;
          T g = load_any<T>(view, record.base + at.channel * view.channel_stride + (at.position + j) * view.position_stride);
          sum = multiply_add(g, static_cast<T>(rounded_to(view.dtype, z[j])), sum);
        }
      }
      put_sum(launch, run, chunk, static_cast<double>(sum));
    }
  });
}

__global__ void __launch_bounds__(kThreads) finish_kernel(const Evaluation evaluation) {
  for (int64_t b = int64_t(blockIdx.x) * kThreads + threadIdx.x; b < evaluation.batch; b += int64_t(gridDim.x) * kThreads)
    finish_evaluation(evaluation, b);
}

int64_t at_most(int64_t blocks) {
  int64_t most = device_blocks(kBlocks);
  return blocks < most ? blocks : most;
}

using Kernel = void (*)(SignLaunch);

template <class S>
Kernel packed_or_strided(const ProbeCall& call) {
  return has_packed_rows(call, Packs<S>::kWidth) ? packed_signs_kernel<S> : strided_signs_kernel<float>;
}

Kernel kernel_of(const DivergenceCall& call) {
  const ProbeCall& probes = call.probes;
  if (call.normals) return probes.view.dtype == Dtype::float64 ? normals_kernel<double> : normals_kernel<float>;
  if (probes.view.dtype == Dtype::float64) return strided_signs_kernel<double>;
  if (probes.view.dtype == Dtype::float32) return packed_or_strided<float>(probes);
  return probes.view.dtype == Dtype::bfloat16 ? packed_or_strided<Bfloat16>(probes) : packed_or_strided<Float16>(probes);
}

SignLaunch launch_of(const DivergenceCall& call, const uint32_t* parities) {
  SignLaunch args = sign_launch(call.probes, kStreamProbe, parities);
  if (!call.normals) return args;
  args.blocks = blocks_of_sample(call.probes.shape, call.probes.view);
  args.geometry = geometry(call.probes.probes * call.probes.shape.batch, padded_elements(args.blocks));
  return args;
}

}  // namespace

int64_t divergence_scratch(const DivergenceCall& call) { return chunk_scratch(launch_of(call, nullptr).geometry); }

void divergence_step(const DivergenceCall& call, const uint32_t* parities, double* scratch, void* stream) {
  SignLaunch args = launch_of(call, parities);
  args.partial = partial_of(args.geometry, scratch, call.dots);
  if (args.geometry.batch > 0) launch(kernel_of(call), blocks_of(args.geometry, kBlocks), stream, args);
  add_chunks(args.geometry, scratch, call.dots, stream);
  if (call.last && call.evaluation.batch > 0)
    launch(finish_kernel, at_most((call.evaluation.batch + kThreads - 1) / kThreads), stream, call.evaluation);
}

}  // namespace cuda
}  // namespace fm
