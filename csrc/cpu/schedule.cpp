// t and the six coefficients (a, s, c1, c0, k, w) of every sample (paper eqs 10 and 22 for OT; path.h for the others).
#include "abreast.h"

namespace fm {
namespace FM_ISA {
namespace {

// Numbers of consecutive samples, one Philox block each, of which the first counts.
template <class Finish>
FM_INLINE void draw_first(const Generator& generator, const Key& key, int64_t first, int64_t count, float* numbers) {
  float drawn[kBlockPoints * kAbreast];
  draw_blocks<Finish>(generator, key, first, count, drawn);
  for (int64_t i = 0; i < count; ++i) numbers[i] = drawn[kBlockPoints * i];
}

FM_INLINE void draw_lattice(const Stream& stream, const Key& key, int64_t first, int64_t count, float* numbers) {
  uint32_t start = lattice_start(stream);
  for (int64_t i = 0; i < count; ++i) numbers[i] = lattice_time(start, sample_id(key, first + i));
}

// The random numbers from which `time_from` makes times.
FM_INLINE void draw_numbers(const ScheduleArgs& args, const Generator& generator, int64_t first, int64_t count, float* numbers) {
  if (args.law.sampler == kTimeStratified) return draw_lattice(stream_of(args.key, kStreamTime), args.key, first, count, numbers);
  if (args.law.sampler == kTimeLogitNormal) return draw_first<ToNormals>(generator, args.key, first, count, numbers);
  draw_first<ToUniforms>(generator, args.key, first, count, numbers);
}

template <class T>
FM_INLINE void put_coefficients(const ScheduleArgs& args, double t, T* row) {
  Coefficients c = coefficients(args.path, args.objective, t);
  const double values[6] = {c.a, c.s, c.c1, c.c0, c.k, c.w};
  for (int i = 0; i < 6; ++i) row[i] = static_cast<T>(values[i]);
}

template <class T>
void fill_schedule(const ScheduleArgs& args, int64_t begin, int64_t end) {
  T *t = static_cast<T*>(args.t), *rows = static_cast<T*>(args.coefficients);
  Generator generator = make_generator(stream_of(args.key, kStreamTime));
  float numbers[kAbreast];
  for (int64_t first = begin; first < end; first += kAbreast) {
    int64_t count = lesser(kAbreast, end - first);
    bool given = args.law.sampler == kTimeGiven;
    if (!given) draw_numbers(args, generator, first, count, numbers);
    for (int64_t i = 0, b = first; i < count; ++i, ++b) {
      double time = given ? clamp_time(args.law, static_cast<double>(t[b])) : time_from(args.law, numbers[i]);
      t[b] = static_cast<T>(time);
      put_coefficients(args, static_cast<double>(t[b]), rows + 6 * b);
    }
  }
}

}  // namespace

void schedule_units(const ScheduleArgs& args, int64_t begin, int64_t end) {
  args.wide ? fill_schedule<double>(args, begin, end) : fill_schedule<float>(args, begin, end);
}

}  // namespace FM_ISA
}  // namespace fm
