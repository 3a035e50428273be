// The loss w (k o - (c1 x1 + c0 x0))^2 (paper eq. 14; OT: eq. 23) and its gradient in one pass over o, x1 and x0, which is read or drawn
// again.
#include "kernels.h"
#include "reduce.h"
#include "samples.h"

namespace fm {
namespace cuda {
namespace {

struct LossLaunch {
  LossCall call;
  Geometry geometry;
  Blocks blocks;
  double* partial;    // one sum a block, or of each chunk of each sample where the loss is one a sample
  uint32_t* arrived;  // blocks that are done
};

// What the elements of a sample share.
template <class T>
struct LossRecord {
  LossTerm<T> term;
  uint32_t id;
  bool mirror;
};

template <class T, bool kWide>
__device__ LossRecord<T> prepare_sample(const LossCall& call, const Key& key, int64_t sample) {
  double c[kColumns], incoming = 1.0, scale = 1.0;
  Dtype dtype = kWide ? call.coefficient_dtype : Dtype::float32;
  for (int i = 0; i < kColumns; ++i) c[i] = coefficient_at(call.coefficients, dtype, sample, i);
  if (call.sample_weight) scale = number_at(call.sample_weight, call.sample_weight_dtype, sample);
  if (call.grad_output.data) incoming = number_at(call.grad_output.data, call.grad_output.dtype, sample * call.grad_output.batch_stride);
  scale *= c[kW];
  double grad_scale = call.grad_factor * incoming * scale * c[kK];
  uint32_t id = sample_id(key, sample);
  return LossRecord<T>{
      {static_cast<T>(c[kC1]), static_cast<T>(c[kC0]), static_cast<T>(c[kK]), static_cast<T>(scale), static_cast<T>(grad_scale)},
      id,
      is_mirrored(call.transform, key, id)};
}

// Hands in a chunk's sum where the loss is one a sample.
__device__ __forceinline__ void put_chunk(const LossLaunch& launch, const Run& run, uint32_t chunk, double sum) {
  const Geometry& g = launch.geometry;
  sum = sum_team(sum, g.team);
  if (run.lane == 0 && run.sample < g.batch) launch.partial[run.sample * g.chunks + chunk] = sum;
}

__device__ __forceinline__ bool is_one_a_sample(const LossCall& call) { return call.reduction == kNone && call.loss; }

__device__ void put_loss(const LossCall& call, int64_t index, double sum) {
  if (call.loss_dtype == Dtype::float64)
    static_cast<double*>(call.loss)[index] = sum / call.divisor;
  else
    static_cast<float*>(call.loss)[index] = static_cast<float>(sum / call.divisor);
}

// The sum over everything, by the block that comes last.
__device__ void finish(const LossLaunch& launch, double total) {
  if (!launch.call.loss || launch.call.reduction == kNone) return;
  total = sum_block(total);
  if (threadIdx.x == 0) launch.partial[blockIdx.x] = total;
  if (!is_last_block(launch.arrived)) return;
  total = sum_partials(launch.partial, gridDim.x);
  if (threadIdx.x == 0) put_loss(launch.call, 0, total);
}

template <int kWidth>
__device__ __forceinline__ void weigh(const View& weight, int64_t offset, float (&values)[kWidth]) {
  float weights[kWidth];
  widen_pack(load_pack<float, kWidth>(weight.data, offset), weights);
  for (int i = 0; i < kWidth; ++i) values[i] *= weights[i];
}

// Blocks on a multiprocessor. Beside noise that is drawn, a float32 x1 has room for 72 registers, with which its loads stay ahead of the
// drawing; two float32 tensors ask for room for 80 to end up with these.
constexpr int kAheadBlocks = 7;

template <class O, class X1, bool kDraw>
constexpr int bound() {
  return sizeof(X1) == 1 ? kPixelBlocks : !kDraw || sizeof(X1) < 4 ? kBlocks : sizeof(O) == 4 ? kAheadBlocks - 1 : kAheadBlocks;
}

// Chunks pack by pack. Loads come first, so that the drawing of noise hides them. kPlain: no sample is mirrored and no element has a weight
// of its own, which else cost every element eight instructions.
template <class O, class X1, bool kDraw, bool kPlain>
__global__ void __launch_bounds__(kThreads, bound<O, X1, kDraw>()) packed_kernel(const LossLaunch launch) {
  using P = Packs<O>;
  const LossCall& call = launch.call;
  if (is_finished(call)) return;
  const Geometry& geometry = launch.geometry;
  const Key key = key_of(call.key_words);
  const Stream stream = stream_of(key, kStreamX0), dequantise = stream_of(key, kStreamDequantise);
  double total = 0;
  auto prepare = [&](int64_t sample, bool) { return prepare_sample<float, false>(call, key, sample); };
  walk<LossRecord<float>>(geometry, prepare, [&](const LossRecord<float>& shared, const Run& run) {
    const LossRecord<float> record = shared;
    const LossTerm<float>& term = record.term;
    const bool mirror = !kPlain && record.mirror;
    const uint32_t elements = static_cast<uint32_t>(run.elements);
    const int64_t base = static_cast<int64_t>(static_cast<uint64_t>(static_cast<uint32_t>(run.sample)) * elements);
    double squares = 0;
    for (uint32_t chunk = run.first_chunk; chunk < run.stop_chunk; ++chunk) {
      Pack<O, P::kWidth> o_packs[P::kCount], x0_packs[P::kCount];
      Pack<X1, P::kWidth> x1_packs[P::kCount];
      FM_UNROLL
      for (int i = 0; i < P::kCount; ++i) {
        uint32_t offset = P::offset(geometry, chunk, run.lane, i);
        if (offset >= elements) continue;
        o_packs[i] = load_pack<O, P::kWidth>(call.o.data, base + offset);
        x1_packs[i] = load_data_pack<P::kWidth, X1>(call.x1, base, offset, mirror, launch.blocks.width);
        if (!kDraw) x0_packs[i] = load_pack<O, P::kWidth>(call.x0.data, base + offset);
      }
      float sum = 0, noise[P::kCount][P::kWidth];
      // Without a branch between packs, also for elements that are not there: so they share the keys of the rounds.
      FM_UNROLL
      for (int i = 0; kDraw && i < P::kCount; ++i)
        source_pack<true>(x0_packs[i], stream, record.id, P::offset(geometry, chunk, run.lane, i) / kBlock, noise[i]);
      FM_UNROLL
      for (int i = 0; i < P::kCount; ++i) {
        uint32_t offset = P::offset(geometry, chunk, run.lane, i), block = offset / kBlock;
        if (offset >= elements) continue;
        float o[P::kWidth], x1[P::kWidth], difference[P::kWidth], scaled[P::kWidth];
        float (&x0)[P::kWidth] = noise[i];
        widen_pack(o_packs[i], o);
        if (!kDraw) widen_pack(x0_packs[i], x0);
        map_data_pack<P::kWidth>(x1_packs[i], mirror, call.transform, dequantise, record.id, block, x1);
        for (int j = 0; j < P::kWidth; ++j) difference[j] = scaled[j] = residual(term, o[j], x1[j], x0[j]);
        if (!kPlain && call.weight.data) weigh(call.weight, base + offset, scaled);
        for (int j = 0; j < P::kWidth; ++j) {
          sum = multiply_add(difference[j], scaled[j], sum);
          scaled[j] *= term.grad_scale;
        }
        if (call.grad.data) store_pack(static_cast<O*>(call.grad.data), base + offset, scaled);
      }
      squares += static_cast<double>(sum);
      if (!is_one_a_sample(call)) continue;
      put_chunk(launch, run, chunk, squares * static_cast<double>(term.loss_scale));
      squares = 0;
    }
    total += squares * static_cast<double>(term.loss_scale);
  });
  finish(launch, total);
}

// The same a counter block at a time, for any layout, dtype and size.
template <class T>
__global__ void __launch_bounds__(kThreads, kWideBlocks) strided_kernel(const LossLaunch launch) {
  const LossCall& call = launch.call;
  if (sizeof(T) == 4 && is_finished(call)) return;  // float64 is computed anew: the look would cost sm_120 a spill
  const Key key = key_of(call.key_words);
  const Stream stream = stream_of(key, kStreamX0), dequantise = stream_of(key, kStreamDequantise);
  double total = 0;
  auto prepare = [&](int64_t sample, bool) { return prepare_sample<T, true>(call, key, sample); };
  walk<LossRecord<T>>(launch.geometry, prepare, [&](const LossRecord<T>& record, const Run& run) {
    double squares = 0;
    for (uint32_t chunk = run.first_chunk; chunk < run.stop_chunk; ++chunk) {
      T sum = 0;
      for (int i = 0; i < kEach / kBlock; ++i) {
        int64_t index = block_index(launch.geometry, run, chunk, i);
        if (index * kBlock >= run.elements) continue;
        BlockPlace at = place_of_block(launch.blocks, index);
        T o[kBlock], x1[kBlock], x0[kBlock], weight[kBlock] = {1, 1, 1, 1}, grad[kBlock];
        load_block<T>(call.o, run.sample, at, o);
        load_data_block<T>(call.x1, run.sample, launch.blocks, at, record.mirror, call.transform, dequantise, record.id, x1);
        source_block<T>(call.x0, run.sample, at, stream, record.id, x0);
        if (call.weight.data) load_block<T>(call.weight, run.sample, at, weight);
        for (int j = 0; j < kBlock; ++j) {
          if (j >= at.count) continue;
          T difference = residual(record.term, o[j], x1[j], x0[j]), scaled = difference * weight[j];
          sum = multiply_add(difference, scaled, sum);
          grad[j] = scaled * record.term.grad_scale;
        }
        if (call.grad.data) store_block<T>(call.grad, run.sample, at, grad);
      }
      squares += static_cast<double>(sum);
      if (!is_one_a_sample(call)) continue;
      put_chunk(launch, run, chunk, squares * static_cast<double>(record.term.loss_scale));
      squares = 0;
    }
    total += squares * static_cast<double>(record.term.loss_scale);
  });
  finish(launch, total);
}

// One loss a sample: the chunks of each added by one warp.
__global__ void __launch_bounds__(kThreads) samples_kernel(const LossLaunch launch) {
  const Geometry& g = launch.geometry;
  int64_t warps = int64_t(gridDim.x) * (kThreads / kWarp), first = int64_t(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  for (int64_t sample = first; sample < g.batch; sample += warps) {
    double sum = sum_partials_of_warp(launch.partial + sample * g.chunks, g.chunks);
    if (threadIdx.x % kWarp == 0) put_loss(launch.call, sample, sum);
  }
}

using Kernel = void (*)(LossLaunch);

// nullptr where the tensors are not rows of packs. x0 is drawn again rather than recovered from x_t: a GPU draws faster than it reads.
template <class O, class X1, bool kDraw>
Kernel packed(const LossCall& call) {
  bool weight = !call.weight.data || call.weight.dtype == Dtype::float32;
  bool rows = are_packed(call.shape, call.transform, Packs<O>::kWidth, {&call.o, &call.x1, &call.x0, &call.grad, &call.weight});
  bool plain = call.transform.flip <= 0 && !call.weight.data;
  return !weight || !rows ? nullptr : plain ? packed_kernel<O, X1, kDraw, true> : packed_kernel<O, X1, kDraw, false>;
}

// The dtypes of training: x1 like o, float32 or uint8; x0 drawn, or like both.
template <class O>
Kernel packed_as(const LossCall& call) {
  Dtype o = call.o.dtype, x1 = call.x1.dtype;
  if (call.x0.data) return x1 == o && call.x0.dtype == o ? packed<O, O, false>(call) : nullptr;
  if (x1 == o) return packed<O, O, true>(call);
  if (x1 == Dtype::float32) return packed<O, float, true>(call);
  return x1 == Dtype::uint8 ? packed<O, uint8_t, true>(call) : nullptr;
}

Kernel packed_kernel_of(const LossCall& call) {
  if (call.wide || (call.grad.data && call.grad.dtype != call.o.dtype)) return nullptr;
  if (call.o.dtype == Dtype::float32) return packed_as<float>(call);
  return call.o.dtype == Dtype::bfloat16 ? packed_as<Bfloat16>(call) : packed_as<Float16>(call);
}

// That a multiprocessor holds.
int blocks_of_packed(const LossCall& call) {
  if (call.x1.dtype == Dtype::uint8) return kPixelBlocks;
  return !call.x0.data && call.x1.dtype == Dtype::float32 ? kAheadBlocks : kBlocks;
}

struct LossPlan {
  Kernel kernel;
  int64_t blocks;
  LossLaunch launch;
};

LossPlan plan(const LossCall& call) {
  Kernel packed = packed_kernel_of(call), kernel = packed ? packed : (call.wide ? strided_kernel<double> : strided_kernel<float>);
  LossLaunch args = {call, {}, blocks_of_sample(call.shape, call.o), nullptr, nullptr};
  int64_t padded = padded_elements(args.blocks);
  args.geometry = geometry(call.shape.batch, packed ? call.shape.channels * call.shape.positions : padded);
  return LossPlan{kernel, blocks_of(args.geometry, packed ? blocks_of_packed(call) : kWideBlocks), args};
}

void add_samples(const LossLaunch& args, void* stream) {
  int64_t needed = (args.geometry.batch + kThreads / kWarp - 1) / (kThreads / kWarp), most = device_blocks(kBlocks);
  if (needed > 0) launch(samples_kernel, needed < most ? needed : most, stream, args);
}

}  // namespace

int64_t path_loss_scratch(const LossCall& call) {
  LossPlan ready = plan(call);
  return 1 + (call.reduction == kNone ? ready.launch.geometry.batch * ready.launch.geometry.chunks : ready.blocks);
}

void path_loss(const LossCall& call, double* scratch, void* stream) {
  LossPlan ready = plan(call);
  if (call.loss) {
    ready.launch.arrived = reinterpret_cast<uint32_t*>(scratch);
    ready.launch.partial = scratch + 1;
  }
  bool single = call.loss && call.reduction != kNone;
  if (single) check(cudaMemsetAsync(ready.launch.arrived, 0, sizeof(uint32_t), static_cast<cudaStream_t>(stream)));
  launch(ready.kernel, ready.blocks, stream, ready.launch);
  if (call.loss && !single) add_samples(ready.launch, stream);
}

}  // namespace cuda
}  // namespace fm
