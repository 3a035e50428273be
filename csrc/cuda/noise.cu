// Normals, uniforms, signs and raw words of a stream, in the logical order of the noise contract, into any layout and dtype.
#include "kernels.h"
#include "samples.h"

namespace fm {
namespace cuda {
namespace {

struct NoiseLaunch {
  NoiseCall call;
  Geometry geometry;
  Blocks blocks;
};

struct NoiseRecord {
  uint32_t id;
};

__device__ __forceinline__ void draw(DrawKind kind, const Stream& stream, uint32_t id, uint32_t block, float* to) {
  if (kind == DrawKind::uniform) draw_uniforms(stream, id, block, to);
  if (kind == DrawKind::normal) draw_normals(stream, id, block, to);
}

template <class S>
__global__ void __launch_bounds__(kThreads, kBlocks) packed_kernel(const NoiseLaunch launch) {
  using P = Packs<S>;
  const Geometry& geometry = launch.geometry;
  const Key key = key_of(launch.call.key_words);
  const Stream stream = stream_of(key, launch.call.purpose);
  auto prepare = [&](int64_t sample, bool) { return NoiseRecord{sample_id(key, sample)}; };
  walk<NoiseRecord>(geometry, prepare, [&](const NoiseRecord& record, const Run& run) {
    const uint32_t elements = static_cast<uint32_t>(run.elements);
    const int64_t base = static_cast<int64_t>(static_cast<uint64_t>(static_cast<uint32_t>(run.sample)) * elements);
    for (uint32_t chunk = run.first_chunk; chunk < run.stop_chunk; ++chunk) {
      FM_UNROLL
      for (int i = 0; i < P::kCount; ++i) {
        uint32_t offset = P::offset(geometry, chunk, run.lane, i);
        float values[P::kWidth];
        if (offset >= elements) continue;
        for (int j = 0; j < P::kWidth; j += kBlock)
          draw(launch.call.kind, stream, record.id, (offset + static_cast<uint32_t>(j)) / kBlock, values + j);
        store_pack(static_cast<S*>(launch.call.out.data), base + offset, values);
      }
    }
  });
}

// A counter block at a time, for any layout and dtype.
__global__ void __launch_bounds__(kThreads, kBlocks) strided_kernel(const NoiseLaunch launch) {
  const NoiseCall& call = launch.call;
  const Key key = key_of(call.key_words);
  const Stream stream = stream_of(key, call.purpose);
  auto prepare = [&](int64_t sample, bool) { return NoiseRecord{sample_id(key, sample)}; };
  walk<NoiseRecord>(launch.geometry, prepare, [&](const NoiseRecord& record, const Run& run) {
    for (uint32_t chunk = run.first_chunk; chunk < run.stop_chunk; ++chunk)
      for (int i = 0; i < kEach / kBlock; ++i) {
        int64_t index = block_index(launch.geometry, run, chunk, i);
        if (index * kBlock >= run.elements) continue;
        BlockPlace at = place_of_block(launch.blocks, index);
        float values[kBlock] = {};
        if (call.kind == DrawKind::word) {
          Words words = stream_words(stream, record.id, at.counter);
          for (int j = 0; j < kBlock; ++j)
            if (j < at.count)
              static_cast<int64_t*>(call.out.data)[offset_of(call.out, run.sample, at.channel, at.position + j)] = words.w[j];
          continue;
        }
        draw(call.kind, stream, record.id, at.counter, values);
        store_block<float>(call.out, run.sample, at, values);
      }
  });
}

template <class S>
bool runs_packed(const NoiseCall& call, void* stream) {
  if (!are_packed(call.shape, DataTransform{0, 0, false}, Packs<S>::kWidth, {&call.out})) return false;
  NoiseLaunch args = {call, geometry(call.shape.batch, call.shape.channels * call.shape.positions), {}};
  launch(packed_kernel<S>, blocks_of(args.geometry, kBlocks), stream, args);
  return true;
}

bool runs_packed(const NoiseCall& call, void* stream, Dtype dtype) {
  if (dtype == Dtype::float32) return runs_packed<float>(call, stream);
  if (dtype == Dtype::bfloat16) return runs_packed<Bfloat16>(call, stream);
  return dtype == Dtype::float16 && runs_packed<Float16>(call, stream);
}

// Signs are those of one probe of this stream and index.
void draw_signs(const NoiseCall& call, void* stream) {
  ProbeCall signs = {};
  signs.shape = call.shape;
  signs.view = call.out;
  signs.probes = signs.share = 1;
  signs.key_words = call.key_words;
  signs.index = call.purpose >> kStreamBits;
  probe(signs, static_cast<uint32_t>(call.purpose % kStreamLimit), nullptr, stream);
}

}  // namespace

void noise(const NoiseCall& call, void* stream) {
  if (call.shape.batch * call.shape.channels * call.shape.positions == 0) return;
  if (call.kind == DrawKind::sign) return draw_signs(call, stream);
  if (call.kind != DrawKind::word && runs_packed(call, stream, call.out.dtype)) return;
  NoiseLaunch args = {call, {}, blocks_of_sample(call.shape, call.out)};
  args.geometry = geometry(call.shape.batch, padded_elements(args.blocks));
  launch(strided_kernel, blocks_of(args.geometry, kBlocks), stream, args);
}

}  // namespace cuda
}  // namespace fm
