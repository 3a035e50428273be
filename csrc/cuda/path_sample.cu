// x_t = a x1 + s x0 (paper eq. 11; OT: eq. 22), with x0 read or drawn, and the time and coefficients of each sample.
#include "kernels.h"
#include "samples.h"

namespace fm {
namespace cuda {
namespace {

struct SampleLaunch {
  SampleCall call;
  Geometry geometry;
  Blocks blocks;
};

// What the elements of a sample share.
template <class T>
struct SampleRecord {
  T a, s;
  uint32_t id;
  bool mirror;
};

// The paths that take no more than a few instructions a sample are evaluated where they are used.
bool is_simple(const ScheduleCall& schedule) {
  return schedule.path.kind == kPathOT && schedule.objective != kScoreFlow && schedule.law.sampler != kTimeLogitNormal;
}

// The same call, so that the compiler knows it to be simple and leaves out the rest.
__device__ __forceinline__ ScheduleCall simple(const ScheduleCall& call) {
  ScheduleCall schedule = call;
  schedule.path.kind = kPathOT;
  if (schedule.objective == kScoreFlow) schedule.objective = kVelocity;
  if (schedule.law.sampler == kTimeLogitNormal) schedule.law.sampler = kTimeUniform;
  return schedule;
}

template <class C>
__device__ __forceinline__ Coefficients fill(const ScheduleCall& schedule, const Key& key, int64_t sample, bool owns) {
  C time;
  Coefficients c = coefficients_of<C>(schedule, key, sample, &time);
  if (owns) put_coefficients<C>(schedule, sample, time, c);
  c.a = static_cast<double>(static_cast<C>(c.a));  // as the loss will read them
  c.s = static_cast<double>(static_cast<C>(c.s));
  return c;
}

// Every other path: a thread a sample, before the kernel that reads the coefficients.
__global__ void __launch_bounds__(kThreads) schedule_kernel(const SampleLaunch launch) {
  const Key key = key_of(launch.call.key_words);
  int64_t sample = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  for (; sample < launch.call.shape.batch; sample += int64_t(gridDim.x) * kThreads)
    launch.call.schedule.wide ? fill<double>(launch.call.schedule, key, sample, true)
                              : fill<float>(launch.call.schedule, key, sample, true);
}

// kWide: whether coefficients may be float64.
template <class T, bool kWide>
__device__ __forceinline__ SampleRecord<T> prepare_sample(const SampleCall& call, const Key& key, int64_t sample, bool owns) {
  Coefficients c = {};
  if (call.schedule.path.kind == kPathGiven) {
    Dtype dtype = kWide ? call.coefficient_dtype : Dtype::float32;
    c.a = coefficient_at(call.coefficients, dtype, sample, kA);
    c.s = coefficient_at(call.coefficients, dtype, sample, kS);
  } else if (kWide && call.schedule.wide) {
    c = fill<double>(simple(call.schedule), key, sample, owns);
  } else {
    c = fill<float>(simple(call.schedule), key, sample, owns);
  }
  uint32_t id = sample_id(key, sample);
  return SampleRecord<T>{static_cast<T>(c.a), static_cast<T>(c.s), id, is_mirrored(call.transform, key, id)};
}

// kPlain: no sample is mirrored.
template <class XT, class X1, bool kDraw, bool kPlain>
__global__ void __launch_bounds__(kThreads, kBlocks) packed_kernel(const SampleLaunch launch) {
  using P = Packs<XT>;
  // Several packs are drawn without a branch between them, also for elements that are not there: so they share the keys of the rounds.
  constexpr bool kTogether = kDraw && P::kCount > 1;
  const SampleCall& call = launch.call;
  const Geometry& geometry = launch.geometry;
  const Key key = key_of(call.key_words);
  const Stream stream = stream_of(key, kStreamX0), dequantise = stream_of(key, kStreamDequantise);
  auto prepare = [&](int64_t sample, bool owns) { return prepare_sample<float, false>(call, key, sample, owns); };
  walk<SampleRecord<float>>(geometry, prepare, [&](const SampleRecord<float>& shared, const Run& run) {
    const SampleRecord<float> record = shared;
    const bool mirror = !kPlain && record.mirror;
    const uint32_t elements = static_cast<uint32_t>(run.elements);
    const int64_t base = static_cast<int64_t>(static_cast<uint64_t>(static_cast<uint32_t>(run.sample)) * elements);
    for (uint32_t chunk = run.first_chunk; chunk < run.stop_chunk; ++chunk) {
      Pack<X1, P::kWidth> x1_packs[P::kCount];
      Pack<XT, P::kWidth> x0_packs[P::kCount];
      FM_UNROLL
      for (int i = 0; i < P::kCount; ++i) {
        uint32_t offset = P::offset(geometry, chunk, run.lane, i);
        if (kTogether) x1_packs[i] = {};
        if (offset >= elements) continue;
        x1_packs[i] = load_data_pack<P::kWidth, X1>(call.x1, base, offset, mirror, launch.blocks.width);
        if (!kDraw) x0_packs[i] = load_pack<XT, P::kWidth>(call.x0.data, base + offset);
      }
      FM_UNROLL
      for (int i = 0; i < P::kCount; ++i) {
        uint32_t offset = P::offset(geometry, chunk, run.lane, i), block = offset / kBlock;
        if (!kTogether && offset >= elements) continue;
        float x1[P::kWidth], x0[P::kWidth], x_t[P::kWidth];
        map_data_pack<P::kWidth>(x1_packs[i], mirror, call.transform, dequantise, record.id, block, x1);
        source_pack<kDraw>(x0_packs[i], stream, record.id, block, x0);
        for (int j = 0; j < P::kWidth; ++j) x_t[j] = interpolate(record.a, x1[j], record.s, x0[j]);
        if (offset < elements) store_pack(static_cast<XT*>(call.x_t.data), base + offset, x_t);
      }
    }
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads, kWideBlocks) strided_kernel(const SampleLaunch launch) {
  const SampleCall& call = launch.call;
  const Key key = key_of(call.key_words);
  const Stream stream = stream_of(key, kStreamX0), dequantise = stream_of(key, kStreamDequantise);
  auto prepare = [&](int64_t sample, bool owns) { return prepare_sample<T, true>(call, key, sample, owns); };
  walk<SampleRecord<T>>(launch.geometry, prepare, [&](const SampleRecord<T>& record, const Run& run) {
    for (uint32_t chunk = run.first_chunk; chunk < run.stop_chunk; ++chunk)
      for (int i = 0; i < kEach / kBlock; ++i) {
        int64_t index = block_index(launch.geometry, run, chunk, i);
        if (index * kBlock >= run.elements) continue;
        BlockPlace at = place_of_block(launch.blocks, index);
        T x1[kBlock], x0[kBlock], x_t[kBlock];
        load_data_block<T>(call.x1, run.sample, launch.blocks, at, record.mirror, call.transform, dequantise, record.id, x1);
        source_block<T>(call.x0, run.sample, at, stream, record.id, x0);
        for (int j = 0; j < kBlock; ++j) x_t[j] = interpolate(record.a, x1[j], record.s, x0[j]);
        store_block<T>(call.x_t, run.sample, at, x_t);
      }
  });
}

template <class XT, class X1, bool kDraw>
bool run_packed(const SampleCall& call, void* stream) {
  const Shape& shape = call.shape;
  if (!are_packed(shape, call.transform, Packs<XT>::kWidth, {&call.x_t, &call.x1, &call.x0})) return false;
  SampleLaunch args = {call, geometry(shape.batch, shape.channels * shape.positions), blocks_of_sample(shape, call.x_t)};
  launch(call.transform.flip > 0 ? packed_kernel<XT, X1, kDraw, false> : packed_kernel<XT, X1, kDraw, true>,
         blocks_of(args.geometry, kBlocks), stream, args);
  return true;
}

// The dtypes of training: x1 like x_t, float32 or uint8; x0 drawn, or like both.
template <class XT>
bool run_packed_as(const SampleCall& call, void* stream) {
  Dtype x_t = call.x_t.dtype, x1 = call.x1.dtype;
  if (call.x0.data) return x1 == x_t && call.x0.dtype == x_t && run_packed<XT, XT, false>(call, stream);
  if (x1 == x_t) return run_packed<XT, XT, true>(call, stream);
  if (x1 == Dtype::float32) return run_packed<XT, float, true>(call, stream);
  return x1 == Dtype::uint8 && run_packed<XT, uint8_t, true>(call, stream);
}

bool runs_packed(const SampleCall& call, void* stream) {
  if (call.wide) return false;
  if (call.x_t.dtype == Dtype::float32) return run_packed_as<float>(call, stream);
  if (call.x_t.dtype == Dtype::bfloat16) return run_packed_as<Bfloat16>(call, stream);
  return run_packed_as<Float16>(call, stream);
}

}  // namespace

void path_sample(const SampleCall& given, void* stream) {
  SampleCall call = given;
  if (call.shape.batch == 0) return;
  SampleLaunch args = {call, {}, blocks_of_sample(call.shape, call.x_t)};
  if (call.schedule.path.kind != kPathGiven && !is_simple(call.schedule)) {
    int64_t needed = (call.shape.batch + kThreads - 1) / kThreads, most = device_blocks(kBlocks);
    launch(schedule_kernel, needed < most ? needed : most, stream, args);
    args.call.schedule.path.kind = call.schedule.path.kind = kPathGiven;
  }
  if (runs_packed(call, stream)) return;
  args.geometry = geometry(call.shape.batch, padded_elements(args.blocks));
  launch(call.wide ? strided_kernel<double> : strided_kernel<float>, blocks_of(args.geometry, kWideBlocks), stream, args);
}

}  // namespace cuda
}  // namespace fm
