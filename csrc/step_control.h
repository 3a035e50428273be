// One sample of step_control, for every backend: whether the step that it tried counts, and how its next one goes.
#pragma once

#include "calls.h"

namespace fm {

// As in fm_fast/reference.py.
constexpr double kSafety = 0.9, kShortest = 0.2, kLongest = 10.0;
enum Status : int64_t { kAtTheEnd, kOnTheWay, kGivenUp };

struct SampleSteps {
  double t, length, tried;  // length: of the next step before it is cut at a stop; tried: after
  int64_t stop, evaluations, status;
  bool accepted;
};

// The largest of the parts; NaN if one is.
FM_HD double mean_square(const ControlCall& call, int64_t sample) {
  double square = call.means[sample];
  for (int64_t part = 1; part < call.parts; ++part) square = larger(square, call.means[part * call.batch + sample]);
  return square;
}

// How much longer the next step is; an error below 1 is not followed by a shorter one.
FM_HD double growth(double square, double order) {
  if (square != square) return kShortest;
  double factor = kSafety * exp(-0.5 * log(square) / order);
  factor = factor < kShortest ? kShortest : factor > kLongest ? kLongest : factor;
  return square < 1 && factor < 1 ? 1 : factor;
}

FM_HD double cut_at(double left, double length) { return magnitude(length) >= magnitude(left) ? left : length; }

FM_HD void judge(const ControlCall& call, double square, SampleSteps* s) {
  if (s->status != kOnTheWay) return;
  double stop = call.stops[s->stop], longer = s->tried * growth(square, call.order);
  bool cut = magnitude(s->length) >= magnitude(stop - s->t);
  s->accepted = square <= 1;
  s->evaluations += call.evaluations;
  if (s->accepted) s->t = cut ? stop : s->t + s->tried;
  // A step that was cut at a stop does not shorten the one that follows.
  if (!(s->accepted && cut && magnitude(s->length) > magnitude(longer))) s->length = longer;
  if (!(s->accepted && cut)) return;
  if (s->stop + 1 == call.stop_count)
    s->status = kAtTheEnd;
  else
    ++s->stop;
}

FM_HD void plan(const ControlCall& call, SampleSteps* s) {
  if (s->status == kOnTheWay && s->t + s->length == s->t) s->status = kGivenUp;  // too short to be a step
  s->tried = s->status == kOnTheWay ? cut_at(call.stops[s->stop] - s->t, s->length) : 0;
}

template <class T>
FM_HD void put_factors(const ControlCall& call, int64_t sample, double tried, double before) {
  T* factors = static_cast<T*>(call.factors);
  factors[sample] = static_cast<T>(tried);
  factors[call.batch + sample] = static_cast<T>(before == 0 ? 0 : tried / before);
}

FM_HD void put_times(const ControlCall& call, int64_t sample, double t, double step) {
  double begin = call.stops[0], end = call.stops[call.stop_count - 1];
  double low = begin < end ? begin : end, high = begin < end ? end : begin;
  for (int64_t j = 0; j < call.stages; ++j) {
    double time = multiply_add(call.nodes[j], step, t);
    call.times[j * call.batch + sample] = time < low ? low : time > high ? high : time;
  }
}

FM_HD SampleSteps load_steps(const ControlCall& call, int64_t sample) {
  const double* numbers = call.numbers + sample;
  const int64_t* counts = call.counts + sample;
  int64_t row = call.batch;
  return SampleSteps{numbers[0], numbers[row], numbers[2 * row], counts[0], counts[row], counts[2 * row], false};
}

FM_HD void store_steps(const ControlCall& call, int64_t sample, const SampleSteps& s) {
  double* numbers = call.numbers + sample;
  int64_t *counts = call.counts + sample, row = call.batch;
  numbers[0] = s.t, numbers[row] = s.length, numbers[2 * row] = s.tried;
  counts[0] = s.stop, counts[row] = s.evaluations, counts[2 * row] = s.status;
  call.accepted[sample] = s.accepted;
}

// What a sample adds to the totals.
struct Tally {
  int64_t on_the_way, given_up, accepted;
};

FM_HD Tally control_sample(const ControlCall& call, int64_t sample) {
  SampleSteps s = load_steps(call, sample);
  double before = s.tried;
  int64_t status = s.status;
  if (s.stop < 0 || s.stop >= call.stop_count)
    s.status = kGivenUp;  // counts of others than this op's, which would be read beyond the stops
  if (call.parts > 0) judge(call, mean_square(call, sample), &s);
  plan(call, &s);
  store_steps(call, sample, s);
  put_times(call, sample, s.t, s.tried);
  call.wide ? put_factors<double>(call, sample, s.tried, before) : put_factors<float>(call, sample, s.tried, before);
  return Tally{s.status == kOnTheWay, s.status == kGivenUp && status == kOnTheWay, s.accepted};
}

}  // namespace fm
