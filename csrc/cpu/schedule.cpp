// t and the six coefficients (a, s, c1, c0, k, w) of every sample, by the formulas of path.h (paths: paper eqs 16, 18 and 20).
#include "abreast.h"

namespace fm {
namespace FM_ISA {
namespace {

// Numbers of consecutive samples, one Philox block each, of which the first counts.
template <class Finish>
FM_INLINE void draw_first(const Generator& generator, const Key& key, int64_t first, int64_t count, float* numbers) {
  float drawn[kBlockPositions * kAbreast];
  draw_blocks<Finish>(generator, key, first, count, drawn);
  for (int64_t i = 0; i < count; ++i) numbers[i] = drawn[kBlockPositions * i];
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
void fill_schedule(const ScheduleArgs& args, int64_t begin, int64_t end) {
  const T* given = args.law.sampler == kTimeGiven ? static_cast<const T*>(args.t) : nullptr;
  Generator generator = make_generator(stream_of(args.key, kStreamTime));
  float numbers[kAbreast];
  for (int64_t first = begin; first < end; first += kAbreast) {
    int64_t count = lesser(kAbreast, end - first);
    if (!given) draw_numbers(args, generator, first, count, numbers);
    for (int64_t i = 0, b = first; i < count; ++i, ++b) {
      T time = static_cast<T>(given ? clamp_time(args.law, static_cast<double>(given[b])) : time_from(args.law, numbers[i]));
      put_coefficients<T>(args, b, time, coefficients(args.path, args.objective, static_cast<double>(time)));
    }
  }
}

}  // namespace

void schedule_units(const ScheduleArgs& args, int64_t begin, int64_t end) {
  args.wide ? fill_schedule<double>(args, begin, end) : fill_schedule<float>(args, begin, end);
}

}  // namespace FM_ISA
}  // namespace fm
