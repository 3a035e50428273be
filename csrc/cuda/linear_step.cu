// y = a x + sum_j c_j m(k_j): every explicit update of a Runge-Kutta or multistep method, with the mixing of guided velocities.
#include "../merge.h"
#include "geometry.h"
#include "kernels.h"
#include "pack.h"

namespace fm {
namespace cuda {
namespace {

struct StepLaunch {
  StepCall call;
  StepTerm terms[kMostTerms];
  Divisor positions, channels;  // of the strided walk
};

template <class T>
FM_HD T mixed(T conditional, T unconditional, T guidance) {
  return multiply_add(guidance, conditional - unconditional, unconditional);
}

// Terms of one pack, kAbreast at most, as they are stored.
template <class S, int kWidth, int kAbreast>
struct Terms {
  Pack<S, kWidth> k[kAbreast], unconditional[kAbreast];
};

// A kernel has kAbreast terms, or three or more of kMany. What is known to be there needs no branch, at which loads would be parted.
constexpr int kMany = 4;
// Of the kernels for packs: with room for 72 registers all loads stay together. Those of one or two terms take 64, so one more block fits.
constexpr int kStepBlocks = 7;

template <int kAbreast>
FM_HD bool is_there(const StepLaunch& launch, int64_t first, int j) {
  return first == 0 && j < (kAbreast == kMany ? kMany - 1 : kAbreast) ? true : first + j < launch.call.count;
}

// The terms first, first + 1, ...
template <class S, int kWidth, int kAbreast>
__device__ __forceinline__ void load_terms(const StepLaunch& launch, int64_t first, int64_t offset, Terms<S, kWidth, kAbreast>& terms) {
  FM_UNROLL
  for (int j = 0; j < kAbreast; ++j) {
    if (!is_there<kAbreast>(launch, first, j)) continue;
    const HalvedView& term = launch.terms[first + j].k;
    terms.k[j] = load_pack<S, kWidth>(term.first.data, offset);
    if (term.second) terms.unconditional[j] = load_pack<S, kWidth>(term.second, offset);
  }
}

template <class S, int kWidth, int kAbreast>
__device__ __forceinline__ void add_terms(const StepLaunch& launch, int64_t first, const Terms<S, kWidth, kAbreast>& terms, float guidance,
                                          float (&y)[kWidth]) {
  FM_UNROLL
  for (int j = 0; j < kAbreast; ++j) {
    if (!is_there<kAbreast>(launch, first, j)) continue;
    const float c = static_cast<float>(launch.call.coefficients[1 + first + j]);
    float k[kWidth], unconditional[kWidth];
    widen_pack(terms.k[j], k);
    if (launch.terms[first + j].k.second) {
      widen_pack(terms.unconditional[j], unconditional);
      for (int i = 0; i < kWidth; ++i) k[i] = mixed(k[i], unconditional[i], guidance);
    }
    for (int i = 0; i < kWidth; ++i) y[i] = multiply_add(c, k[i], y[i]);
  }
}

// What rows of packs leave over.
template <class S>
__device__ __forceinline__ void step_element(const StepLaunch& launch, int64_t i) {
  const StepCall& call = launch.call;
  const float guidance = static_cast<float>(call.guidance);
  float y = static_cast<float>(call.coefficients[0]) * static_cast<const float*>(call.x.data)[i];
  for (int64_t j = 0; j < call.count; ++j) {
    const HalvedView& term = launch.terms[j].k;
    const S stored = static_cast<const S*>(term.first.data)[i];
    if (call.kept.data && j + 1 == call.count) static_cast<S*>(call.kept.data)[i] = stored;
    float k = load_as<float>(stored);
    if (term.second) k = mixed(k, load_as<float>(static_cast<const S*>(term.second)[i]), guidance);
    y = multiply_add(static_cast<float>(call.coefficients[1 + j]), k, y);
  }
  static_cast<float*>(call.out.data)[i] = y;
  if (call.copy.first.data) store_as(y, static_cast<S*>(call.copy.first.data) + i);
  if (call.copy.second) store_as(y, static_cast<S*>(call.copy.second) + i);
}

// Rows of packs. S: dtype of the terms, of the copy and of what is kept. The loads of x and of the first kAbreast terms come before any
// arithmetic, so that they wait for memory together.
template <class S, int kAbreast>
__global__ void __launch_bounds__(kThreads, kStepBlocks) packed_kernel(const StepLaunch launch) {
  constexpr int kWidth = sizeof(S) == 2 ? 8 : 4;
  const StepCall& call = launch.call;
  const float guidance = static_cast<float>(call.guidance), a = static_cast<float>(call.coefficients[0]);
  const int64_t packs = call.shape.positions / kWidth, threads = int64_t(gridDim.x) * kThreads;
  const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  for (int64_t pack = thread; pack < packs; pack += threads) {
    const int64_t offset = pack * kWidth;
    float y[kWidth];
    Terms<S, kWidth, kAbreast> terms;
    const Pack<float, kWidth> x = load_pack<float, kWidth>(call.x.data, offset);
    load_terms(launch, 0, offset, terms);
    widen_pack(x, y);
    for (int i = 0; i < kWidth; ++i) y[i] *= a;
    add_terms(launch, 0, terms, guidance, y);
    for (int64_t first = kAbreast; kAbreast == kMany && first < call.count; first += kAbreast) {
      load_terms(launch, first, offset, terms);
      add_terms(launch, first, terms, guidance, y);
    }
    // After the sum, whose registers it would not fit beside, from the nearest cache; before `out` is written, which may be the term
    // itself.
    if (call.kept.data)
      move_pack(load_pack<S, kWidth>(launch.terms[call.count - 1].k.first.data, offset), static_cast<S*>(call.kept.data) + offset);
    store_pack(static_cast<float*>(call.out.data), offset, y);
    if (call.copy.first.data) store_pack(static_cast<S*>(call.copy.first.data), offset, y);
    if (call.copy.second) store_pack(static_cast<S*>(call.copy.second), offset, y);
  }
  if (packs * kWidth + thread < call.shape.positions) step_element<S>(launch, packs * kWidth + thread);
}

FM_HD int64_t offset_of(const View& view, int64_t sample, int64_t channel, int64_t position) {
  return sample * view.batch_stride + channel * view.channel_stride + position * view.position_stride;
}

FM_HD View second_half(const HalvedView& view) {
  View half = view.first;
  half.data = view.second;
  return half;
}

// An element at a time, for any layout, dtypes and number of terms.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks) strided_kernel(const StepLaunch launch) {
  const StepCall& call = launch.call;
  const T guidance = static_cast<T>(call.guidance), a = static_cast<T>(call.coefficients[0]);
  const int64_t count = call.shape.batch * call.shape.channels * call.shape.positions;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < count; i += int64_t(gridDim.x) * kThreads) {
    int64_t row = divide(i, launch.positions), position = i - row * launch.positions.value;
    int64_t sample = divide(row, launch.channels), channel = row - sample * launch.channels.value;
    T y = a * load_any<T>(call.x, offset_of(call.x, sample, channel, position));
    for (int64_t j = 0; j < call.count; ++j) {
      const HalvedView& term = launch.terms[j].k;
      int64_t offset = offset_of(term.first, sample, channel, position);
      T k = load_any<T>(term.first, offset);
      if (call.kept.data && j + 1 == call.count) store_any<T>(call.kept, offset_of(call.kept, sample, channel, position), k);
      if (term.second) k = mixed(k, load_any<T>(second_half(term), offset), guidance);
      y = multiply_add(static_cast<T>(call.coefficients[1 + j]), k, y);
    }
    store_any<T>(call.out, offset_of(call.out, sample, channel, position), y);
    int64_t offset = offset_of(call.copy.first, sample, channel, position);
    if (call.copy.first.data) store_any<T>(call.copy.first, offset, y);
    if (call.copy.second) store_any<T>(second_half(call.copy), offset, y);
  }
}

// Dimensions that all tensors keep together become one.
void merge_step(StepLaunch* args) {
  View* views[4 + kMostTerms];
  int64_t count = 0;
  views[count++] = &args->call.out;
  views[count++] = &args->call.x;
  if (args->call.copy.first.data) views[count++] = &args->call.copy.first;
  if (args->call.kept.data) views[count++] = &args->call.kept;
  for (int64_t j = 0; j < args->call.count; ++j) views[count++] = &args->terms[j].k.first;
  merge(&args->call.shape, Views{views, count});
}

bool on_boundary(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

bool is_row(const View& view, const void* second, Dtype dtype) {
  return view.dtype == dtype && view.position_stride == 1 && on_boundary(view.data) && on_boundary(second);
}

// The dtype of all terms, of the copy and of what is kept, if everything is one row of packs with a float32 state; int64 if not.
Dtype dtype_of_rows(const StepLaunch& args) {
  const StepCall& call = args.call;
  Dtype dtype = args.terms[0].k.first.dtype;
  bool rows = call.shape.batch == 1 && call.shape.channels == 1 && dtype != Dtype::float64;
  rows = rows && is_row(call.out, nullptr, Dtype::float32) && is_row(call.x, nullptr, Dtype::float32);
  if (call.copy.first.data) rows = rows && is_row(call.copy.first, call.copy.second, dtype);
  if (call.kept.data) rows = rows && is_row(call.kept, nullptr, dtype);
  for (int64_t j = 0; j < call.count; ++j) rows = rows && is_row(args.terms[j].k.first, args.terms[j].k.second, dtype);
  return rows ? dtype : Dtype::int64;
}

using Kernel = void (*)(StepLaunch);

template <class S>
Kernel packed(int64_t terms) {
  if (terms == 1) return packed_kernel<S, 1>;
  return terms == 2 ? packed_kernel<S, 2> : packed_kernel<S, kMany>;
}

Kernel kernel_of(const StepLaunch& args) {
  Dtype dtype = dtype_of_rows(args);
  if (dtype == Dtype::float32) return packed<float>(args.call.count);
  if (dtype == Dtype::bfloat16) return packed<Bfloat16>(args.call.count);
  if (dtype == Dtype::float16) return packed<Float16>(args.call.count);
  return args.call.wide ? strided_kernel<double> : strided_kernel<float>;
}

}  // namespace

void linear_step(const StepCall& call, const StepTerm* terms, void* stream) {
  StepLaunch args = {call, {}, {}, {}};
  int64_t count = call.shape.batch * call.shape.channels * call.shape.positions;
  if (count == 0) return;
  for (int64_t j = 0; j < call.count; ++j) args.terms[j] = terms[j];
  merge_step(&args);
  args.positions = divisor(args.call.shape.positions, count);
  args.channels = divisor(args.call.shape.channels, count);
  int64_t needed = (count + kThreads * kEach - 1) / (kThreads * kEach), most = device_blocks(call.count > 2 ? kStepBlocks : kBlocks);
  launch(kernel_of(args), needed < most ? needed : most, stream, args);
}

}  // namespace cuda
}  // namespace fm
