// AdamW (Loshchilov & Hutter 2019, algorithm 2), moving averages of the weights and their 16-bit copy in one pass over all parameters.
// The parameters are one flat range of positions, cut into units whatever tensors they hold, so that many small tensors cost no more.
#include "convert.h"
#include "tiling.h"

namespace fm {
namespace FM_ISA {
namespace {

constexpr int64_t kLanesOfSum = 16;

// The parameter at a position, or the first behind it.
FM_INLINE int64_t parameter_at(const ParameterRange& range, int64_t position) {
  int64_t low = 0, high = range.count;
  while (low < high) {
    int64_t middle = (low + high) / 2;
    bool before = range.parameters[middle].offset + range.parameters[middle].count <= position;
    before ? low = middle + 1 : high = middle;
  }
  return low;
}

// Calls body(parameter, first, count) for each piece of a parameter that lies in the unit.
template <class Body>
FM_INLINE void walk_pieces(const ParameterRange& range, int64_t unit, const Body& body) {
  int64_t position = unit * kTileElements, end = position + kTileElements;
  for (int64_t i = parameter_at(range, position); i < range.count && range.parameters[i].offset < end; ++i) {
    const Parameter& parameter = range.parameters[i];
    int64_t first = greater(position - parameter.offset, 0), last = lesser(end - parameter.offset, parameter.count);
    if (first < last) body(parameter, first, last - first);
  }
}

template <class T, class S>
FM_INLINE const T* loaded(const void* data, int64_t first, int64_t count, T* buffer) {
  load_run<T, S>(static_cast<const S*>(data) + first, 1, count, buffer);
  return buffer;
}

// Elements first, first + 1, ... in type T, where they are or in the buffer.
template <class T>
FM_INLINE const T* read_run(const void* data, Dtype dtype, int64_t first, int64_t count, T* buffer) {
  if (dtype == DtypeOf<T>::value) return static_cast<const T*>(data) + first;
  if (dtype == Dtype::float32) return loaded<T, float>(data, first, count, buffer);
  if (dtype == Dtype::float64) return loaded<T, double>(data, first, count, buffer);
  if (dtype == Dtype::float16) return loaded<T, Float16>(data, first, count, buffer);
  return loaded<T, Bfloat16>(data, first, count, buffer);
}

// --- norm ----------------------------------------------------------------------------------------------------------------------------

// In double, in which the square of a float is exact and never overflows; in an order that no instruction set changes.
template <class T>
FM_INLINE double square_sum(const T* x, int64_t count) {
  double lanes[kLanesOfSum] = {};
  int64_t i = 0;
  for (; i + kLanesOfSum <= count; i += kLanesOfSum)
    for (int64_t j = 0; j < kLanesOfSum; ++j) {
      double value = static_cast<double>(x[i + j]);
      lanes[j] = multiply_add(value, value, lanes[j]);
    }
  for (int64_t j = 0; i + j < count; ++j) lanes[j] += static_cast<double>(x[i + j]) * static_cast<double>(x[i + j]);
  for (int64_t half = kLanesOfSum / 2; half > 0; half /= 2)
    for (int64_t j = 0; j < half; ++j) lanes[j] += lanes[j + half];
  return lanes[0];
}

template <class T>
FM_INLINE double square_sum_of(const Parameter& parameter, int64_t first, int64_t count) {
  alignas(64) T buffer[kTileElements];
  return square_sum(read_run<T>(parameter.gradient, parameter.gradient_dtype, first, count, buffer), count);
}

// --- update --------------------------------------------------------------------------------------------------------------------------

// A run of one parameter. The numbers are those of AdamwNumbers in the compute type.
template <class T>
struct UpdateRow {
  T *p, *m, *v;
  const T* g;
  int64_t count;
  T clip, keep, mean_rate, square_keep, square_rate, root_scale, epsilon, step_size;
};

FM_INLINE float root(float x) { return __builtin_sqrtf(x); }
FM_INLINE double root(double x) { return __builtin_sqrt(x); }

template <class T>
FM_INLINE void update_row(const UpdateRow<T>& operands) {
  const UpdateRow<T> row = operands;
  // From the nearer end, as torch.lerp does: beta1 = 0 gives g itself, not what is left of it beside a large m.
  const bool near = row.mean_rate < T(0.5);
  const T share = near ? row.mean_rate : row.mean_rate - T(1);
#pragma GCC ivdep
  for (int64_t i = 0; i < row.count; ++i) {
    T g = row.clip * row.g[i];
    T m = multiply_add(share, g - row.m[i], near ? row.m[i] : g);
    T v = multiply_add(row.square_rate * g, g, row.square_keep * row.v[i]);
    T direction = m / multiply_add(row.root_scale, root(v), row.epsilon);
    row.p[i] = multiply_add(-row.step_size, direction, row.keep * row.p[i]);
    row.m[i] = m;
    row.v[i] = v;
  }
}

template <class T>
FM_INLINE void average_row(const T* p, T rate, int64_t count, T* average) {
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) average[i] = multiply_add(rate, p[i] - average[i], average[i]);
}

template <class T>
FM_INLINE void copy_row(const Parameter& parameter, const T* p, int64_t first, int64_t count) {
  if (parameter.copy_dtype == Dtype::bfloat16) store_run<T, Bfloat16>(p, 1, count, static_cast<Bfloat16*>(parameter.copy) + first);
  if (parameter.copy_dtype == Dtype::float16) store_run<T, Float16>(p, 1, count, static_cast<Float16*>(parameter.copy) + first);
}

template <class T>
FM_INLINE UpdateRow<T> numbers_of(const AdamwArgs& args, const AdamwNumbers& numbers) {
  UpdateRow<T> row = {};
  row.clip = static_cast<T>(numbers.clip);
  row.keep = static_cast<T>(numbers.keep);
  row.mean_rate = static_cast<T>(numbers.mean_rate);
  row.square_keep = static_cast<T>(numbers.square_keep);
  row.square_rate = static_cast<T>(numbers.square_rate);
  row.root_scale = static_cast<T>(numbers.root_scale);
  row.epsilon = static_cast<T>(numbers.epsilon);
  row.step_size = static_cast<T>(numbers.step_size);
  row.m = static_cast<T*>(args.mean);
  row.v = static_cast<T*>(args.square);
  return row;
}

template <class T>
FM_INLINE void update_piece(const AdamwArgs& args, const Parameter& parameter, int64_t first, int64_t count) {
  alignas(64) T buffer[kTileElements];
  T* p = static_cast<T*>(parameter.value) + first;
  int64_t position = parameter.offset + first;
  if (parameter.gradient) {
    UpdateRow<T> row = numbers_of<T>(args, args.numbers[&parameter - args.range.parameters]);
    row.p = p;
    row.m += position;
    row.v += position;
    row.g = read_run<T>(parameter.gradient, parameter.gradient_dtype, first, count, buffer);
    row.count = count;
    update_row(row);
  }
  for (int64_t k = 0; k < args.average_count; ++k)
    average_row(p, static_cast<T>(args.average_rates[k]), count, static_cast<T*>(args.averages) + k * args.range.length + position);
  if (parameter.copy) copy_row(parameter, p, first, count);
}

template <class T>
void update_units(const AdamwArgs& args, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; ++unit)
    walk_pieces(args.range, unit,
                [&](const Parameter& parameter, int64_t first, int64_t count) { update_piece<T>(args, parameter, first, count); });
}

}  // namespace

void adamw_ema_norm_units(const GradientNormArgs& args, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; ++unit) {
    double sum = 0;
    walk_pieces(args.range, unit, [&](const Parameter& parameter, int64_t first, int64_t count) {
      bool wide = parameter.gradient_dtype == Dtype::float64;
      sum += wide ? square_sum_of<double>(parameter, first, count) : square_sum_of<float>(parameter, first, count);
    });
    args.partial[unit] = sum;
  }
}

void adamw_ema_units(const AdamwArgs& args, int64_t begin, int64_t end) {
  args.wide ? update_units<double>(args, begin, end) : update_units<float>(args, begin, end);
}

}  // namespace FM_ISA
}  // namespace fm
