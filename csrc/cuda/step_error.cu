// The error of a step beside what is tolerated: of each sample the mean of (e / (atol + rtol max(|y|, |end|)))^2, e = sum_j c_j k_j
// (Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, equations II.4.10 and II.4.11).
#include "../merge.h"
#include "../step_error.h"
#include "chunk_sums.h"
#include "kernels.h"
#include "samples.h"

namespace fm {
namespace cuda {
namespace {

constexpr int kAbreast = 4;  // terms whose loads are in flight together

struct ErrorLaunch {
  ErrorCall call;
  View terms[kMostTerms];
  Geometry geometry;
  Divisor positions;  // of the strided walk
  double* partial;    // one sum a chunk of each sample
  double share;       // of an element in the mean of its sample
};

struct NoRecord {};

// The errors of a pack: the loads of some terms come first, beside each other.
template <int kWidth>
__device__ __forceinline__ void errors_of(const ErrorLaunch& launch, int64_t offset, float (&errors)[kWidth]) {
  for (int i = 0; i < kWidth; ++i) errors[i] = 0;
  for (int64_t first = 0; first < launch.call.count; first += kAbreast) {
    Pack<float, kWidth> packs[kAbreast];
    FM_UNROLL
    for (int j = 0; j < kAbreast; ++j)
      if (first + j < launch.call.count) packs[j] = load_pack<float, kWidth>(launch.terms[first + j].data, offset);
    FM_UNROLL
    for (int j = 0; j < kAbreast; ++j) {
      if (first + j >= launch.call.count) continue;
      const float c = static_cast<float>(launch.call.coefficients[first + j]);
      float k[kWidth];
      widen_pack(packs[j], k);
      for (int i = 0; i < kWidth; ++i) errors[i] = multiply_add(c, k[i], errors[i]);
    }
  }
}

// Samples that are rows of float32 packs.
__global__ void __launch_bounds__(kThreads, kBlocks) packed_kernel(const ErrorLaunch launch) {
  using P = Packs<float>;
  const float rtol = static_cast<float>(launch.call.rtol), atol = static_cast<float>(launch.call.atol);
  const auto nothing = [](int64_t, bool) { return NoRecord{}; };
  walk<NoRecord>(launch.geometry, nothing, [&](const NoRecord&, const Run& run) {
    for (uint32_t chunk = run.first_chunk; chunk < run.stop_chunk; ++chunk) {
      float sum = 0;
      FM_UNROLL
      for (int i = 0; i < P::kCount; ++i) {
        const int64_t offset = P::offset(launch.geometry, chunk, run.lane, i);
        if (offset >= run.elements) continue;
        const int64_t at = run.sample * run.elements + offset;
        float y[P::kWidth], end[P::kWidth], errors[P::kWidth];
        const Pack<float, P::kWidth> y_pack = load_pack<float, P::kWidth>(launch.call.y.data, at);
        const Pack<float, P::kWidth> end_pack = load_pack<float, P::kWidth>(launch.call.end.data, at);
        errors_of(launch, at, errors);
        widen_pack(y_pack, y);
        widen_pack(end_pack, end);
        for (int j = 0; j < P::kWidth; ++j) sum += square_of_ratio(errors[j], y[j], end[j], rtol, atol);
      }
      put_chunk(launch.geometry, run, chunk, static_cast<double>(sum) * launch.share, launch.partial);
    }
  });
}

// An element at a time, for any layout and dtypes.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks) strided_kernel(const ErrorLaunch launch) {
  const ErrorCall& call = launch.call;
  const Geometry& g = launch.geometry;
  const T rtol = static_cast<T>(call.rtol), atol = static_cast<T>(call.atol);
  const auto nothing = [](int64_t, bool) { return NoRecord{}; };
  walk<NoRecord>(g, nothing, [&](const NoRecord&, const Run& run) {
    for (uint32_t chunk = run.first_chunk; chunk < run.stop_chunk; ++chunk) {
      T sum = 0;
      for (int i = 0; i < kEach; ++i) {
        int64_t index = ((static_cast<int64_t>(chunk) * kEach + i) << g.team_bits) + run.lane;
        if (index >= run.elements) continue;
        int64_t channel = divide(index, launch.positions), position = index - channel * launch.positions.value;
        T error = 0;
        for (int64_t j = 0; j < call.count; ++j) {
          T k = load_any<T>(launch.terms[j], offset_of(launch.terms[j], run.sample, channel, position));
          error = multiply_add(static_cast<T>(call.coefficients[j]), k, error);
        }
        T y = load_any<T>(call.y, offset_of(call.y, run.sample, channel, position));
        T end = load_any<T>(call.end, offset_of(call.end, run.sample, channel, position));
        sum += square_of_ratio(error, y, end, rtol, atol);
      }
      put_chunk(g, run, chunk, static_cast<double>(sum) * launch.share, launch.partial);
    }
  });
}

// Channels become positions where they may: sums over samples have no logical order.
void merge_error(ErrorLaunch* args) {
  View* views[2 + kMostTerms];
  int64_t count = 0;
  views[count++] = &args->call.y;
  views[count++] = &args->call.end;
  for (int64_t j = 0; j < args->call.count; ++j) views[count++] = &args->terms[j];
  merge_channels(&args->call.shape, Views{views, count});
}

bool has_packed_samples(const ErrorLaunch& args) {
  const Shape& shape = args.call.shape;
  const auto packed = [&](const View& view) { return view.dtype == Dtype::float32 && is_packed(view, shape, Packs<float>::kWidth); };
  int64_t elements = shape.channels * shape.positions;
  bool result = elements % Packs<float>::kWidth == 0 && elements < kWordLimit - kThreads * kEach;
  result = result && packed(args.call.y) && packed(args.call.end);
  for (int64_t j = 0; result && j < args.call.count; ++j) result = packed(args.terms[j]);
  return result;
}

using Kernel = void (*)(ErrorLaunch);

Kernel kernel_of(const ErrorLaunch& args) {
  if (has_packed_samples(args)) return packed_kernel;
  return args.call.wide ? strided_kernel<double> : strided_kernel<float>;
}

Geometry geometry_of(const ErrorCall& call) { return geometry(call.shape.batch, call.shape.channels * call.shape.positions); }

}  // namespace

int64_t step_error_scratch(const ErrorCall& call) { return chunk_scratch(geometry_of(call)); }

void step_error(const ErrorCall& call, const View* terms, double* scratch, void* stream) {
  ErrorLaunch args = {call, {}, geometry_of(call), {}, nullptr, 0};
  int64_t elements = call.shape.channels * call.shape.positions;
  if (call.shape.batch == 0) return;
  for (int64_t j = 0; j < call.count; ++j) args.terms[j] = terms[j];
  merge_error(&args);
  args.positions = divisor(args.call.shape.positions, elements);
  args.partial = partial_of(args.geometry, scratch, call.means);
  args.share = 1.0 / static_cast<double>(elements);
  launch(kernel_of(args), blocks_of(args.geometry, kBlocks), stream, args);
  add_chunks(args.geometry, scratch, call.means, stream);
}

}  // namespace cuda
}  // namespace fm
